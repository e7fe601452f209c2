"""SANA-Video, text to video: as SANA, with the autoencoder of Wan or of LTX-2."""

from __future__ import annotations

from typing import ClassVar

from diffusers.models.autoencoders.autoencoder_kl_ltx2 import AutoencoderKLLTX2Video
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.pipelines.sana_video.pipeline_sana_video import SanaVideoPipeline
from torch import Tensor

from sfgrpo.backbones._video import VideoBackbone
from sfgrpo.backbones.sana import SanaBackbone, instruction_of


class SanaVideoBackbone(VideoBackbone, SanaBackbone):
    """A SanaVideoPipeline."""

    pipeline_classes = (SanaVideoPipeline,)
    instruction: ClassVar[list[str]] = instruction_of(SanaVideoPipeline)

    def _decode(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        if isinstance(vae, AutoencoderKLWan):
            latents = self._unnormalised(latents)
        elif isinstance(vae, AutoencoderKLLTX2Video):
            both = vae.latents_mean, vae.latents_std
            mean, std = (part.to(latents).view(-1, 1, 1, 1) for part in both)
            latents = latents * std + mean
        return vae.decode(latents, return_dict=False)[0].transpose(1, 2)


load = SanaVideoBackbone.load
