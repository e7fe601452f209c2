"""Compile every kernel ahead of time, without a GPU, and say what each one costs the chip.

`python -m sfgrpo.kernels.aot [--json FILE] [--only EXAMPLE] [target ...]` prints registers per
thread, shared memory per program, register spills, instructions per element and the predicted share
of a copy's bandwidth of the launches that the kernel files list as `EXAMPLES` (default: all), for
each target (default: all of `TARGETS`), and saves the table if a file is named. The launchers
themselves run, on tensors without storage, and their launches are recorded: what is compiled is
what a GPU would be asked to run.

Tested with Triton 3.7.1 (PyTorch 2.13), which also interprets the kernels in the tests, and, ahead
of time only, with Triton 3.6.0 (that of PyTorch 2.11), whose interpreter fails with NumPy 2.4 and
later. No example spills, but for one with 3.6.0 on sm_90: gain_advantages of a group too large for
one pass, "joint", keeps two registers of a thread in memory, which its few programs do not notice.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import inspect
import json
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type

import sfgrpo.kernels
from sfgrpo.kernels.machine_code import (
    CHIPS,
    bytes_per_element,
    of_amdgcn,
    of_cubin,
    per_element,
)

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
COMPILER_OPTIONS = ("num_warps", "enable_fp_fusion")
OFFSETS = re.compile(r"tt\.addptr .* tensor<\d+x\d+x(i\d+)>")


@dataclass(frozen=True)
class Launch:
    """One recorded launch: a kernel and its arguments by name."""

    kernel: JITFunction[Any]
    arguments: dict[str, Any]
    options: dict[str, Any]

    def source(self) -> ASTSource:
        """The kernel specialised as Triton's launcher would specialise it for these arguments."""
        signature: dict[str, str] = {}
        constants: dict[str, Any] = {}
        attributes: dict[tuple[int], list[list[Any]]] = {}
        for param in self.kernel.params:
            value = self.arguments[param.name]
            free = isinstance(value, int) and not param.do_not_specialize
            if param.is_constexpr or value is None or (free and value == 1):
                signature[param.name] = "constexpr"
                constants[param.name] = value
                continue
            signature[param.name] = mangle_type(value)
            if isinstance(value, Tensor) or (free and value % 16 == 0):
                attributes[(param.num,)] = [["tt.divisibility", 16]]
        return ASTSource(self.kernel, signature, constants, attributes)

    def key(self) -> str:
        return f"{self.source().hash()} {self.options}"


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel needs."""

    example: str
    kernel: str
    target: str
    registers: int
    """32-bit vector registers per thread."""
    shared: int
    """Bytes of shared memory per program."""
    spilled: int
    """Registers or bytes of registers that did not fit and live in memory."""
    instructions: float | None
    """Per element of the latents, all threads together; None for a kernel without latents."""
    shares: dict[str, float]
    """Predicted bandwidth over that of a copy, by chip; empty without latents."""
    offsets: list[str]
    """Integer types of the offsets that are added to the pointers of whole tiles."""
    assembly: str
    """PTX or AMD GCN text."""


def sources() -> str:
    """A hash of the files that kernels and their launches are written in: what a table is of."""
    found = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.name not in ("aot.py", "machine_code.py"):
            found.update(path.read_bytes())
    return found.hexdigest()


def examples() -> dict[str, Callable[[], object]]:
    """All examples of all kernel files, as `op: example` -> launcher call."""
    found = {}
    for info in pkgutil.iter_modules(sfgrpo.kernels.__path__):
        if info.name == "aot":
            continue
        module = importlib.import_module(f"sfgrpo.kernels.{info.name}")
        for label, call in getattr(module, "EXAMPLES", {}).items():
            found[f"{info.name}: {label}"] = call
    return found


def record(call: Callable[[], object]) -> list[Launch]:
    """The launches of `call`, none of which runs."""
    launches: list[Launch] = []

    def run(kernel: JITFunction[Any], *args: object, grid: object, warmup: bool, **kwargs: Any):
        options = {name: kwargs.pop(name) for name in COMPILER_OPTIONS}
        bound = inspect.signature(kernel.fn).bind(*args, **kwargs)
        launches.append(Launch(kernel, bound.arguments, options))

    with mock.patch.object(JITFunction, "run", run):
        call()
    return launches


def _usage(example: str, target: str, launch: Launch) -> Usage:
    gpu, latents = TARGETS[target], "row_elements" in launch.arguments
    compiled = triton.compile(launch.source(), target=gpu, options=dict(launch.options))
    if gpu.backend == "cuda":
        code, assembly = of_cubin(compiled.asm["cubin"], latents), compiled.asm["ptx"]
    else:
        code, assembly = of_amdgcn(compiled.asm["amdgcn"]), compiled.asm["amdgcn"]
    instructions, shares = None, {}
    if latents and code.instructions is not None:
        threads = launch.options["num_warps"] * gpu.warp_size
        instructions = round(per_element(code.instructions, threads, launch.arguments), 1)
        tile = launch.arguments["ROWS"], launch.arguments["COLS"]
        size = bytes_per_element(compiled.asm["ttir"], tile)
        shares = {c.name: round(c.share_of_copy(instructions, size), 2) for c in CHIPS[target]}
    return Usage(
        example,
        launch.kernel.fn.__name__,
        target,
        code.registers,
        compiled.metadata.shared,
        code.spilled,
        instructions,
        shares,
        sorted(set(OFFSETS.findall(compiled.asm["ttir"]))),
        assembly,
    )


def compile_example(example: str, target: str) -> list[Usage]:
    """Compile each distinct launch of one example for one target.

    Raises:
        triton.compiler.CompilationError, RuntimeError: a kernel does not compile.
    """
    distinct = {launch.key(): launch for launch in record(examples()[example])}
    return [_usage(example, target, launch) for launch in distinct.values()]


def compile_all(targets: list[str], only: list[str], workers: int = 2) -> Iterator[Usage]:
    """Compile the examples `only` (empty: all) for `targets`, in the order of the examples.

    Raises:
        RuntimeError: Triton runs as an interpreter in this process.
    """
    if knobs.runtime.interpret:
        raise RuntimeError("nothing is compiled while TRITON_INTERPRET is set; unset it")
    chosen = [example for example in examples() if example in only or not only]
    jobs = [(example, target) for example in chosen for target in targets]
    with ProcessPoolExecutor(workers) as pool:
        for usages in pool.map(compile_example, *zip(*jobs, strict=True)):
            yield from usages


def save(usages: list[Usage], path: Path) -> None:
    """The table as JSON, one line per kernel, without the assembly."""
    rows = [{k: v for k, v in asdict(usage).items() if k != "assembly"} for usage in usages]
    lines = ",\n".join(f"    {json.dumps(row)}" for row in rows)
    made = {"triton": triton.__version__, "torch": torch.__version__, "sources": sources()}
    head = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in made.items())
    path.write_text(f'{{\n{head},\n  "kernels": [\n{lines}\n  ]\n}}\n')


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m sfgrpo.kernels.aot")
    parser.add_argument("--json", type=Path, help="save the table here as well")
    parser.add_argument(
        "--only", action="append", default=[], metavar="EXAMPLE", help="may be given several times"
    )
    parser.add_argument("targets", nargs="*", help=", ".join(TARGETS))
    options = parser.parse_args(argv)
    unknown = [target for target in options.targets if target not in TARGETS]
    if unknown:
        print(f"unknown target {unknown[0]}; known: {', '.join(TARGETS)}", file=sys.stderr)
        return 2
    if unknown := [example for example in options.only if example not in examples()]:
        print(f"unknown example {unknown[0]!r}; known: {', '.join(examples())}", file=sys.stderr)
        return 2
    width = max(len(example) for example in examples())
    print(
        f"{'example':{width}}  {'kernel':28}  {'target':6}  registers  shared  spills  "
        "an element  of a copy"
    )
    usages = []
    for usage in compile_all(options.targets or list(TARGETS), options.only):
        usages.append(usage)
        shares = ", ".join(f"{chip} {share:.2f}" for chip, share in usage.shares.items())
        print(
            f"{usage.example:{width}}  {usage.kernel:28}  {usage.target:6}  "
            f"{usage.registers:9}  {usage.shared:6}  {usage.spilled:6}  "
            f"{usage.instructions or '-':>10}  {shares or '-'}",
            flush=True,
        )
    if options.json is not None:
        save(usages, options.json)
    return 1 if any(usage.spilled for usage in usages) else 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))
