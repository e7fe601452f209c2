"""Exported adapters act at their full strength on every reader, and a run can start from them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.trainer import family_checks
from sfgrpo.backbones import ModuleBackbone, _adapters, sd3
from sfgrpo.config import Lora
from sfgrpo.policy import add_lora, check_start
from sfgrpo.trainer import Trainer
from tests.support import families
from tests.support.families import PROMPTS

RANK, ALPHA = 4, 12
"""The scale 3 is no power of two, so that scaling twice or not at all is no rounding."""


def velocity(backbone: Any, network: nn.Module | None = None) -> Tensor:
    shape = backbone.latent_shape(32, 32, 5 if backbone.modality == "video" else 1)
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    cond = backbone.encode(PROMPTS[:2])
    with torch.no_grad():
        return backbone.velocity(
            network or backbone.transformer, x, torch.tensor([0.97, 0.25]), cond
        )


def adapted(backbone: Any, *, rank: int = RANK, alpha: int = ALPHA) -> Any:
    """The backbone with adapters of which no matrix is zero."""
    torch.manual_seed(0)
    add_lora(backbone.transformer, Lora(rank=rank, alpha=alpha), backbone.lora_targets)
    for name, parameter in backbone.transformer.named_parameters():
        if ".lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    return backbone


@pytest.fixture
def load(pipeline_folder: Path) -> Callable[[], Any]:
    return lambda: sd3.load(pipeline_folder, max_sequence_length=0)


def by_folder(stock: Any, folder: Path) -> nn.Module:
    stock.pipeline.load_lora_weights(str(folder))
    return stock.transformer


def by_state_dict(stock: Any, folder: Path) -> nn.Module:
    """As ComfyUI and kohya's tools read it, too: the weights, and nothing said beside them."""
    stock.pipeline.load_lora_weights(load_file(folder / _adapters.DIFFUSERS))
    return stock.transformer


def by_peft(stock: Any, folder: Path) -> nn.Module:
    return PeftModel.from_pretrained(stock.transformer, folder)


@pytest.mark.parametrize("read", [by_folder, by_state_dict, by_peft])
def test_every_reader_gives_them_their_strength(
    load: Callable[[], Any], tmp_path: Path, read: Callable[[Any, Path], nn.Module]
) -> None:
    trained, stock = adapted(load()), load()
    plain, expected = velocity(stock), velocity(trained)
    assert (expected - plain).norm() > 0.1 * plain.norm()
    trained.save(tmp_path)
    network = read(stock, tmp_path)
    torch.testing.assert_close(velocity(stock, network), expected, rtol=1e-4, atol=1e-5)


def as_is(folder: Path) -> Path:
    return folder


def file_of_peft(folder: Path) -> Path:
    return folder / _adapters.PEFT


def before_folding(folder: Path) -> Path:
    """As this package wrote them once, and peft does: alpha is said, B is not multiplied."""
    path = folder / _adapters.PEFT
    layers = load_file(path)
    save_file({k: v / 3 if ".lora_B." in k else v for k, v in layers.items()}, path)
    config = folder / _adapters.PEFT_CONFIG
    said = config.read_text()
    assert said.count(f'"lora_alpha": {RANK}') == 1
    config.write_text(said.replace(f'"lora_alpha": {RANK}', f'"lora_alpha": {ALPHA}'))
    return path


@pytest.mark.parametrize("given", [as_is, file_of_peft, before_folding])
@pytest.mark.parametrize("alpha", [ALPHA, 5])
def test_training_starts_at_their_velocity(
    load: Callable[[], Any], recipe: Any, tmp_path: Path, given: Callable[[Path], Path], alpha: int
) -> None:
    trained = adapted(load())
    trained.save(tmp_path / "export")
    path = given(tmp_path / "export")
    trainer = Trainer(
        recipe(tmp_path / "run", lora=f"{{rank: {RANK}, alpha: {alpha}, path: {path}}}")
    )
    found = velocity(trainer.backbone, trainer.engine.network)
    torch.testing.assert_close(found, velocity(trained), rtol=1e-4, atol=1e-5)
    with trainer.progress.averaged():  # what is evaluated and exported starts there, too
        assert torch.equal(velocity(trainer.backbone, trainer.engine.network), found)
    with trainer.policy.reference() as network:
        torch.testing.assert_close(velocity(trainer.backbone, network), velocity(load()))


def test_two_experts_have_a_folder_each(tmp_path: Path) -> None:
    folder = families.save("wan22", tmp_path / "wan22")
    trained = adapted(family_checks.load("wan22", folder))
    again = adapted(family_checks.load("wan22", folder), alpha=7)
    trained.save(tmp_path / "export")
    for part, below in (("high", ""), ("low", "transformer_2")):
        stored = load_file(tmp_path / "export" / below / _adapters.DIFFUSERS)
        layer = "blocks.0.attn1.to_q.lora_B"
        B = trained.transformer.get_submodule(f"{part}.{layer}.default").weight
        torch.testing.assert_close(stored[f"transformer.{layer}.weight"], ALPHA / RANK * B)
    _adapters.load(again.transformer, tmp_path / "export", rank=RANK, alpha=7)
    torch.testing.assert_close(velocity(again), velocity(trained), rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_said_in_one_line(load: Callable[[], Any], tmp_path: Path) -> None:
    backbone = adapted(load())
    backbone.save(tmp_path)
    file = tmp_path / _adapters.DIFFUSERS
    with pytest.raises(ValueError, match=rf"{file.name}' holds adapters of rank 4, lora.rank is 8"):
        check_start(Lora(rank=8, path=tmp_path))
    with pytest.raises(ValueError, match=r"lora.path: '/not/there' does not exist"):
        check_start(Lora(path=Path("/not/there")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty' holds neither pytorch_lora_weights.safetensors"):
        check_start(Lora(path=tmp_path / "empty"))
    check_start(None)
    few = load()
    add_lora(few.transformer, Lora(rank=RANK, targets=("attn.to_q",)), ())
    with pytest.raises(ValueError, match=r"has 'transformer_blocks.* and \d+ more, which is no ad"):
        _adapters.load(few.transformer, tmp_path, rank=RANK, alpha=1)
    layers = load_file(file)
    left = layers.popitem()[0].removeprefix("transformer.")
    save_file(layers, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=rf"other.safetensors' lacks '{left}', an adapter"):
        _adapters.load(backbone.transformer, tmp_path / "other.safetensors", rank=RANK, alpha=1)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=rf"lora.path: '.*{file.name}' cannot be read"):
        check_start(Lora(rank=RANK, path=file))
    config = tmp_path / _adapters.PEFT_CONFIG
    config.write_text(config.read_text().replace('"use_dora": false', '"use_dora": true'))
    with pytest.raises(ValueError, match=r"was made with use_dora"):
        _adapters.load(backbone.transformer, tmp_path / _adapters.PEFT, rank=RANK, alpha=1)


def test_what_is_written_is_the_same_in_every_process(
    load: Callable[[], Any], tmp_path: Path
) -> None:
    """peft keeps the names of layers in a set, whose order differs from process to process."""
    backbone = adapted(load())
    backbone.save(tmp_path)
    said = json.loads((tmp_path / _adapters.PEFT_CONFIG).read_text())["target_modules"]
    assert said == sorted(backbone.lora_targets)
    with safe_open(tmp_path / _adapters.DIFFUSERS, framework="pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert metadata["transformer.target_modules"] == said


def test_those_of_a_network_of_ones_own_add_b_a_x(tmp_path: Path) -> None:
    """And a run that starts from them is where the first one was."""

    def built() -> Any:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))
        return ModuleBackbone(
            network, shape=(3,), encode=lambda p: torch.zeros(len(p), 1), lora_targets=("0", "2")
        )

    first, again = (adapted(built(), rank=2, alpha=6) for _ in range(2))
    plain, x = built(), torch.randn(5, 3)
    first.save(tmp_path)
    file, expected = tmp_path / "network.safetensors", first.transformer(x)
    stored = load_file(file)
    with torch.no_grad():
        for layer in ("0", "2"):
            a, b = (stored[f"{layer}.lora_{part}.weight"] for part in "AB")
            plain.transformer.get_submodule(layer).weight += b @ a
    torch.testing.assert_close(plain.transformer(x), expected)
    with torch.no_grad():
        for value in get_peft_model_state_dict(again.transformer).values():
            value.zero_()
    _adapters.load(again.transformer, file, rank=2, alpha=6)
    torch.testing.assert_close(again.transformer(x), expected)


def test_a_rank_that_no_layer_has_is_refused() -> None:
    """A layer narrower than the rank, beside one that is not, is served."""
    network = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 99))
    add_lora(copy.deepcopy(network), Lora(rank=8, targets=("0", "1")), ())
    for targets in (("0", "1", "2"), ("2",)):
        with pytest.raises(ValueError, match=r"lora.rank: 9 is more than 8, .* 8 x \d+\): use at"):
            add_lora(network, Lora(rank=9, targets=targets), ())
    with pytest.raises(ValueError, match=r"more than 3, .* \('0', 3 x 8\): use at most 3, or"):
        add_lora(network, Lora(rank=4), ("0",))
    assert not any("lora" in name for name, _ in network.named_parameters())
