"""Wan 2.1 and 2.2, text to video (`wan_i2v` starts from an image).

Wan 2.2 A14B has two networks: one for t above a boundary, one for t below. Here they are one
module, `Experts`, which sends each row to its own; both are trained. Published folders come with
UniPC, a multistep solver; ours are Euler steps on a schedule with the same `flow_shift`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.pipelines.wan.pipeline_wan import WanPipeline
from torch import Tensor, nn

from sfgrpo.backbones import _adapters
from sfgrpo.backbones._video import VideoBackbone
from sfgrpo.backbones.base import Conditioning


class Experts(nn.Module):
    """Two networks of which each row of a batch runs one: `high` where its time is at least
    `boundary`, `low` below."""

    adapter_folders: ClassVar = {"high.": "", "low.": "transformer_2"}
    """Where each network's adapters lie in a folder of them, by the prefix of its layers' names,"""
    weight_folders: ClassVar = {"high.": "transformer", "low.": "transformer_2"}
    """and where its whole weights do."""

    def __init__(self, high: Any, low: Any, boundary: float) -> None:
        """`boundary` in [0, 1]."""
        super().__init__()
        self.high, self.low, self.boundary = high, low, boundary

    @property
    def config(self) -> Any:
        """The first network's configuration; both have the same shape."""
        return self.high.config

    @property
    def dtype(self) -> torch.dtype:
        return self.high.dtype

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **options: Any
    ) -> tuple[Tensor]:
        """As a WanTransformer3DModel, with timesteps [B] in [0, 1000]; (velocity [B, ...],)."""
        is_high = (timestep if timestep.ndim == 1 else timestep[:, 0]) >= 1000 * self.boundary
        result: Tensor | None = None
        for network, chosen in ((self.high, is_high), (self.low, ~is_high)):
            rows = chosen.nonzero().flatten()
            unused = len(rows) == 0
            if unused and not self._must_run(network):
                continue
            if unused:  # a row whose velocity is thrown away
                rows = torch.zeros(1, dtype=torch.int64, device=timestep.device)
            (part,) = network(
                hidden_states=hidden_states[rows], timestep=timestep[rows],
                encoder_hidden_states=encoder_hidden_states[rows], **options,
            )  # fmt: skip
            before = part.new_zeros(len(timestep), *part.shape[1:]) if result is None else result
            result = before.index_add(0, rows, part * 0 if unused else part)
        assert result is not None
        return (result,)

    @staticmethod
    def _must_run(network: nn.Module) -> bool:
        """Whether a network without rows has to run, too. Ranks average gradients, and at ZeRO
        stage 3 gather weights (empty until gathered), in step: all have to use the same."""
        return torch.is_grad_enabled() or any(p.numel() == 0 for p in network.parameters())

    def enable_gradient_checkpointing(self) -> None:
        for network in (self.high, self.low):
            network.enable_gradient_checkpointing()


class OneExpert(nn.Module):
    """Stands in for Wan 2.2's two networks where only sizes are known: rows are routed by their
    times, and what they cost does not depend on which network runs them. All rows run the first;
    in training the other runs the spare row that `Experts` gives a network without rows.
    """

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.experts = experts

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **options: Any
    ) -> tuple[Tensor]:
        """As `Experts`."""
        rows = (hidden_states, timestep, encoder_hidden_states)
        index = torch.arange(len(hidden_states), device=hidden_states.device)
        (part,) = self.experts.high(*(row[index] for row in rows), **options)
        result = torch.zeros_like(part).index_add(0, index, part)
        if torch.is_grad_enabled():
            (spare,) = self.experts.low(*(row[index[:1]] for row in rows), **options)
            result = result.index_add(0, index[:1], spare * 0)
        return (result,)


class WanBackbone(VideoBackbone):
    """A WanPipeline."""

    pipeline_classes = (WanPipeline,)
    lora_targets = (
        "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0",
        "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0",
        "ffn.net.0.proj", "ffn.net.2",
    )  # fmt: skip
    whole_sequences = ""
    default_length = 512
    """UMT5 tokens; the network was trained with so many, zeros after the prompt."""

    def _prepare(self) -> None:
        super()._prepare()
        pipeline = self.pipeline
        self._network: nn.Module = pipeline.transformer
        if pipeline.config.get("boundary_ratio") is not None:
            high, low = pipeline.transformer, pipeline.transformer_2
            if high is None or low is None:
                raise ValueError(
                    "model.path: the pipeline has a boundary_ratio, so it needs both 'transformer' "
                    "and 'transformer_2'"
                )
            self._network = Experts(high, low, pipeline.config.boundary_ratio)

    @property
    def transformer(self) -> nn.Module:
        return self._network

    def _networks(self) -> list[Any]:
        found = (self.pipeline.transformer, self.pipeline.transformer_2)
        return [network for network in found if network is not None]

    def velocity(self, transformer: nn.Module, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        times = self._times(t)
        if self.expands_times:
            times = times[:, None].expand(-1, self._tokens(x))
        (velocity,) = transformer(
            hidden_states=x.to(self.dtype), timestep=times, encoder_hidden_states=cond.tokens,
            return_dict=False,
        )  # fmt: skip
        return velocity.float()

    def _times(self, t: Tensor) -> Tensor:
        return t.float() * self.pipeline.scheduler.config.num_train_timesteps

    @property
    def expands_times(self) -> bool:
        """Whether the network reads a time per token, as Wan 2.2 TI2V does, since an image given as
        the start has none."""
        return bool(self.pipeline.config.get("expand_timesteps"))

    def _tokens(self, x: Tensor) -> int:
        """How many the network sees of latents [B, C, F, h, w]."""
        p = self.pipeline.transformer.config.patch_size
        return x.shape[2] // p[0] * (x.shape[3] // p[1]) * (x.shape[4] // p[2])

    def sequences(self, latent_shape: tuple[int, ...]) -> Mapping[str, int]:
        return {"tokens": self._tokens(torch.empty(1, *latent_shape, device="meta"))}

    def _decode(self, latents: Tensor) -> Tensor:
        videos = self.pipeline.vae.decode(self._unnormalised(latents), return_dict=False)[0]
        return videos.transpose(1, 2)

    def save(self, folder: Path) -> None:
        """As every family's; the second network's adapters go to `transformer_2/`, for
        `load_lora_weights(folder / "transformer_2", load_into_transformer_2=True)`."""
        network = self._network
        if not isinstance(network, Experts):
            super().save(folder)
            return
        layers, config = _adapters.of(network) or (network.state_dict(), None)
        for prefix, name in Experts.weight_folders.items():
            mine = {
                key.removeprefix(prefix): value
                for key, value in layers.items()
                if key.startswith(prefix)
            }
            if config is None:
                _save_weights(network.get_submodule(prefix[:-1]), mine, folder / name)
                continue
            place = folder / Experts.adapter_folders[prefix]
            _adapters.save(self.pipeline, place, mine, config)

    def for_sizes(self) -> nn.Module:
        network = self._network
        return OneExpert(network) if isinstance(network, Experts) else network

    def blank(self, prompts: int) -> Conditioning:
        config, length = self.pipeline.transformer.config, self.max_sequence_length
        return Conditioning(tokens=torch.zeros(prompts, length, config.text_dim, dtype=self.dtype))


def _save_weights(network: Any, state: dict[str, Tensor], folder: Path) -> None:
    """`save_pretrained` of a network whose weights were collected by the module around it (at ZeRO
    stage 3 they are whole in that module's state alone)."""
    hook = network.register_state_dict_post_hook(
        lambda module, found, prefix, metadata: found.update(
            {prefix + name: value for name, value in state.items()}
        )
    )
    try:
        network.save_pretrained(folder)
    finally:
        hook.remove()


load = WanBackbone.load
