"""Which attention kernel a transformer runs, through diffusers' attention backends.

"auto" takes the first of `PREFERRED` for the device that is installed and serves the network.
Any other name of diffusers ("native", "xformers", "flash", "_flash_3", "sage", ...) is an explicit
choice: where it cannot serve training here, that is an error that says why. Whether one can is
found by a forward and a backward of a small attention with the network's own head size, dtype and
mask.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    attention_backend,
    dispatch_attention_fn,
)
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch import nn

from sfgrpo.backbones._joint_attention import DispatchedJointAttention
from sfgrpo.names import unknown_name

PREFERRED = {"cuda": ("flash", "xformers", "native")}
"""On other devices PyTorch's own attention is the only one that has a gradient."""
INSTALL = {
    "xformers": 'pip install ".[xformers]"',
    "flash": "pip install flash-attn --no-build-isolation",
    "sage": "pip install sageattention",
}
logger = logging.getLogger(__name__)


def choose(
    network: Any, name: str, *, masked: bool, device: torch.device | None = None,
    shared: bool = False,
) -> str:  # fmt: skip
    """Set the attention backend of `network`; returns its name.

    Args:
        network: a diffusers transformer, in the dtype it will run in.
        name: "auto" or one of diffusers' names.
        masked: whether the network hands padding masks to its attention.
        device: where it will run, None where its parameters are.
        shared: whether ranks are to share sequences (`sfgrpo.backbones._context`).

    Raises:
        ValueError: an unknown name, or a backend that cannot serve this network here.
    """
    known = [backend.value for backend in AttentionBackendName]
    if name != "auto" and name not in known:
        raise ValueError("model.attention: " + unknown_name("backend", name, ["auto", *known]))
    here = device or torch.device(next(network.parameters()).device)
    if here.type == "meta":  # sizes are being measured; nothing runs
        return name
    if name == "auto":
        name = _first(network, here, masked, shared)
        logger.info("attention of %s: %s", type(network).__name__, name)
    elif why := _refusal(network, name, here, masked, shared):
        raise ValueError(f"model.attention: '{name}' cannot serve this network here: {why}")
    _set(network, name)
    return name


def _first(network: nn.Module, device: torch.device, masked: bool, shared: bool) -> str:
    names = PREFERRED.get(device.type, ("native",))
    serving = (n for n in names[:-1] if _refusal(network, n, device, masked, shared) is None)
    return next(serving, names[-1])


@torch.enable_grad()
def _refusal(
    network: Any, name: str, device: torch.device, masked: bool, shared: bool
) -> str | None:
    """Why the backend cannot serve; None if it can."""
    registry = _AttentionBackendRegistry
    if shared and not registry._is_context_parallel_available(AttentionBackendName(name)):
        able = ", ".join(sorted(registry._supports_context_parallel))
        return f"diffusers has model.context_parallel for others alone: {able}"
    if name != "native" and not _dispatches(network):
        return f"the attention of {type(network).__name__} is PyTorch's own, whatever is chosen"
    shape = (2, 128, 2, _head_size(network))
    q, k, v = (
        torch.ones(shape, device=device, dtype=network.dtype, requires_grad=True) for _ in range(3)
    )
    mask = torch.ones(2, 1, 1, 128, dtype=torch.bool, device=device) if masked else None
    try:
        with attention_backend(name):
            out: Any = dispatch_attention_fn(q, k, v, attn_mask=mask)
        if not out.requires_grad:
            return "its result has no gradient, so it can sample but not train"
        out.sum().backward()
    except Exception as error:  # whatever a kernel library raises is the answer
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        remedy = INSTALL.get(name.split("_")[0])
        missing = remedy and ("missing" in reason or "install" in reason)
        return f"{reason} ({remedy})" if missing else reason
    if v.grad is None or not v.grad.isfinite().all():
        return "its gradient is missing or not finite"
    return None


def _head_size(network: Any) -> int:
    config = network.config
    if "attention_head_dim" in config:
        return config["attention_head_dim"]
    if "n_heads" in config:
        return config["dim"] // config["n_heads"]
    return config["hidden_size"] // config["num_attention_heads"]


def _dispatches(network: nn.Module) -> bool:
    """Whether a choice of backend changes anything: some layers call PyTorch's attention."""
    processors = (getattr(layer, "processor", None) for layer in network.modules())
    return any(
        hasattr(p, "_attention_backend") or isinstance(p, JointAttnProcessor2_0) for p in processors
    )


def _set(network: Any, name: str) -> None:
    for layer in network.modules() if name != "native" else ():
        if isinstance(getattr(layer, "processor", None), JointAttnProcessor2_0):
            layer.set_processor(DispatchedJointAttention())
    diffusers_logger = logging.getLogger("diffusers.models.modeling_utils")
    level = diffusers_logger.level
    diffusers_logger.setLevel(logging.ERROR)  # "experimental": what is chosen was just tried
    try:
        network.set_attention_backend(name)
    finally:
        diffusers_logger.setLevel(level)
        # It also makes the name the default of every other network of the process.
        _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)
