"""What a recipe's network needs, measured without weights and without memory.

The recipe's own backbone is built on PyTorch's meta device and run under `FakeTensorMode`: every
operator computes shapes alone. A ledger of live storages sees the same allocations and releases as
in a real run, so a peak is that of the very classes, checkpointing and adapters included; on a CPU
it is the real one to the byte. GPU kernels may want workspaces of their own that no ledger sees.
"""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sfgrpo import backbones
from sfgrpo.backbones.base import Backbone
from sfgrpo.config import Recipe
from sfgrpo.layout import Layout
from sfgrpo.loss import Rows, policy_loss
from sfgrpo.memory import Dtype, Network, Work
from sfgrpo.rollout import VelocityField

DTYPES: dict[Dtype, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
DECODED = 64
"""Images that a backbone decodes at once."""


class Ledger(TorchDispatchMode):
    """Counts the bytes of storages that are alive, from when it first sees them."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.now = self.peak = 0

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage, once, until it is freed."""
        storage = tensor.untyped_storage()
        if tensor.device.type == "meta" or storage._cdata in self.live:
            return
        self.live[storage._cdata] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, storage._cdata)

    def _drop(self, storage: int) -> None:
        self.now -= self.live.pop(storage, 0)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self.add(value)
        return result

    @contextmanager
    def above(self, found: dict[str, int], name: str) -> Iterator[None]:
        """Write to `found[name]` the peak within the context above what was held on entry."""
        self.peak = start = self.now
        yield
        found[name] = self.peak - start


def modules(recipe: Recipe, folder: str) -> dict[str, nn.Module]:
    """The pipeline's networks on the meta device, in the recipe's dtype."""
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    from diffusers.utils import logging

    logging.disable_progress_bar()
    index = DiffusionPipeline.load_config(folder)
    assert isinstance(index, dict)
    found = {}
    with torch.device("meta"):
        for name, entry in index.items():
            if not isinstance(entry, (list, tuple)) or None in entry:
                continue
            made: Any = getattr(importlib.import_module(entry[0]), entry[1])
            if not issubclass(made, nn.Module):
                continue
            found[name] = _from_config(made, folder, name).to(dtype=DTYPES[recipe.model.dtype])
    return found


def _from_config(made: Any, folder: str, name: str) -> nn.Module:
    """A network of diffusers or transformers, as its configuration describes it."""
    if hasattr(made, "load_config"):
        return made.from_config(made.load_config(folder, subfolder=name))
    return made(made.config_class.from_pretrained(folder, subfolder=name))


def skeleton(recipe: Recipe) -> tuple[Backbone, list[nn.Module]]:
    """The recipe's backbone without weights, prepared for training, and its networks."""
    from sfgrpo.backbones import sd3

    path = recipe.model.path
    parts = modules(recipe, str(sd3.EMBEDDED) if path == "embedded" else path)
    backbone = backbones.load(
        recipe.model.backbone, path, device="meta", dtype=DTYPES[recipe.model.dtype],
        max_sequence_length=recipe.model.max_sequence_length, **parts,
    )  # fmt: skip
    network = backbone.transformer.train()
    network.requires_grad_(recipe.lora is None)
    if recipe.lora:
        from peft import LoraConfig

        config = LoraConfig(
            r=recipe.lora.rank, lora_alpha=recipe.lora.alpha, init_lora_weights="gaussian",
            target_modules=list(backbone.lora_targets),
        )  # fmt: skip
        with torch.device("meta"):
            network.add_adapter(config)  # pyright: ignore[reportCallIssue]
    return backbone, list(parts.values())


def counts(network: nn.Module) -> Network:
    """Element counts of a network prepared for training."""
    trained = [p.numel() for p in network.parameters() if p.requires_grad]
    return Network(
        elements=sum(p.numel() for p in network.parameters()),
        trained=sum(trained),
        largest=max(trained, default=0),
    )


def fake(mode: FakeTensorMode, networks: Iterable[nn.Module]) -> None:
    """Replace meta parameters and buffers by fake ones, which claim to lie on the CPU."""
    made: dict[int, tuple[Tensor, Tensor]] = {}

    def change(value: Tensor) -> Tensor:
        if id(value) not in made:  # tied weights stay tied
            bare = FakeTensor(mode, value.detach().to("meta"), torch.device("cpu"))
            is_parameter = isinstance(value, nn.Parameter)
            new = nn.Parameter(bare, requires_grad=value.requires_grad) if is_parameter else bare
            made[id(value)] = (new, value)
        return made[id(value)][0]

    for network in networks:
        for module in network.modules():
            for store in (module._parameters, module._buffers):
                present = {name: value for name, value in store.items() if value is not None}
                store.update({name: change(value) for name, value in present.items()})  # pyright: ignore[reportCallIssue, reportArgumentType]


def measure(recipe: Recipe, world: int) -> tuple[Network, Work, Work]:
    """Element counts, and the work of one rank without and with gradient checkpointing.

    Raises:
        OSError: the model's configuration files are not at hand.
        ValueError: the recipe does not fit the model, or the number of ranks.
    """
    backbone, parts = skeleton(recipe)
    layout = Layout(
        recipe, backbone.sigmas(recipe.sample.num_steps),
        rank=0, world=world, device=torch.device("cpu"),
    )  # fmt: skip
    network = counts(backbone.transformer)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake(mode, parts)
    with mode, Ledger() as ledger:
        for part in parts:
            for tensor in (*part.parameters(), *part.buffers()):
                ledger.add(tensor)
        work = _forwards(recipe, backbone, ledger, layout.local)
        size = min(recipe.train.micro_batch_size, layout.rows_per_update)
        plain = _backward(recipe, backbone, ledger, size)
        backbone.transformer.enable_gradient_checkpointing()  # pyright: ignore[reportCallIssue]
        checkpointed = _backward(recipe, backbone, ledger, size)
    bytes_of = {id(p): sum(t.nbytes for t in (*p.parameters(), *p.buffers())) for p in parts}
    others = sum(bytes_of.values()) - bytes_of[id(backbone.transformer)]
    work = replace(work, others=others)
    return network, replace(work, backward=plain), replace(work, backward=checkpointed)


def _field(recipe: Recipe, backbone: Backbone, prompts: int) -> VelocityField:
    guided = recipe.sample.guidance_scale != 1
    return VelocityField(
        backbone=backbone, network=backbone.transformer,
        conditioning=backbone.encode(["a"] * prompts),
        unconditional=backbone.encode([""] * prompts) if guided else None,
        guidance=recipe.sample.guidance_scale, batch_size=recipe.sample.batch_size,
    )  # fmt: skip


def _rows(recipe: Recipe, backbone: Backbone, size: int) -> tuple[Tensor, Tensor, Tensor]:
    shape = backbone.latent_shape(*(recipe.model.resolution,) * 2)
    return torch.zeros(size, *shape), torch.zeros(size), torch.zeros(size, dtype=torch.int64)


def _forwards(recipe: Recipe, backbone: Backbone, ledger: Ledger, trajectories: int) -> Work:
    """What an iteration keeps, and the peaks of its phases without gradients."""
    s, found = recipe.sample, {}
    with ledger.above(found, "encode"):
        before = ledger.now
        field = _field(recipe, backbone, s.prompts_per_iteration)
        embeddings = ledger.now - before
    rows = min(s.batch_size, 2 * trajectories)
    with torch.no_grad():
        with ledger.above(found, "sampling"):
            field(*_rows(recipe, backbone, rows))
        with ledger.above(found, "decoding"):
            latents, _, _ = _rows(recipe, backbone, min(rows, DECODED))
            backbone.decode(latents)
    latent = latents[0].numel() * 4
    # Stored states, and the states from which clean estimates continue; stacking doubles both.
    kept = trajectories * (2 * s.num_steps + 2) * latent
    return Work(
        rollout=kept + embeddings,
        sampling=max(found["sampling"], kept, found["encode"] - embeddings),
        decoding=found["decoding"],
    )


def _backward(recipe: Recipe, backbone: Backbone, ledger: Ledger, size: int) -> int:
    """Peak of one micro-batch, its gradients taken away one by one (they are counted apart)."""
    train, found = recipe.train, {}
    network = backbone.transformer
    hooks = [
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        for p in network.parameters()
        if p.requires_grad
    ]
    field = _field(recipe, backbone, 1)
    with ledger.above(found, "backward"):
        x, t, prompt = _rows(recipe, backbone, size)
        v, v_uncond = field(x, t, prompt)
        v_ref = None
        if train.beta:
            with torch.no_grad():
                v_ref = field.guided(*field(x, t, prompt))
        rows = Rows(
            x=x, x_next=torch.zeros_like(x), coef=torch.zeros(len(x), 4), kl_scale=t, weight=t,
            logp_old=t, advantage=t, prompt=prompt, step=prompt,
        )  # fmt: skip
        policy_loss(
            rows, v, v_uncond, v_ref, guidance=field.guidance, clip_range=train.clip_range,
            beta=train.beta, scale=1.0,
        ).loss.backward()  # fmt: skip
    for hook in hooks:
        hook.remove()
    return found["backward"]
