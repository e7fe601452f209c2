"""Our folder kernels/ must never become the import `kernels`, which transformers needs.

transformers and diffusers import a PyPI package of that name. A folder `kernels` on sys.path
without `__init__.py` loses against an installed package, one with it wins.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHOW = """
import sys
from pathlib import Path
import kernels
print("path", kernels.__file__)
print("root", {root!r} in [str(Path(entry).resolve()) for entry in sys.path])
"""


def _python(code: str, folder: Path, *, search_root: bool) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if search_root:
        environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_folder_is_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "sfgrpo" / "kernels").resolve() == ROOT / "kernels"


@pytest.mark.parametrize(
    ("in_root", "search_root"),
    [(True, False), (False, True), (True, True), (False, False)],
    ids=["run in the root, as python -m", "PYTHONPATH", "both", "neither"],
)
def test_kernels_is_the_installed_package(tmp_path: Path, in_root: bool, search_root: bool) -> None:
    shown = _python(
        SHOW.format(root=str(ROOT)), ROOT if in_root else tmp_path, search_root=search_root
    )
    path = Path(shown.partition("path ")[2].splitlines()[0])
    assert path.parent.name == "kernels"
    assert path.parent.parent.name == "site-packages"
    assert f"root {in_root or search_root}" in shown


@pytest.mark.slow
def test_transformers_and_diffusers_import_beside_it() -> None:
    code = "import transformers, diffusers, sfgrpo.kernels.common as ours; print(ours.__name__)"
    assert _python(code, ROOT, search_root=True).split()[-1] == "sfgrpo.kernels.common"
