"""What a recipe's network needs, measured without weights and without memory.

The recipe's own backbone is built on PyTorch's meta device (`skeleton`) and run there: every
operator computes shapes alone. A ledger of live storages sees the same allocations and releases as
in a real run, so a peak is that of the very classes, checkpointing and adapters included; on a CPU
it is the real one to the byte. Text encoders run under `FakeTensorMode`, since transformers asks
tensors for their values unless it knows that there are none.

Assumed: prompts as long as `model.max_sequence_length` allows, and attention that keeps its output
and one number a row, as flash and memory-efficient kernels do (meta tensors would take PyTorch's
"math" fallback, which keeps every score). GPU kernels may want workspaces of their own that no
ledger sees.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from sfgrpo import offload
from sfgrpo.backbones._pipeline import PipelineBackbone
from sfgrpo.config import Recipe
from sfgrpo.doctor import sharing
from sfgrpo.doctor.memory import Network, Work
from sfgrpo.doctor.shapes import Shapes
from sfgrpo.doctor.skeleton import embed, fake, skeleton
from sfgrpo.layout import Layout
from sfgrpo.loss import Rows, policy_loss
from sfgrpo.rollout import VelocityField

__all__ = ["Ledger", "counts", "fake", "flops", "measure", "skeleton"]


class Ledger(TorchDispatchMode):
    """Counts the bytes of storages that are alive, from when it first sees them."""

    def __init__(self, *, meta: bool = False) -> None:
        """`meta`: whether tensors of the meta device count, which have a size and no memory."""
        super().__init__()
        self.meta = meta
        self.live: dict[int, int] = {}
        self.now = self.peak = 0
        self._shapes = Shapes()

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage, once, until it is freed."""
        storage = tensor.untyped_storage()
        if storage._cdata in self.live or (tensor.device.type == "meta" and not self.meta):
            return
        self.live[storage._cdata] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, storage._cdata)

    def add_all(self, *networks: nn.Module) -> None:
        """Count their parameters and buffers."""
        for network in networks:
            for tensor in (*network.parameters(), *network.buffers()):
                self.add(tensor)

    def _drop(self, storage: int) -> None:
        self.now -= self.live.pop(storage, 0)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = self._shapes(func, args, kwargs or {})
        for value in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(value, Tensor):
                self.add(value)
        return result

    @contextmanager
    def above(self, found: dict[str, int], name: str) -> Iterator[None]:
        """Write to `found[name]` the peak within the context above what was held on entry."""
        self.peak = start = self.now
        yield
        found[name] = self.peak - start


class _Attention(torch.autograd.Function):
    """What flash attention allocates."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, result, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return result

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor, ...]:
        q, k, v, _, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    return _Attention.apply(query, key, value)  # pyright: ignore[reportReturnType]


def bytes_of(network: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))


def counts(network: nn.Module) -> Network:
    """Element counts of a network prepared for training."""
    trained = [p.numel() for p in network.parameters() if p.requires_grad]
    sizes = [p.numel() for p in network.parameters()]
    elements = sum(sizes)
    width = min(p.element_size() for p in network.parameters())
    return Network(
        elements=elements,
        trained=sum(trained),
        largest=max(trained, default=0),
        widest=max(sizes),
        extra=bytes_of(network) - width * elements,
    )


def measure(
    recipe: Recipe, world: int, checkpointing: Sequence[bool] = (False, True)
) -> tuple[Network, list[Work]]:
    """Element counts, and the work of one rank for each of `checkpointing`, False before True: how
    long it takes depends on the number of layers, a few seconds for each.

    Raises:
        NoPipeline: the backbone is one of the user's own.
        OSError: the model's configuration files are not at hand.
        ValueError: the recipe does not fit the model, or the number of ranks.
    """
    backbone = skeleton(recipe)
    groups = sharing.groups(recipe, backbone, world)
    shape = backbone.latent_shape(*recipe.model.size)
    layout = Layout(
        recipe, backbone.sigmas(recipe.sample.num_steps, shape),
        rank=0, world=groups, device=torch.device("cpu"),
    )  # fmt: skip
    network = counts(backbone.transformer)
    decoders = [getattr(backbone.pipeline, name) for name in backbone.decoders]
    text, embedding = sum(map(bytes_of, backbone.encoders())), _embedding(recipe, backbone)
    cached = recipe.model.prompt_cache is not None
    resident = recipe.model.text_encoders == "resident" and not cached
    waiting = recipe.model.text_encoders == "offload" and not cached
    size, peaks = min(recipe.train.micro_batch_size, layout.rows_per_update), []
    found: dict[str, int] = {}
    flash = mock.patch.object(F, "scaled_dot_product_attention", _attention)
    share = sharing.alone(backbone.transformer, recipe.model.context_parallel)
    with flash, share, torch.device("meta"), Ledger(meta=True) as ledger:
        ledger.add_all(backbone.transformer, *decoders)
        with torch.no_grad(), ledger.above(found, "images"):
            backbone.prepare_blank()
        work = _forwards(recipe, backbone, ledger, shape, groups, layout.local)
        for asked in checkpointing:
            if asked:
                backbone.transformer.enable_gradient_checkpointing()  # pyright: ignore[reportCallIssue]
            peaks.append(_backward(recipe, backbone, ledger, size, checkpointing=asked))
    work = replace(
        work, others=sum(map(bytes_of, decoders)) + (text if resident else 0), encoders=text,
        embedding=max(embedding, found["images"]) + (0 if resident else text), embeds_alone=cached,
        waiting=text if waiting else 0,
    )  # fmt: skip
    return network, [replace(work, backward=peak, offloaded=host) for peak, host in peaks]


def flops(recipe: Recipe, backbone: PipelineBackbone) -> tuple[int, int]:
    """Floating-point operations of one network row without gradient, and of decoding one sample:
    of matrix products, convolutions and attention, two for each product and its sum.

    With attention as PyTorch's own fallback computes it, whose operations are counted.
    """
    with torch.device("meta"), torch.no_grad():
        latent, t, prompt = _rows(backbone.latent_shape(*recipe.model.size), 1)
        # Without guidance: under it a velocity is two rows.
        field = replace(_field(recipe, backbone, 1), unconditional=None)
        with FlopCounterMode(display=False) as network:
            field(latent, t, prompt)
        with FlopCounterMode(display=False) as decoder:
            backbone.decode(latent)
    return network.get_total_flops(), decoder.get_total_flops()


def _field(recipe: Recipe, backbone: PipelineBackbone, prompts: int) -> VelocityField:
    guided = recipe.sample.guidance_scale != 1
    negatives = prompts if backbone.takes_images[-1] else 1
    return VelocityField(
        backbone=backbone, network=backbone.for_sizes(), conditioning=backbone.blank(prompts),
        unconditional=backbone.blank(negatives) if guided else None,
        guidance=recipe.sample.guidance_scale, batch_size=recipe.sample.batch_size,
    )  # fmt: skip


def _rows(shape: tuple[int, ...], size: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros(size, *shape), torch.zeros(size), torch.zeros(size, dtype=torch.int64)


def _embedding(recipe: Recipe, backbone: PipelineBackbone) -> int:
    """Peak of embedding a few prompts, above the text encoders' weights."""
    found: dict[str, int] = {}
    asked = max(recipe.sample.prompts_per_iteration, recipe.eval.prompts)
    most = backbone.encode_batch
    # A cache is filled with all prompts of the run, so many at a time.
    prompts = most if recipe.model.prompt_cache else min(asked, most)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake(mode, backbone.encoders())
    with mode, Ledger() as ledger:
        ledger.add_all(*backbone.encoders())
        for index, encoder in enumerate(backbone.encoders()):
            with ledger.above(found, str(index)):
                embed(backbone, encoder, prompts)
    return max(found.values(), default=0)


def _forwards(
    recipe: Recipe, backbone: PipelineBackbone, ledger: Ledger, shape: tuple[int, ...], groups: int,
    trajectories: int,
) -> Work:  # fmt: skip
    """What an iteration keeps, and the peaks of its phases without gradients."""
    s, sampling, decoding = recipe.sample, list[int](), list[int]()
    before = ledger.now
    field = _field(recipe, backbone, s.prompts_per_iteration)
    embeddings = ledger.now - before
    shown = -(-recipe.eval.prompts * recipe.eval.images_per_prompt // groups)
    asked = {shape: trajectories * (s.num_steps + 1)}
    evaluated = backbone.latent_shape(*recipe.eval_size)
    asked[evaluated] = max(asked.get(evaluated, 0), shown)
    for made, wanted in asked.items():
        rows = min(s.batch_size, wanted)
        with torch.no_grad():
            with ledger.above(found := {}, "sampling"):
                field(*_rows(made, rows))
            with ledger.above(found, "decoding"):
                latents, _, _ = _rows(made, min(rows, backbone.decode_batch))
                backbone.decode(latents)
        sampling.append(found["sampling"])
        decoding.append(found["decoding"])
    latent = math.prod(shape) * 4
    # Stored states, and clean estimates of as many at most, both in room that is made once.
    kept = trajectories * (2 * s.num_steps + 2) * latent
    return Work(rollout=kept + embeddings, sampling=max(sampling), decoding=max(decoding))


class _Elsewhere(saved_tensors_hooks):
    """Keeps tensors that have no values, as PyTorch's `save_on_cpu` keeps those that have."""

    def __init__(self) -> None:
        self.bytes = 0

        def pack(tensor: Tensor) -> Any:
            self.bytes += tensor.nbytes
            return tensor.shape, tensor.dtype

        super().__init__(pack, lambda kept: torch.empty(kept[0], dtype=kept[1], device="meta"))


def _backward(
    recipe: Recipe, backbone: PipelineBackbone, ledger: Ledger, size: int, *,
    checkpointing: bool = False,
) -> tuple[int, int]:  # fmt: skip
    """Peak of one micro-batch, its gradients taken away one by one (they are counted apart), and
    what waits in main memory beside it."""
    train, found, host = recipe.train, {}, _Elsewhere()
    hooks = [
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        for p in backbone.transformer.parameters()
        if p.requires_grad
    ]
    field = _field(recipe, backbone, 1)
    with ledger.above(found, "backward"):
        x, t, prompt = _rows(backbone.latent_shape(*recipe.model.size), size)
        v_ref = None
        if train.beta:
            with torch.no_grad():
                v_ref = field.guided(*field(x, t, prompt))
        with offload.activations(train.offload_activations if checkpointing else "none", host):
            v, v_uncond = field(x, t, prompt)
        rows = Rows(
            x=x, x_next=torch.zeros_like(x), coef=torch.zeros(len(x), 4), kl_scale=t, weight=t,
            logp_sampling=t, advantage=t, prompt=prompt, step=prompt,
        )  # fmt: skip
        policy_loss(
            rows, v, v_uncond, v_ref, logp_old=None, guidance=field.guidance,
            clip_range=train.clip_range, beta=train.beta, scale=1.0,
        ).loss.backward()  # fmt: skip
    for hook in hooks:
        hook.remove()
    return found["backward"], host.bytes
