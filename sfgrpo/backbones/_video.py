"""What families of videos share."""

from __future__ import annotations

from sfgrpo.backbones._pipeline import PipelineBackbone


class VideoBackbone(PipelineBackbone):
    """Latents [C, F, h, w] of an autoencoder that keeps the first frame by itself, and the others
    in groups."""

    modality = "video"

    def latent_shape(self, height: int, width: int, frames: int = 1) -> tuple[int, ...]:
        every, scale = self._strides()
        config = self.pipeline.transformer.config
        patch = config.patch_size if isinstance(config.patch_size, int) else config.patch_size[-1]
        h, w = self._spatial(height, width, scale=scale, multiple=scale * patch)
        if frames < 1 or (frames - 1) % every:
            raise ValueError(f"num_frames must be 1 more than a multiple of {every}, got {frames}")
        return self.channels, (frames - 1) // every + 1, h, w

    @property
    def channels(self) -> int:
        """Of a latent."""
        return self.pipeline.transformer.config.in_channels

    def _strides(self) -> tuple[int, int]:
        """Frames, and pixels along a side, of one place of a latent."""
        return self.pipeline.vae_scale_factor_temporal, self.pipeline.vae_scale_factor_spatial
