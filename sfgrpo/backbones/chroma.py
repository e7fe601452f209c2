"""Chroma.

The stock pipeline keeps the text at one length: the mask that it hands to the network is a bias of
one on what is to be attended to (prompt, one token of padding, image), so that padding counts, too,
if less. For that the mask travels as `Conditioning.pooled`, beside all tokens.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers.models.transformers.transformer_chroma import ChromaSingleTransformerBlock
from diffusers.pipelines.chroma.pipeline_chroma import ChromaPipeline
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sfgrpo.backbones._packed import PackedBackbone
from sfgrpo.backbones._tokens import places
from sfgrpo.backbones.base import Conditioning


class ChromaBackbone(PackedBackbone):
    """A ChromaPipeline."""

    pipeline_classes = (ChromaPipeline,)
    lora_targets = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
        "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
    )  # fmt: skip
    default_length = 512
    """T5 tokens."""
    masks_text = True

    def _prepare(self) -> None:
        super()._prepare()
        network = self.pipeline.transformer
        network.enable_gradient_checkpointing = partial(
            network.enable_gradient_checkpointing, _MaskedCheckpoint()
        )

    def _encode(self, prompts: list[str]) -> Conditioning:
        tokens, _, mask, *_ = self.pipeline.encode_prompt(
            prompt=prompts, device=self.device, do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )  # fmt: skip
        return Conditioning(tokens=tokens, pooled=mask)

    def velocity(self, transformer: nn.Module, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        h, w = x.shape[-2] // 2, x.shape[-1] // 2
        assert cond.pooled is not None
        (packed,) = transformer(
            hidden_states=self._pack(x),
            timestep=t,
            encoder_hidden_states=cond.tokens,
            txt_ids=x.new_zeros(cond.tokens.shape[1], 3, dtype=torch.float32),
            img_ids=places(h, w, columns=3, device=x.device),
            attention_mask=torch.cat([cond.pooled, cond.pooled.new_ones(len(x), h * w)], 1),
            return_dict=False,
        )
        return self._unpack(packed, x)

    def blank(self, prompts: int) -> Conditioning:
        config, length = self.pipeline.transformer.config, self.max_sequence_length
        return Conditioning(
            tokens=torch.zeros(prompts, length, config.joint_attention_dim, dtype=self.dtype),
            pooled=torch.zeros(prompts, length, dtype=self.dtype),
        )


class _MaskedCheckpoint:
    """Gradient checkpointing that hands the mask to every block: diffusers 0.42's forward leaves it
    out for the blocks of one stream, which then compute something else than without."""

    def __init__(self) -> None:
        self._mask: Tensor | None = None

    def __call__(self, block: nn.Module, *arguments: Any) -> Any:
        """As `_gradient_checkpointing_func` of the network: two streams first, then one."""
        if isinstance(block, ChromaSingleTransformerBlock):
            arguments = (*arguments, self._mask)
        else:
            self._mask = arguments[-1]
        return checkpoint(block, *arguments, use_reentrant=False)


load = ChromaBackbone.load
