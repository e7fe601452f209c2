"""Options of how a network runs: they change speed and memory, not numbers."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.trainer import family_checks
from sfgrpo.backbones import _loading
from sfgrpo.trainer import Trainer
from tests.support import families
from tests.support.families import PROMPTS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("families")
    return {name: families.save(name, place / name) for name in ("sd3", "flux", "wan", "zimage")}


def velocity(
    backbone: Any, shape: tuple[int, ...], *, seed: int = 0, name: str = "sd3"
) -> torch.Tensor:
    """With the images of the family `name`, if it takes any."""
    x = torch.randn(len(PROMPTS), *shape, generator=torch.Generator().manual_seed(seed))
    t = torch.tensor([1.0, 0.25])  # times that bfloat16 has, of which some networks make thousands
    cond = family_checks.encode(backbone, families.FAMILIES[name])
    return backbone.velocity(backbone.transformer, x, t, cond)


def test_compiled_blocks_give_the_same_velocity(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.compiler.reset()
    # What the graph is made of is PyTorch's business, and takes it half a minute.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    plain = family_checks.load("wan", folders["wan"])
    made = family_checks.load("wan", folders["wan"], compile_blocks=True)
    compiled = [m for m in made.transformer.modules() if m._compiled_call_impl is not None]
    assert [type(m).__name__ for m in compiled] == ["WanTransformerBlock"] * 2
    shape = made.latent_shape(32, 32, 5)
    torch.testing.assert_close(velocity(made, shape), velocity(plain, shape), rtol=1e-4, atol=1e-4)
    velocity(made, shape).square().mean().backward()
    velocity(plain, shape).square().mean().backward()
    pairs = zip(made.transformer.parameters(), plain.transformer.parameters(), strict=True)
    for one, two in pairs:
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-3, atol=1e-4)


def test_stage_3_does_not_compile(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model.compile_blocks: does not go with .*zero_stage 3"):
        family_checks.recipe(
            "flux", tmp_path, tmp_path / "r",
            model__compile_blocks="true", deepspeed__zero_stage="3",
        )  # fmt: skip
    with pytest.raises(ValueError, match=r"model.compile_blocks: Linear names no repeated blocks"):
        _loading.compile_blocks(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("name", ["sd3", "flux", "wan", "zimage"])
def test_slicing_and_batches_of_decoding(name: str, folders: dict[str, Path]) -> None:
    shape = family_checks.load(name, folders[name]).latent_shape(*families.FAMILIES[name].size)
    latents = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    whole = family_checks.load(name, folders[name], decode_batch=3)
    sliced = family_checks.load(name, folders[name], decode_batch=3, vae_slicing=True)
    single = family_checks.load(name, folders[name], decode_batch=1)
    assert sliced.pipeline.vae.use_slicing
    assert not whole.pipeline.vae.use_slicing
    for other in (sliced, single):
        torch.testing.assert_close(other.decode(latents), whole.decode(latents), rtol=0, atol=1e-5)
    default = family_checks.load(name, folders[name]).decode_batch
    assert default == (1 if name == "wan" else 64)


def test_tiling_is_switched_on(folders: dict[str, Path]) -> None:
    tiled = family_checks.load("sd3", folders["sd3"], vae_tiling=True)
    assert tiled.pipeline.vae.use_tiling
    vae = tiled.pipeline.vae
    vae.tile_latent_min_size, vae.tile_sample_min_size = 4, 32
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert tiled.decode(latents).shape == (1, 3, 64, 64)


@pytest.mark.parametrize("name", families.FAMILIES)
def test_bf16(name: str, tmp_path: Path) -> None:
    """Latents stay fp32, the network runs in bf16, its velocity is near that of fp32."""
    folder = families.save(name, tmp_path)
    # 1000 x 3.5 is none of bfloat16's numbers, 1000 x 4 is: see `velocity`.
    told = 4.0 if families.FAMILIES[name].embedded_guidance else None
    full = family_checks.load(name, folder, embedded_guidance=told)
    half = family_checks.load(name, folder, embedded_guidance=told, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half.pipeline.vae.dtype == torch.float32
    shape = half.latent_shape(*families.FAMILIES[name].size)
    with torch.no_grad():
        v, expected = (velocity(made, shape, name=name) for made in (half, full))
    assert v.dtype == torch.float32
    # A few layers, each rounding to 8 bits, of which the errors add up like random steps.
    assert (v - expected).norm() < 0.1 * expected.norm()
    assert half.decode(torch.zeros(1, *shape)).dtype == torch.float32


def test_what_is_kept_in_fp32_stays_so_in_the_engine(tmp_path: Path) -> None:
    """Wan keeps rotary tables, norms and its clock in fp32; DeepSpeed casts a network whole."""
    folder = families.save("wan", tmp_path / "wan")
    before = family_checks.load("wan", folder, dtype=torch.bfloat16)
    expected = {n: (p.dtype, p) for n, p in before.transformer.named_parameters()}
    tables = dict(before.transformer.named_buffers())
    assert {dtype for dtype, _ in expected.values()} == {torch.float32, torch.bfloat16}
    assert {table.dtype for table in tables.values()} == {torch.float32}
    given = family_checks.recipe("wan", folder, tmp_path / "run", model__dtype="bf16")
    trainer = Trainer(given)
    network = trainer.backbone.transformer
    for name, table in network.named_buffers():
        assert torch.equal(table, tables[name]), name
        assert table.dtype == torch.float32
    frozen = {n: p for n, p in network.named_parameters() if not p.requires_grad}
    assert len(frozen) == len(expected)
    for name, p in frozen.items():
        dtype, value = expected[name.replace(".base_layer", "")]
        assert p.dtype == dtype, name
        assert torch.equal(p, value), name
    # New adapters change nothing yet, so the engine's network still is the one that was loaded.
    shape = before.latent_shape(32, 32, 5)
    with torch.no_grad():
        assert torch.equal(velocity(trainer.backbone, shape), velocity(before, shape))
