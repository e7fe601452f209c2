"""What a compiled kernel costs, read from its machine code: registers, spills, instructions.

The instructions are those that a thread issues in a program that finishes no row: loops run once,
which only programs that finish rows have. NVIDIA: every forward branch is taken (what is jumped
over are rare cases of the square root, and the counting that one thread of a program does), up to
the first exit. AMD: vector and memory instructions, no branch taken, up to the program's count.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Any

from triton import knobs

ISSUE_EFFICIENCY = 0.85
"""Of the instructions a chip could issue, what kernels of this kind reach."""


@dataclass(frozen=True)
class MachineCode:
    """Of one kernel for one target."""

    registers: int
    """32-bit vector registers per thread."""
    spilled: int
    """Registers or bytes of registers that did not fit and live in memory."""
    instructions: int | None
    """Per thread, see above; None if not asked for."""


@dataclass(frozen=True)
class Chip:
    """A GPU of a target: what a copy reaches in bytes per second, and instructions per second."""

    name: str
    copy_bandwidth: float
    processors: int
    clock: float
    """Hz, sustained."""
    lanes: int = 128
    """Instructions of single threads that a processor issues per clock."""

    def share_of_copy(self, instructions: float, size: float) -> float:
        """Predicted bandwidth over that of a copy, given both per element; size in bytes."""
        issue = instructions / (self.processors * self.lanes * self.clock * ISSUE_EFFICIENCY)
        return min(1.0, size / self.copy_bandwidth / issue)


CHIPS = {
    "sm_80": (Chip("A100", 1.8e12, 108, 1.41e9),),
    "sm_90": (Chip("H100", 3.0e12, 132, 1.755e9), Chip("H200", 4.3e12, 132, 1.755e9)),
    "sm_100": (Chip("B200", 7.2e12, 148, 1.85e9),),
    "sm_120": (Chip("RTX 5090", 1.6e12, 170, 2.41e9),),
    "gfx942": (Chip("MI300X", 4.3e12, 304, 2.1e9, 64),),
    "gfx950": (Chip("MI355X", 6.5e12, 256, 2.4e9, 64),),
}
"""By target. Copies reach nine tenths of the data sheet's bandwidth (AMD: eight)."""


def of_cubin(cubin: bytes, count: bool) -> MachineCode:
    """NVIDIA's, by `cuobjdump`; the instructions, which take it most of its time, if `count`."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [knobs.nvidia.cuobjdump.path, *(["-sass"] * count), "-res-usage", file.name],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    instructions = sass_instructions(text) if count else None
    return MachineCode(found["REG"], found["STACK"] + found["LOCAL"], instructions)


def sass_instructions(text: str) -> int:
    """Instructions of a thread that takes every forward branch, up to its exit."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][^;]*);", text)
    position = {int(address, 16): index for index, (address, _) in enumerate(lines)}
    count, index = 0, 0
    while True:
        address, instruction = lines[index]
        count, index = count + 1, index + 1
        if instruction.startswith("EXIT"):
            return count
        target = re.match(r"BRA\b.*?(0x[0-9a-f]+)", instruction)
        if target is not None and int(target[1], 16) > int(address, 16):
            index = position[int(target[1], 16)]


def of_amdgcn(assembly: str) -> MachineCode:
    """AMD's, from the assembly and the fields at its end."""

    def field(name: str) -> int:
        match = re.search(rf"\.{name}:\s*(\d+)", assembly)
        if match is None:
            raise RuntimeError(f"the AMD assembly has no field .{name}")
        return int(match[1])

    before_count = re.split(r"\bs_endpgm\b|\bglobal_atomic_add\b", assembly)[0]
    instructions = re.findall(r"^\s+(?:v|global|ds|buffer|flat)_\w+", before_count, re.MULTILINE)
    spilled = field("vgpr_spill_count") + field("sgpr_spill_count")
    return MachineCode(field("vgpr_count"), spilled, len(instructions))


def bytes_per_element(ttir: str, tile: tuple[int, int]) -> float:
    """Bytes of the loads and stores of whole tiles, per element of the tile."""
    pattern = rf"tt\.(?:load|store) .*tensor<{tile[0]}x{tile[1]}x!tt\.ptr<[a-z]+(\d+)>>"
    return sum(int(bits) / 8 for bits in re.findall(pattern, ttir))


def per_element(instructions: int, threads: int, arguments: dict[str, Any]) -> float:
    """Instructions of all threads of a program over the elements that it works on."""
    row = min(arguments["row_elements"], arguments["COLS"])
    return instructions * threads / (arguments["ROWS"] * row)
