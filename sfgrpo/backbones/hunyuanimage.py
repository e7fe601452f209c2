"""HunyuanImage 2.1, text to image.

It reads a prompt as HunyuanVideo 1.5 does. Guidance is the sampler's, plain and classifier-free;
the pipeline's own guider has a momentum over the steps, which is no velocity of a state and a time,
so that the stock pipeline makes these samples with

    pipe.guider = pipe.ocr_guider = ClassifierFreeGuidance(guidance_scale=...)

Its distilled network reads where a step ends, and is refused.
"""

from __future__ import annotations

from functools import partial

from diffusers.pipelines.hunyuan_image.pipeline_hunyuanimage import HunyuanImagePipeline
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sfgrpo.backbones._loading import LEFT_OUT
from sfgrpo.backbones._pipeline import PipelineBackbone
from sfgrpo.backbones.base import Conditioning
from sfgrpo.backbones.hunyuanvideo15 import HunyuanVideo15Backbone


class HunyuanImageBackbone(HunyuanVideo15Backbone):
    """A HunyuanImagePipeline."""

    pipeline_classes = (HunyuanImagePipeline,)
    left_out = LEFT_OUT
    modality = "image"

    def _prepare(self) -> None:
        network, config = self.pipeline.transformer, self.pipeline.transformer.config
        if config.use_meanflow or config.guidance_embeds:
            raise ValueError(
                "model.path: this is HunyuanImage's distilled network, which reads where a step "
                "ends, so that it has no velocity of a state and a time; use the one that it was "
                "distilled from (hunyuanvideo-community/HunyuanImage-2.1-Diffusers)"
            )
        PipelineBackbone._prepare(self)
        # diffusers 0.42's forward hands blocks a mask by name, its own function takes none.
        network.enable_gradient_checkpointing = partial(
            network.enable_gradient_checkpointing, partial(checkpoint, use_reentrant=False)
        )

    def latent_shape(self, height: int, width: int, frames: int = 1) -> tuple[int, ...]:
        return self._of_patches(height, width, frames, patch=2)

    def velocity(self, transformer: nn.Module, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        times = t.float() * self.pipeline.scheduler.config.num_train_timesteps
        (velocity,) = transformer(
            hidden_states=x.to(self.dtype),
            timestep=times.to(self.dtype),  # the network's embedding takes no other
            encoder_hidden_states=cond.tokens,
            encoder_attention_mask=cond.token_mask(),
            encoder_hidden_states_2=cond.extra["glyphs"],
            encoder_attention_mask_2=cond.extra["glyphs_stand"],
            return_dict=False,
        )
        return velocity.float()

    def _decode(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        return vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]


load = HunyuanImageBackbone.load
