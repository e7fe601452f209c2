"""Stable Diffusion 3's attention through diffusers' dispatcher.

The library's own processor for it (JointAttnProcessor2_0) calls PyTorch's attention directly, so
that `set_attention_backend` changes nothing there, without a word.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from einops import rearrange
from torch import Tensor

SPLIT = "b l (h d) -> b l h d"


class DispatchedJointAttention:
    """Attention of image tokens, and of the text's beside them, by the chosen backend."""

    _attention_backend: Any = None
    _parallel_config: Any = None

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        """As JointAttnProcessor2_0: `hidden_states [B, L, C]`, text `[B, M, C]` or none."""
        own = (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k)
        q, k, v = _project(hidden_states, attn.heads, *own)
        if encoder_hidden_states is not None:
            added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            norms = (attn.norm_added_q, attn.norm_added_k)
            text = _project(encoder_hidden_states, attn.heads, added, norms)
            q, k, v = (torch.cat(both, 1) for both in zip((q, k, v), text, strict=True))
        out: Any = dispatch_attention_fn(q, k, v, backend=self._attention_backend)
        joint = rearrange(out, "b l h d -> b l (h d)").to(q.dtype)
        image = attn.to_out[1](attn.to_out[0](joint[:, : hidden_states.shape[1]]))
        if encoder_hidden_states is None:
            return image
        context = joint[:, hidden_states.shape[1] :]
        return image, context if attn.context_pre_only else attn.to_add_out(context)


def _project(x: Tensor, heads: int, layers: Any, norms: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value [B, L, H, D] of tokens [B, L, C]; norms may be None."""
    q, k, v = (rearrange(layer(x), SPLIT, h=heads) for layer in layers)
    q, k = (y if norm is None else norm(y) for y, norm in zip((q, k), norms, strict=True))
    return q, k, v
