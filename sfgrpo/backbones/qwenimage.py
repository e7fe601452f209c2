"""Qwen-Image.

Guidance keeps the norm: `v_u + w (v_c - v_u)`, scaled at every token to the length of v_c (the
stock pipeline's `true_cfg_scale`). It is not affine, so it is computed here and not in the ops.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.pipelines.qwenimage.pipeline_qwenimage import QwenImagePipeline
from einops import reduce
from torch import Tensor, nn

from sfgrpo.backbones._packed import PackedBackbone
from sfgrpo.backbones.base import Conditioning

Shape = tuple[int, int, int]
"""(frames, height, width) of a picture in tokens of 2 x 2 places."""


class QwenImageBackbone(PackedBackbone):
    """A QwenImagePipeline."""

    pipeline_classes = (QwenImagePipeline,)
    lora_targets = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
        "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2",
    )  # fmt: skip
    default_length = 512
    masks_text = True
    whole_sequences = ""

    def _encode(self, prompts: list[str]) -> Conditioning:
        tokens, mask = self.pipeline.encode_prompt(
            prompt=prompts, device=self.device, max_sequence_length=self.max_sequence_length
        )
        return Conditioning(tokens=tokens, mask=None if mask is None else mask.bool())

    def _tokens(self, x: Tensor, cond: Conditioning) -> tuple[Tensor, list[Shape]]:
        """What the network sees, [B, L, 64], the tokens of the latents `x` first; and the shapes of
        the pictures that they are."""
        return self._pack(x), [shape_of(x)]

    def sequences(self, latent_shape: tuple[int, ...]) -> Mapping[str, int]:
        return {"tokens": latent_shape[-1] * latent_shape[-2] // 4}

    def velocity(self, transformer: nn.Module, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        # The text is as long as the longest prompt of a batch; padding is masked in attention.
        cond = cond.divisible(self.context_parallel)
        tokens, shapes = self._tokens(x, cond)
        (packed,) = transformer(
            hidden_states=tokens,
            timestep=t,
            guidance=self._guidance_rows(t),
            encoder_hidden_states=cond.tokens,
            encoder_hidden_states_mask=cond.mask,
            img_shapes=[shapes] * len(x),
            return_dict=False,
        )
        return self._unpack(packed[:, : x.shape[-2] * x.shape[-1] // 4], x)

    def guide(self, v: Tensor, v_uncond: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
        guided = torch.lerp(v_uncond, v, scale)
        wanted, found = (_token_norm(u) for u in (v, guided))
        return guided * (wanted / found), None

    def _decode(self, latents: Tensor) -> Tensor:
        return self._one_frame(latents)

    def tokens_read(self, encoder: Any) -> int:
        """With the instruction that the pipeline puts before the prompt, and cuts off after."""
        return self._length() + self.pipeline.prompt_template_encode_start_idx

    def _length(self) -> int:
        """Tokens that the network reads of a prompt of `max_sequence_length`."""
        return self.max_sequence_length

    def blank(self, prompts: int) -> Conditioning:
        width, ranks = self.pipeline.transformer.config.joint_attention_dim, self.context_parallel
        length = math.ceil(self._length() / ranks) * ranks
        return Conditioning(tokens=torch.zeros(prompts, length, width, dtype=self.dtype))


def shape_of(x: Tensor) -> Shape:
    """Of latents [B, C, h, w]."""
    return 1, x.shape[-2] // 2, x.shape[-1] // 2


def _token_norm(v: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, 1, h, w]: the length of each 2 x 2 patch, over its own four places."""
    squares = reduce(v.square(), "b c (h p) (w q) -> b 1 h w", "sum", p=2, q=2)
    return squares.sqrt().repeat_interleave(2, -2).repeat_interleave(2, -1)


load = QwenImageBackbone.load
