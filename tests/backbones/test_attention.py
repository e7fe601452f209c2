"""Attention backends: what is chosen, what is refused and why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

from sfgrpo.backbones import _attention, _joint_attention
from tests.support import families

Registry: Any = _AttentionBackendRegistry


def backends(network: Any) -> set[str | None]:
    """The backends that the network's attention layers will call."""
    found = (getattr(m, "processor", None) for m in network.modules())
    names = (getattr(processor, "_attention_backend", "") for processor in found if processor)
    return {getattr(name, "value", name) for name in names if name != ""}


@pytest.fixture
def network() -> Any:
    return families.images.flux().transformer


def test_auto_is_pytorch_on_a_cpu(network: Any) -> None:
    assert _attention.choose(network, "auto", masked=False) == "native"
    assert backends(network) == {"native"}
    assert _attention.choose(network, "_native_math", masked=True) == "_native_math"
    assert backends(network) == {"_native_math"}


def test_an_unknown_name_is_corrected(network: Any) -> None:
    with pytest.raises(ValueError, match=r"model.attention: unknown backend 'xformer'.*'xformers'"):
        _attention.choose(network, "xformer", masked=False)


@pytest.mark.parametrize("name", ["xformers", "flash", "sage"])
def test_what_is_not_installed_says_how_to_install_it(network: Any, name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' cannot serve this network here: .*pip install"):
        _attention.choose(network, name, masked=False)


def serve(monkeypatch: pytest.MonkeyPatch, function: Any) -> None:
    """Let `function` serve as diffusers' flash backend, as if its package were installed."""
    import diffusers.models.attention_dispatch as dispatch

    monkeypatch.setattr(dispatch, "_CAN_USE_FLASH_ATTN", True)
    name = AttentionBackendName.FLASH
    monkeypatch.setitem(Registry._backends, name, function)
    monkeypatch.setitem(Registry._constraints, name, [])
    arguments = {"query", "key", "value", "attn_mask"}
    monkeypatch.setitem(Registry._supported_arg_names, name, arguments)


def test_what_cannot_train_or_mask_is_refused(
    network: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward_only(query: Any, key: Any, value: Any, attn_mask: Any = None) -> torch.Tensor:
        return value.detach()

    serve(monkeypatch, forward_only)
    with pytest.raises(ValueError, match="no gradient, so it can sample but not train"):
        _attention.choose(network, "flash", masked=False)

    def without_masks(query: Any, key: Any, value: Any, attn_mask: Any = None) -> torch.Tensor:
        if attn_mask is not None:
            raise ValueError("`attn_mask` is not supported for flash-attn 2.")
        return value * 1

    serve(monkeypatch, without_masks)
    assert _attention.choose(network, "flash", masked=False) == "flash"
    with pytest.raises(ValueError, match="here: `attn_mask` is not supported"):
        _attention.choose(network, "flash", masked=True)
    # "auto" on a device that prefers it: taken where it serves, passed over where it does not.
    monkeypatch.setitem(_attention.PREFERRED, "cpu", ("flash", "xformers", "native"))
    assert _attention.choose(network, "auto", masked=False) == "flash"
    assert _attention.choose(network, "auto", masked=True) == "native"


@pytest.mark.parametrize("family", ["sd3", "flux2", "qwenimage", "wan", "zimage"])
def test_every_family_has_a_head_size(family: str) -> None:
    made = families.FAMILIES[family].build().transformer
    masked = family in ("qwenimage", "zimage")
    assert _attention.choose(made, "_native_math", masked=masked) == "_native_math"
    assert backends(made) == {"_native_math"}
    assert Registry.get_active_backend()[0] == AttentionBackendName.NATIVE


def test_attention_that_ignores_a_choice_is_no_choice() -> None:
    made = families.FAMILIES["lumina2"].build().transformer
    with pytest.raises(ValueError, match=r"'_native_math' cannot.*Lumina2Tr.*whatever is chosen"):
        _attention.choose(made, "_native_math", masked=True)
    for name in ("auto", "native"):
        assert _attention.choose(made, name, masked=True) == "native"


def test_dispatched_joint_attention_is_the_library_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stable Diffusion 3, with and without text in a layer: the same values, by our processor."""
    made = families.images.sd3().transformer
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(2, 4, 4, 4, generator=generator),
        "timestep": torch.tensor([900.0, 100.0]),
        "encoder_hidden_states": torch.randn(2, 7, 256, generator=generator),
        "pooled_projections": torch.randn(2, 128, generator=generator),
    }
    with torch.no_grad():
        (expected,) = made(**inputs, return_dict=False)
        _attention.choose(made, "_native_math", masked=False)
        (found,) = made(**inputs, return_dict=False)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    layers = [m.processor for m in made.modules() if hasattr(m, "processor")]
    assert len(layers) == 3
    assert all(isinstance(p, _joint_attention.DispatchedJointAttention) for p in layers)
    calls: list[int] = []

    def counting(query: Any, key: Any, value: Any, attn_mask: Any = None) -> torch.Tensor:
        calls.append(query.shape[1])
        return value * 1

    serve(monkeypatch, counting)
    _attention.choose(made, "flash", masked=False)
    calls.clear()
    made(**inputs, return_dict=False)
    assert sorted(calls) == [4, 11, 11]
