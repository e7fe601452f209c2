"""Qwen-Image 2.1, from text.

Text comes first, read causally and as if at time 0, and the sample's tokens after it: how far along
its rows stand depends on the length of the prompt. The stock network counts the longest prompt of a
batch for all of them, so that a prompt would be painted otherwise beside a longer one; here every
row stands behind its own. Prompts are read one by one, for the same reason, and are not cut:
`max_sequence_length` is how long the doctor takes them to be.

Published weights decode to pictures with transparency, which are laid over white, as the model's
text encoder sees them. What it edits is not served yet. It is meant to be sampled without guidance:

    sfgrpo train qwen_image --model.backbone qwenimage21 --model.path Qwen/Qwen-Image-2.1 \\
        --sample.guidance_scale 1
"""

from __future__ import annotations

from types import MethodType
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.pipelines.qwenimage21.pipeline_qwenimage21 import (
    QwenImage21Pipeline,
    calculate_shift,
)
from einops import rearrange
from torch import Tensor, nn

from sfgrpo.backbones._pipeline import PipelineBackbone
from sfgrpo.backbones._tokens import dynamic_shift
from sfgrpo.backbones.base import Conditioning


class QwenImage21Backbone(PipelineBackbone):
    """A QwenImage21Pipeline."""

    pipeline_classes = (QwenImage21Pipeline,)
    lora_targets = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "img_mlp.proj", "img_mlp.gate_layer", "img_mlp.out",
    )  # fmt: skip
    default_length = 512
    encode_batch: ClassVar[int] = 1
    masks_text = True

    def _prepare(self) -> None:
        super()._prepare()
        network = self.pipeline.transformer
        network.forward = MethodType(text_first, network)
        for block in network.transformer_blocks:
            block.attn.set_processor(PlacedAttention())

    def latent_shape(self, height: int, width: int, frames: int = 1) -> tuple[int, ...]:
        return self._of_patches(height, width, frames, patch=2)

    def _schedule(self, num_steps: int, latent_shape: tuple[int, ...]) -> dict[str, Any]:
        """With the noise levels of the model's author, where there are as many."""
        own = self.pipeline.config.sample_sigmas or ()
        tokens = latent_shape[-2] * latent_shape[-1]
        return {
            "sigmas": own if len(own) == num_steps else np.linspace(1.0, 1 / num_steps, num_steps),
            "mu": dynamic_shift(self.pipeline.scheduler, tokens, calculate_shift),
        }

    def _encode(self, prompts: list[str]) -> Conditioning:
        tokens, *_ = self.pipeline.encode_prompt(prompt=prompts, device=self.device)
        return Conditioning(tokens=tokens)

    def velocity(self, transformer: nn.Module, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        found = transformer(
            hidden_states=rearrange(x.to(self.dtype), "b c h w -> b (h w) c"),
            encoder_hidden_states=cond.tokens,
            timestep=t,
            lengths=cond.token_mask().sum(1),
            text_mask=cond.mask,
            size=tuple(x.shape[-2:]),
        )
        return rearrange(found, "b (h w) c -> b c h w", h=x.shape[-2]).float()

    def _decode(self, latents: Tensor) -> Tensor:
        made = self._one_frame(latents)
        colours, opaque = made[:, :3], made[:, 3:] / 2 + 0.5
        return colours if made.shape[1] == 3 else colours * opaque + (1 - opaque)

    def tokens_read(self, encoder: Any) -> int:
        """With the instruction before the prompt, whose states the pipeline cuts off."""
        return self.max_sequence_length + self.pipeline._drop_idx

    def blank(self, prompts: int) -> Conditioning:
        width = self.pipeline.transformer.config.context_in_dim
        tokens = torch.zeros(prompts, self.max_sequence_length, width, dtype=self.dtype)
        return Conditioning(tokens=tokens)


def text_first(
    self: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor,
    lengths: Tensor, text_mask: Tensor | None, size: tuple[int, int],
) -> Tensor:  # fmt: skip
    """QwenImage21Transformer2DModel's forward for text and one picture, [B, h w, C] of `size`.

    Beside the places of the rows it differs in what it does not look up: where text and pictures
    are is known here, and the host does not wait for the device to say so.

    Args:
        lengths: int64 `[B]`, tokens of each row's text.
        text_mask: bool `[B, L]`, True where a token of the text stands; None where all do.
    """
    joint = torch.cat([self.txt_in(encoder_hidden_states), self.img_in(hidden_states)], 1)
    text, length = encoder_hidden_states.shape[1], joint.shape[1]
    factors = _factors(self.pos_embed, lengths, text, size)
    clock = timestep.to(joint.dtype)
    painted = None
    if self.config.causal_condition:  # the last row is of time 0, for the text
        clock = torch.cat([clock, clock.new_zeros(1)])
        painted = torch.arange(length, device=joint.device) >= text
    told = self.time_text_embed(clock, joint)
    modulation = self.modulation(told)
    stands = None if text_mask is None else F.pad(text_mask, (0, length - text), value=True)
    given = factors, None, painted, None, None, None, [(0, text, True)], stands
    for block in self.transformer_blocks:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            joint = self._gradient_checkpointing_func(block, joint, modulation, *given)
        else:
            joint = block(joint, modulation, *given)
    picture = joint[:, text:], told, None if painted is None else painted[text:]
    return self.proj_out(self.norm_out(*picture))


def _factors(rope: Any, lengths: Tensor, text: int, size: tuple[int, int]) -> Tensor:
    """QwenImage21Rope's factors `[B, L, 1, D / 2]`, complex, of text and the picture behind it: its
    rows and columns are counted from its middle, its place along the text from each row's own."""
    (h, w), rows, device = size, len(lengths), lengths.device
    word = torch.arange(text, device=device)
    down, right = (torch.arange(n, device=device) - (n - n // 2) for n in (h, w))
    picture = lengths[:, None].expand(-1, h * w), down.repeat_interleave(w), right.repeat(h)
    axes = []
    for width, place in zip(rope.axes_dim, picture, strict=True):
        at = torch.cat([word.expand(rows, -1), place.expand(rows, -1)], 1)
        exponent = torch.arange(0, width, 2, device=device).float().div(width)
        axes.append(at[..., None].float() * (1.0 / torch.pow(rope.theta, exponent)))
    angles = torch.cat(axes, -1)
    return torch.polar(torch.ones_like(angles), angles)[:, :, None]


class PlacedAttention:
    """QwenImage21AttnProcessor by the chosen backend, with rotary factors of each row's own."""

    _attention_backend: Any = None
    _parallel_config: Any = None

    def __call__(
        self, attn: Any, hidden_states: Tensor, rotary_emb: Tensor,
        *, segments: list[tuple[int, int, bool]], key_valid: Tensor | None = None, **_: Any,
    ) -> Tensor:  # fmt: skip
        """Of tokens [B, L, C], first those of the one segment, the text, which see no later ones;
        of the keys stand those where `key_valid`, bool [B, L], is True."""
        q, k, v = (
            rearrange(layer(hidden_states), "b l (h d) -> b l h d", h=attn.heads)
            for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        q, k = (
            _turned(norm(part).to(v.dtype), rotary_emb)
            for norm, part in ((attn.norm_q, q), (attn.norm_k, k))
        )
        text = segments[0][1]
        causal = torch.ones(text, text, dtype=torch.bool, device=q.device).tril()[None, None]
        valid = None if key_valid is None else key_valid[:, None, None]
        before = causal if valid is None else causal & valid[..., :text]
        found = [
            self._attended(q[:, :text], k[:, :text], v[:, :text], before),
            self._attended(q[:, text:], k, v, valid),
        ]
        joint = torch.cat(found, 1).flatten(2).to(q.dtype)
        return attn.to_out[1](attn.to_out[0](joint))

    def _attended(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        found: Any = dispatch_attention_fn(
            q, k, v, attn_mask=mask, backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )  # fmt: skip
        return found


def _turned(x: Tensor, factors: Tensor) -> Tensor:
    """Queries or keys [B, L, H, D], neighbours of the last dimension turned as complex numbers."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * factors).flatten(-2).to(x.dtype)


load = QwenImage21Backbone.load
