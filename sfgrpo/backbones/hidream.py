"""HiDream-I1.

The network predicts data minus noise. T5's tokens enter once, the states of every layer of a LLaMA
(32 of a prompt, 34 MB in bf16) at a block of their own. Feed-forwards of image tokens are experts,
of which a gate takes two for each token: `Routed` runs them. Sizes are taken as they are, where the
stock pipeline makes the nearest of its own area. The published folder leaves its LLaMA out: make a
whole one, `HiDreamImagePipeline.from_pretrained(id, text_encoder_4=..., tokenizer_4=...)` and
`save_pretrained`, for `model.path`.

A token whose experts are nearly tied may be given others where rounding differs, so in a batch of
another shape: its velocity then moves by more than rounding, which `logp_drift` shows.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers.models.transformers.transformer_hidream_image import MOEFeedForwardSwiGLU
from diffusers.pipelines.hidream_image.pipeline_hidream_image import (
    HiDreamImagePipeline,
    calculate_shift,
)
from torch import Tensor, nn

from sfgrpo.backbones._pipeline import PipelineBackbone
from sfgrpo.backbones.base import Conditioning

CLIP_TOKENS = 218
"""The most that the stock pipeline hands to a CLIP."""


class HiDreamBackbone(PipelineBackbone):
    """A HiDreamImagePipeline."""

    pipeline_classes = (HiDreamImagePipeline,)
    lora_targets = (  # the first four are those of diffusers' training script; experts stay
        "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out",
        "attn1.to_q_t", "attn1.to_k_t", "attn1.to_v_t", "attn1.to_out_t",
    )  # fmt: skip
    default_length = 128
    """Of T5 and LLaMA each; the network reads padding, too."""

    def _prepare(self) -> None:
        super()._prepare()
        trainable(self.pipeline.transformer)

    def latent_shape(self, height: int, width: int, frames: int = 1) -> tuple[int, ...]:
        network, scale = self.pipeline.transformer, self.pipeline.vae_scale_factor
        multiple = scale * network.config.patch_size
        h, w = self._spatial(height, width, frames, scale=scale, multiple=multiple)
        tokens = height * width // multiple**2
        if height != width and tokens > network.max_seq:
            raise ValueError(
                f"height and width must be equal, or at most {network.max_seq} tokens of "
                f"{multiple} x {multiple} pixels, got {height} x {width}, which are {tokens}"
            )
        return network.config.in_channels, h, w

    def _schedule(self, num_steps: int, latent_shape: tuple[int, ...]) -> dict[str, Any]:
        mu = calculate_shift(self.pipeline.transformer.max_seq)  # for images of any size
        return {"num_inference_steps": num_steps, "mu": mu}

    def _encode(self, prompts: list[str]) -> Conditioning:
        tokens, _, states, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=prompts, device=self.device, do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )  # fmt: skip
        return Conditioning(tokens=tokens, pooled=pooled, extra={"llama": states.transpose(0, 1)})

    def velocity(self, transformer: nn.Module, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        (found,) = transformer(
            hidden_states=x.to(self.dtype),
            timesteps=t.float() * self.pipeline.scheduler.config.num_train_timesteps,
            encoder_hidden_states_t5=cond.tokens,
            encoder_hidden_states_llama3=cond.extra["llama"].unbind(1),
            pooled_embeds=cond.pooled,
            return_dict=False,
        )
        return -found.float()

    def tokens_read(self, encoder: Any) -> int:
        """A CLIP reads as many as the others, up to its own number."""
        is_clip = "clip" in encoder.config.model_type
        return min(self.max_sequence_length, CLIP_TOKENS) if is_clip else self.max_sequence_length

    def blank(self, prompts: int) -> Conditioning:
        config, length = self.pipeline.transformer.config, self.max_sequence_length
        of_llama, of_t5 = config.caption_channels[0], config.caption_channels[-1]
        layers = max(config.llama_layers) + 1
        return Conditioning(
            tokens=torch.zeros(prompts, length, of_t5, dtype=self.dtype),
            pooled=torch.zeros(prompts, config.text_emb_dim, dtype=self.dtype),
            extra={"llama": torch.zeros(prompts, layers, length, of_llama, dtype=self.dtype)},
        )


def trainable(network: Any) -> Any:
    """diffusers' network, changed so that training runs what sampling ran, and with a gradient."""
    network.patchify = partial(_patchify, network)
    network.unpatchify = partial(_unpatchify, network)
    for block in (*network.double_stream_blocks, *network.single_stream_blocks):
        if isinstance(block.block.ff_i, MOEFeedForwardSwiGLU):
            block.block.ff_i = Routed(block.block.ff_i)
    return network


class Routed(nn.Module):
    """A feed-forward of experts: in training the tokens that sampling saw, with a gradient.

    diffusers' own either computes otherwise in training than in sampling, or, told to force the
    output of inference, gives what goes through an expert no gradient. Every expert is called, also
    with no token, so that ranks agree on which weights are gathered and averaged.
    """

    def __init__(self, stock: MOEFeedForwardSwiGLU) -> None:
        """Takes the parts of diffusers' layer, under their names."""
        super().__init__()
        self.shared_experts, self.experts, self.gate = (
            stock.shared_experts, stock.experts, stock.gate,
        )  # fmt: skip
        stock.gate._force_inference_output = True  # it made a loss that the network leaves unused

    def forward(self, x: Tensor) -> Tensor:
        """As MOEFeedForwardSwiGLU, [B, L, C] of the same."""
        chosen, shares, _ = self.gate(x)
        tokens, places = x.flatten(0, -2), chosen.flatten()
        order = places.argsort(stable=True)
        counts = self._counts(places)
        rows = (order // chosen.shape[-1]).split(counts)
        weights = shares.flatten()[order, None].split(counts)
        found = torch.zeros_like(tokens)
        for expert, row, weight in zip(self.experts, rows, weights, strict=True):
            found.index_add_(0, row, expert(tokens[row]) * weight)
        return found.view_as(x) + self.shared_experts(x)

    def _counts(self, places: Tensor) -> list[int]:
        """How many tokens each expert has; without values, where sizes are asked for, as many."""
        experts = len(self.experts)
        if places.is_meta:
            return [len(part) for part in places.tensor_split(experts)]
        return places.bincount(minlength=experts).tolist()


def _patchify(network: Any, latents: Tensor) -> Any:
    """As the network's own, with sizes on the host: on the device, each row would be waited for."""
    tokens, mask, _, places = type(network).patchify(network, latents)
    patch = network.config.patch_size
    size = latents.shape[-2] // patch, latents.shape[-1] // patch
    return tokens, mask, [size] * len(latents), places


def _unpatchify(network: Any, tokens: Tensor, sizes: Any, is_training: bool) -> Tensor:
    """As the network's own in sampling; in training that leaves latents in tokens."""
    return type(network).unpatchify(network, tokens, sizes, False)


load = HiDreamBackbone.load
