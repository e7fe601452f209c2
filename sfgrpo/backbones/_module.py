"""A velocity network of one's own (a robot's policy, molecules) as a backbone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sfgrpo.backbones import _adapters, _weights
from sfgrpo.backbones.base import Conditioning, Modality, Negative
from sfgrpo.names import blaming, shortened

if TYPE_CHECKING:
    from sfgrpo.prompts import Prompt

AT_ONCE = 64
"""Prompts that `check` encodes at once."""
SAVED = "network.safetensors"


class Unexpected(ValueError):
    """Something of the user's own returned what its caller cannot use."""


class ModuleBackbone:
    """A plain module `network(x [B, *shape], t [B], condition [B, ...]) -> velocity [B, *shape]`.

    Convention: data at t = 0, noise at t = 1, velocity = noise - data. A model trained the other
    way round wants a wrapper that passes 1 - t and negates the result.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        shape: tuple[int, ...],
        encode: Callable[[Sequence[str]], Tensor],
        decode: Callable[[Tensor], Tensor] = lambda latents: latents,
        sigmas: Callable[[int], Tensor] = lambda steps: torch.linspace(
            1, 0, steps + 1, dtype=torch.float32, device="cpu"
        ),
        lora_targets: tuple[str, ...] = (),
        modality: Modality = "other",
        decode_batch: int = 1024,
    ) -> None:
        """Wrap `network`.

        Args:
            shape: of one sample, e.g. (16, 7) for sixteen actions of seven joints.
            encode: the lines of the prompt file -> one condition [P, ...] each ("" is the
                unconditional one, asked for under guidance alone).
            decode: samples -> what the rewards get.
            sigmas: number of steps -> times [steps + 1] descending from 1 to 0.
            lora_targets: names of linear layers; needed if the recipe's `lora` is not null.
            modality: what `decode` returns: "image" [B, 3, H, W], "video" [B, F, 3, H, W], "other".

        Raises:
            ValueError: `network` is no module, has no parameters, or a state that no checkpoint can
                hold; unknown `modality`.
        """
        if not isinstance(network, nn.Module):
            raise ValueError(f"the network is a {type(network).__name__}, not a torch.nn.Module")
        if next(network.parameters(), None) is None:
            raise ValueError(f"{type(network).__name__} has no parameters that could be trained")
        if modality not in get_args(Modality):
            raise ValueError(f"modality: got {modality!r}, expected one of {get_args(Modality)}")
        for name, value in network.state_dict().items():
            if not isinstance(value, Tensor):
                raise ValueError(
                    f"the network's state holds '{name}', a {type(value).__name__}: safetensors "
                    "keep tensors alone, so no checkpoint could be written; let get_extra_state "
                    "return one"
                )
        self.transformer, self.shape = network, shape
        self.lora_targets, self.modality = lora_targets, modality
        self.decode_batch = decode_batch
        self._encode, self._decode, self._sigmas = encode, decode, sigmas

    @property
    def device(self) -> torch.device:
        return next(self.transformer.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.transformer.parameters()).dtype

    def latent_shape(self, height: int, width: int, frames: int = 1) -> tuple[int, ...]:
        return self.shape

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Encode all prompts, and make a sample of the first, before a run begins.

        Raises:
            ValueError: names the file and line of the first prompt that cannot be encoded; the
                network, or `decode`, returns what its caller does not expect.
        """
        with torch.random.fork_rng(devices=[]), _evaluating(self.transformer), torch.no_grad():
            shape = _per_prompt(self._encoded(prompts[:1]))
            for first in range(0, len(prompts), AT_ONCE):
                self._check_encoded(prompts[first : first + AT_ONCE], prompts[0], shape)
            # Two rows, at levels of their own, so that what drops or mixes rows is seen.
            cond = self.encode([prompts[0].text] * 2)
            x = torch.zeros(2, *self.shape, device=self.device)
            t = torch.tensor([1.0, 0.5], device=self.device)
            given = f"x {[*x.shape]}, t [2] and a condition {[*cond.tokens.shape]}"
            with blaming(Unexpected, f"model.backbone: the network failed on {given}"):
                v = self.velocity(self.transformer, x, t, cond)
            with blaming(Unexpected, f"model.backbone: decode failed on {[*v.shape]}"):
                self.decode(v)

    def _check_encoded(
        self, prompts: Sequence[Prompt], known: Prompt, shape: tuple[int, ...]
    ) -> None:
        try:
            if _per_prompt(self._encoded(prompts)) == shape:
                return
        except ValueError:
            if len(prompts) == 1:
                raise
        for prompt in prompts:
            if (found := _per_prompt(self._encoded([prompt]))) != shape:
                raise ValueError(
                    f"{_place(prompt)}: model.backbone: encode makes a condition of shape "
                    f"{found} of it, and of shape {shape} of {_place(known)}"
                )
        self._encoded(prompts)  # what fails of them together alone

    def _encoded(self, prompts: Sequence[Prompt]) -> Conditioning:
        """The conditioning of prompts; a ValueError says where the first of them stands."""
        try:
            with blaming(Unexpected, "model.backbone: encode failed"):
                return self.encode([prompt.text for prompt in prompts])
        except ValueError as error:
            raise ValueError(f"{_place(prompts[0])}: {error}") from error

    def sigmas(self, num_steps: int, latent_shape: tuple[int, ...]) -> Tensor:
        found = self._sigmas(num_steps)
        _expect("sigmas", found, (num_steps + 1,))
        return found.float()

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        found = self._encode(prompts)
        _expect("encode", found, (len(prompts), ...))
        return Conditioning(tokens=found).to(self.device, self.dtype)

    def velocity(self, transformer: nn.Module, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        found = transformer(x.to(self.dtype), t.to(self.dtype), cond.tokens)
        _expect("the network", found, tuple(x.shape))
        return found.float()

    def guide(self, v: Tensor, v_uncond: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
        return v, v_uncond

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        found = self._decode(latents)
        rows = len(latents)
        _expect("decode", found, {
            "image": (rows, 3, None, None), "video": (rows, None, 3, None, None),
        }.get(self.modality, (rows, ...)))  # fmt: skip
        return found

    def save(self, folder: Path) -> None:
        """Write `network.safetensors`: all weights, or under LoRA the adapters alone, of full
        strength: a layer adds B A x."""
        if adapters := _adapters.of(self.transformer):
            state = _adapters.at_full_strength(*adapters)
        else:
            state = self.transformer.state_dict()
        folder.mkdir(parents=True, exist_ok=True)
        # Each name has a copy of its own: tied weights share memory, which safetensors refuse.
        copies = {
            name: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for name, value in state.items()
        }
        save_file(copies, folder / SAVED)

    def restore(self, folder: Path) -> None:
        _weights.restore(self.transformer, folder, parts={"": SAVED}, adapters=SAVED)


def _expect(who: str, found: Any, shape: tuple[Any, ...]) -> None:
    """Unexpected unless `found` is a tensor of `shape`: None is any size, a last ... any sizes."""
    text = ", ".join("..." if n is ... else "_" if n is None else str(n) for n in shape)
    if not isinstance(found, Tensor):
        got = type(found).__name__
        raise Unexpected(f"model.backbone: {who} returned a {got}, expected a tensor [{text}]")
    open_ended = shape[-1:] == (...,)
    wanted = shape[:-1] if open_ended else shape
    sizes = tuple(found.shape[: len(wanted)] if open_ended else found.shape)
    if len(sizes) != len(wanted) or any(
        w not in (None, n) for w, n in zip(wanted, sizes, strict=True)
    ):
        got = ", ".join(map(str, found.shape))
        raise Unexpected(f"model.backbone: {who} returned a tensor [{got}], expected [{text}]")


def _per_prompt(cond: Conditioning) -> tuple[int, ...]:
    """The shape of what one prompt is told: [L, C] may have any length L in another batch."""
    shape = tuple(cond.tokens.shape[1:])
    return shape if len(shape) < 2 else shape[1:]


def _place(prompt: Prompt) -> str:
    if isinstance(prompt.text, Negative):
        return f"the prompt that guidance leads away from, '{shortened(prompt.text)}'"
    return prompt.where or f"prompt '{shortened(prompt.text)}'"


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """The network as it is in evaluation, so that a batch norm counts nothing; then as it was."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
