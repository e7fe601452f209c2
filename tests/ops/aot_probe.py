"""Compiles the noise arithmetic, up to the square root, and counts fused multiply-adds.

Run by test_aot_compile.py in a process where Triton compiles instead of interpreting. The square
root itself is left out: on AMD a correctly rounded one is made of fused instructions, on purpose.
"""

from __future__ import annotations

import json
import re
import sys

import triton
import triton.language as tl
from triton.compiler import ASTSource

from sfgrpo.kernels.aot import TARGETS
from sfgrpo.kernels.philox import cos_sin_turns, log_positive, uniform


@triton.jit
def noise_arithmetic(words_ptr, out_ptr, scale, N: tl.constexpr):
    index = tl.arange(0, N)
    u = uniform(tl.load(words_ptr + index).to(tl.uint32, bitcast=True))
    cos, sin = cos_sin_turns(u)
    logarithm = log_positive(u)
    tl.store(out_ptr + index, cos)
    tl.store(out_ptr + N + index, sin)
    tl.store(out_ptr + 2 * N + index, logarithm)
    # A product and a sum that any compiler fuses if it may.
    tl.store(out_ptr + 3 * N + index, logarithm * scale + cos)


def fused(target: str, *, allowed: bool) -> int:
    """Fused floating-point multiply-adds in the assembly."""
    source = ASTSource(
        noise_arithmetic,
        {"words_ptr": "*i32", "out_ptr": "*fp32", "scale": "fp32", "N": "constexpr"},
        {"N": 128},
    )
    options = {"num_warps": 4, "enable_fp_fusion": allowed}
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    if TARGETS[target].backend == "cuda":
        return len(re.findall(r"\bfma\.rn\S*f32\b", compiled.asm["ptx"])) + len(
            re.findall(r"\bFFMA\b", compiled.asm["sass"])
        )
    return len(re.findall(r"\bv_(?:pk_)?(?:fma|fmac|mad|mac)_\w*f32\b", compiled.asm["amdgcn"]))


if __name__ == "__main__":
    json.dump({t: [fused(t, allowed=a) for a in (False, True)] for t in TARGETS}, sys.stdout)
