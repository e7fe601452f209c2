"""What test_aot_compile.py wants to know of compiled kernels, as JSON.

Run in a process where Triton compiles instead of interpreting.
"""

from __future__ import annotations

import json
import re
import sys

import triton
import triton.language as tl
from triton.compiler import ASTSource

from sfgrpo.kernels.aot import TARGETS, compile_example
from sfgrpo.kernels.philox import polar, squared_radius, uniform


@triton.jit
def noise_arithmetic(words_ptr, out_ptr, scale, N: tl.constexpr):
    index = tl.arange(0, N)
    word = tl.load(words_ptr + index).to(tl.uint32, bitcast=True)
    square = squared_radius(uniform(word, 1.0))
    cos, sin = polar(square, uniform(word, 4.0))
    tl.store(out_ptr + index, cos)
    tl.store(out_ptr + N + index, sin)
    # A product and a sum that any compiler fuses if it may.
    tl.store(out_ptr + 2 * N + index, square * scale + cos)


def fused(target: str, *, allowed: bool) -> int:
    """Fused floating-point multiply-adds in the assembly of the noise beyond those it asks for.

    Without the square root: on AMD a correctly rounded one is made of fused instructions, on
    purpose.
    """
    source = ASTSource(
        noise_arithmetic,
        {"words_ptr": "*i32", "out_ptr": "*fp32", "scale": "fp32", "N": "constexpr"},
        {"N": 128},
    )
    options = {"num_warps": 4, "enable_fp_fusion": allowed}
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    asked = len(re.findall(r"\bmath\.fma\b", compiled.asm["ttir"]))
    if TARGETS[target].backend == "cuda":
        ptx = len(re.findall(r"\bfma\.rn\S*f32\b", compiled.asm["ptx"]))
        return ptx + len(re.findall(r"\bFFMA\b", compiled.asm["sass"])) - 2 * asked
    return len(re.findall(r"\bv_(?:pk_)?(?:fma|mad|mac)\w*f32", compiled.asm["amdgcn"])) - asked


def finishing(target: str) -> str:
    """Assembly of a kernel whose rows span several programs."""
    (usage,) = compile_example("sde_logprob: 16x64x64", target)
    return usage.assembly


if __name__ == "__main__":
    report = {
        "fused": {t: [fused(t, allowed=a) for a in (False, True)] for t in TARGETS},
        "finishing": {t: finishing(t) for t in TARGETS},
    }
    json.dump(report, sys.stdout)
