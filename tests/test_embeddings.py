"""The prompt cache: the same conditioning, from files, without text encoders."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.trainer import family_checks
from sfgrpo import embeddings
from sfgrpo.backbones.base import Conditioning, Negative
from sfgrpo.prompts import Prompt, images
from sfgrpo.run import records
from tests.support import families
from tests.support.families import PROMPTS, parts

CPU = torch.device("cpu")
CACHED = ["sd3", "flux", "flux2", "qwenimage", "wan22", "zimage", "qwenimage-edit"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("families")
    return {name: families.save(name, place / name) for name in CACHED}


def logs(folder: Path) -> list[dict[str, Any]]:
    return [*records.read(folder / "metrics.jsonl"), *records.read(folder / "eval.jsonl")]


@pytest.mark.slow
@pytest.mark.parametrize("name", CACHED)
def test_a_cached_run_is_the_run(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Every family: no text encoder is loaded, and the logs are those of a run with them."""
    cache = {"model__prompt_cache": str(tmp_path / "cache")}
    family_checks.train(name, folders[name], tmp_path / "plain")
    cached, _ = family_checks.train(name, folders[name], tmp_path / "cached", **cache)
    assert cached.backbone.encoders() == []
    with pytest.raises(RuntimeError, match="were not loaded"):
        cached.backbone.encode(PROMPTS)
    for one, two in zip(logs(tmp_path / "plain"), logs(tmp_path / "cached"), strict=True):
        assert one.keys() == two.keys()
        for number in one:  # embedded in other batches, so rounded otherwise
            if "drift" in number:  # itself a measure of rounding
                continue
            assert two[number] == pytest.approx(one[number], rel=1e-2, abs=1e-5), number
    files = list((tmp_path / "cache").rglob("*.safetensors"))
    family = families.FAMILIES[name]
    negatives = (len(PROMPTS) if family.images else 1) if family.guided else 0
    assert len(files) == len(PROMPTS) + negatives


@pytest.mark.slow
def test_a_second_run_loads_no_text_encoder(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"model__prompt_cache": str(tmp_path / "cache")}
    family_checks.train("flux", folders["flux"], tmp_path / "first", **changes)
    asked: list[str] = []
    load = embeddings.backbones.load

    def spy(*arguments: Any, **options: Any) -> Any:
        asked.append(options["text_encoders"])
        return load(*arguments, **options)

    monkeypatch.setattr(embeddings.backbones, "load", spy)
    family_checks.train("flux", folders["flux"], tmp_path / "second", **changes)
    assert asked == ["absent"]
    assert logs(tmp_path / "first") == logs(tmp_path / "second")


def key(folder: Path, tmp_path: Path, name: str = "flux", **changes: str) -> Path:
    given = {"model__prompt_cache": str(tmp_path / "cache"), **changes}
    cache = embeddings.open_cache(family_checks.recipe(name, folder, tmp_path / "r", **given))
    assert cache is not None
    return cache.folder


def test_the_key_follows_what_decides_the_embedding(tmp_path: Path) -> None:
    folder = families.save("flux", tmp_path / "flux")
    first = key(folder, tmp_path)
    assert key(folder, tmp_path, train__learning_rate="1e-5") == first
    assert key(folder, tmp_path, model__max_sequence_length="25") != first
    assert key(folder, tmp_path, model__dtype="bf16") != first
    moved = tmp_path / "moved"
    folder.rename(moved)
    assert key(moved, tmp_path) == first  # content, not place
    network = moved / "transformer" / "diffusion_pytorch_model.safetensors"
    network.write_bytes(network.read_bytes()[:-1] + b"\1")
    assert key(moved, tmp_path) == first  # the network does not embed
    weights = moved / "text_encoder_2" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    assert key(moved, tmp_path) != first


def test_the_key_of_images_follows_what_prepares_them(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    of_texts = key(folders["flux"], tmp_path)
    assert key(folders["flux"], tmp_path, model__resolution="64") == of_texts
    folder = families.save("flux-kontext", tmp_path / "model")
    first = key(folder, tmp_path, "flux-kontext")
    for option in ("resolution", "image_resolution"):
        assert key(folder, tmp_path, "flux-kontext", **{f"model__{option}": "64"}) != first
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    assert key(folder, tmp_path, "flux-kontext") != first


def test_a_prompt_is_its_text_and_what_its_images_hold(tmp_path: Path) -> None:
    cache = embeddings.Cache(tmp_path, "k" * 64)
    sources = [parts.picture(seed) for seed in (0, 1)]
    file = tmp_path / "a.png"
    images.opened(sources[0]).save(file)
    inline = images.inline({"bytes": file.read_bytes(), "path": None})
    kinds = [(), (str(file),), (sources[1],), (str(file), sources[1]), (sources[1], str(file))]
    texts = ("a", "b", Negative("a"))  # which some families read in another way
    asked = [Prompt(text, {}, images=kind) for text in texts for kind in kinds]
    assert len({cache.path(prompt) for prompt in asked}) == len(asked)
    assert cache.path(Prompt("a", {}, images=(inline,))) == cache.path(asked[1])
    assert cache.path(asked[0]).stem == hashlib.sha256(b"a").hexdigest()  # as without images
    made = Conditioning(tokens=torch.ones(1, 2, 3), extra={"image": torch.rand(1, 4, 5, 5)})
    cache.write(asked[1:2], made)
    assert cache.missing(asked[:3]) == [asked[0], asked[2]]
    assert torch.equal(cache.read(asked[1:2], device=CPU).extra["image"], made.extra["image"])


def test_files_appear_whole_and_damaged_ones_are_named(tmp_path: Path) -> None:
    cache = embeddings.Cache(tmp_path, "k" * 64)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    tokens = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    made = Conditioning(tokens=tokens, pooled=torch.ones(2, 5), mask=mask)
    a, b, c = (Prompt(text, {}) for text in "abc")
    cache.write([a, b], made)
    assert cache.missing([b, c, a, c]) == [c]
    read = cache.read([b, a, b], device=CPU)
    assert read.mask is not None
    assert read.mask.tolist() == [[True] * 3, [True, True, False], [True] * 3]
    assert torch.equal(read.tokens[0], tokens[1])
    assert torch.equal(read.tokens[1, :2], tokens[0, :2])
    assert cache.read([a], device=CPU).mask is None
    path = cache.path(a)
    path.write_bytes(path.read_bytes()[: os.path.getsize(path) // 2])
    with pytest.raises(ValueError, match=rf"{path.name}' is damaged .*delete it"):
        cache.read([a], device=CPU)
    assert {p.suffix for p in cache.folder.iterdir()} == {".safetensors"}


@pytest.mark.slow
def test_text_encoders_wait_in_main_memory(folders: dict[str, Path], tmp_path: Path) -> None:
    trainer, _ = family_checks.train(
        "wan22", folders["wan22"], tmp_path / "r", model__text_encoders="offload"
    )
    assert trainer.backbone.text_encoders == "offload"
    family_checks.train("wan22", folders["wan22"], tmp_path / "s")
    assert logs(tmp_path / "r") == logs(tmp_path / "s")


def test_own_backbones_have_no_cache(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="prompt_cache: only backbones of this package"):
        family_checks.recipe(
            "flux", tmp_path, tmp_path / "r",
            model__backbone="my.module:load", model__prompt_cache="x",
        )  # fmt: skip
