"""Prints a hash of every op's results, as JSON; run in processes of different instruction sets."""

from __future__ import annotations

import hashlib
import json

import torch

from sfgrpo import ops
from tests.support.ops import zeros
from tests.support.ops.cases import BF16, F16, F32, F64, arguments, call, rows


def digests() -> dict[str, str]:
    """One hash per op, dtype and set of operands; and which known zeros of the noise are wrong."""
    found = {}
    for dtype in (F32, BF16, F16, F64):
        for full, shape in ((True, (2, 1033)), (False, (77,))):
            for name, args in arguments(rows(3, shape, dtype, dtype), full).items():
                digest = hashlib.sha256()
                for result in call(name, args):
                    digest.update(result.reshape(-1).view(torch.uint8).numpy().tobytes())
                found[f"{name} {dtype} {full}"] = digest.hexdigest()
    noise = ops.philox_normal((zeros.ELEMENTS,), seed=0, sample_ids=zeros.SAMPLES, step_ids=0)
    found["wrong zeros"] = str(zeros.wrong_zeros(noise))
    return found


if __name__ == "__main__":
    print(json.dumps(digests()))
