"""The kernels of an Arm processor (NEON), emulated: the bits of this one's baseline.

It takes a cross compiler and an emulator (Debian: ``apt install g++-aarch64-linux-gnu
qemu-user-static``), and of PyTorch its headers only.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from sfgrpo.csrc import build

CROSS = shutil.which("aarch64-linux-gnu-g++")
EMULATOR = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
PROGRAMS = Path(__file__).parents[1] / "support" / "ops" / "emulated"
INCLUDE = Path(torch.__file__).parent / "include"


def _printed(compiler: str, program: str, folder: Path, *command: str) -> list[str]:
    macros = [f"-D{name}={value}" for name, value in build.MACROS.items()]
    built = folder / f"{program}-{Path(compiler).name}"
    subprocess.run(
        [
            *(compiler, *build.FLAGS, *macros, f"-I{INCLUDE}", f"-I{build.HERE}"),
            # Of PyTorch's functions none is called.
            *(PROGRAMS / f"{program}.cpp", "-static", "-Wl,--unresolved-symbols=ignore-all"),
            *("-o", built),
        ],
        check=True,
    )
    done = subprocess.run([*command, built], check=True, capture_output=True, text=True)
    return done.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.skipif(not (CROSS and EMULATOR), reason="no cross compiler or no emulator of Arm")
@pytest.mark.skipif(platform.machine() == "aarch64", reason="here the other tests run them")
@pytest.mark.parametrize("program", ["step", "loss"])
def test_the_bits_of_an_arm_processor(program: str, tmp_path: Path) -> None:
    assert CROSS
    assert EMULATOR
    emulated = _printed(CROSS, program, tmp_path, EMULATOR)
    assert len(emulated) > 40
    assert emulated == _printed("g++", program, tmp_path)
