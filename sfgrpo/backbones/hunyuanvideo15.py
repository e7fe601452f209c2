"""HunyuanVideo 1.5, text to video.

A Qwen2.5-VL reads the prompt, and a ByT5 what stands in quotation marks there, which the video is
to show as letters. Guidance is the sampler's; the pipeline's own guider is not asked. The stock
pipeline has no `load_lora_weights`, its transformer has `load_lora_adapter`, for the same file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers.pipelines.hunyuan_video1_5.pipeline_hunyuan_video1_5 import HunyuanVideo15Pipeline
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sfgrpo.backbones._loading import LEFT_OUT
from sfgrpo.backbones.base import Conditioning
from sfgrpo.backbones.hunyuanvideo import HunyuanVideoBackbone


class HunyuanVideo15Backbone(HunyuanVideoBackbone):
    """A HunyuanVideo15Pipeline."""

    pipeline_classes = (HunyuanVideo15Pipeline,)
    # The stock pipeline cannot be made without its autoencoder.
    left_out: ClassVar[Mapping[str, tuple[str, ...]]] = {**LEFT_OUT, "only": ("transformer",)}
    default_length = 1000
    """Qwen2.5-VL's tokens."""

    def _prepare(self) -> None:
        super()._prepare()
        # Its attention has a mask for one video, and fails on several at once.
        self.pipeline.vae.enable_slicing()

    @property
    def channels(self) -> int:
        return self.pipeline.transformer.config.out_channels

    def _encode(self, prompts: list[str]) -> Conditioning:
        self.pipeline.tokenizer_max_length = self.max_sequence_length
        tokens, mask, glyphs, stand = self.pipeline.encode_prompt(
            prompt=prompts, device=self.device, batch_size=len(prompts)
        )
        extra = {"glyphs": glyphs, "glyphs_stand": stand.bool()}
        return Conditioning(tokens=tokens, mask=mask.bool(), extra=extra)

    def velocity(self, transformer: nn.Module, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        rows, _, *places = x.shape
        # Of a video that starts from no image: neither latents of one, nor where it is.
        seen = torch.cat([x, x.new_zeros(x.shape), x.new_zeros(rows, 1, *places)], 1)
        width = self.pipeline.transformer.config.image_embed_dim
        image = x.new_zeros(rows, self.pipeline.vision_num_semantic_tokens, width, dtype=self.dtype)
        times = t.float() * self.pipeline.scheduler.config.num_train_timesteps
        (velocity,) = transformer(
            hidden_states=seen.to(self.dtype),
            timestep=times.to(self.dtype),  # the network's embedding takes no other
            encoder_hidden_states=cond.tokens,
            encoder_attention_mask=cond.token_mask().to(self.dtype),
            encoder_hidden_states_2=cond.extra["glyphs"],
            encoder_attention_mask_2=cond.extra["glyphs_stand"].to(self.dtype),
            image_embeds=image,
            return_dict=False,
        )
        return velocity.float()

    def for_sizes(self) -> nn.Module:
        return WholeTexts(self.transformer)

    def tokens_read(self, encoder: Any) -> int:
        """Qwen2.5-VL's with the instruction, which the pipeline cuts off; ByT5's own number."""
        if encoder is self.pipeline.text_encoder_2:
            return self.pipeline.tokenizer_2_max_length
        return self.max_sequence_length + self.pipeline.prompt_template_encode_start_idx

    def blank(self, prompts: int) -> Conditioning:
        config, most = self.pipeline.transformer.config, self.pipeline.tokenizer_2_max_length
        tokens, glyphs = (
            torch.zeros(prompts, length, width, dtype=self.dtype)
            for length, width in (
                (self.max_sequence_length, config.text_embed_dim), (most, config.text_embed_2_dim),
            )
        )  # fmt: skip
        stand = torch.ones(prompts, most, dtype=torch.bool)
        return Conditioning(tokens=tokens, extra={"glyphs": glyphs, "glyphs_stand": stand})


class WholeTexts(nn.Module):
    """The network where tensors have no values, so that masks do not tell which tokens stand: those
    that do are put first, and all together are as many in any case."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, **given: Any) -> Any:
        """As a HunyuanVideo15Transformer3DModel."""
        with _AllStand():
            return self.network(**given)


class _AllStand(TorchFunctionMode):
    """Takes all tokens where those are asked for that stand, and none where the others are."""

    def __init__(self) -> None:
        super().__init__()
        self.others: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.all:
            return True
        if func is Tensor.__getitem__ and getattr(args[1], "dtype", None) == torch.bool:
            tokens, mask = args
            return tokens[:0] if any(mask is other for other in self.others) else tokens.clone()
        found = func(*args, **(kwargs or {}))
        if func is Tensor.__invert__:
            self.others.append(found)
        return found


load = HunyuanVideo15Backbone.load
