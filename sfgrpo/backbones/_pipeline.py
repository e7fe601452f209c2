"""What every family of diffusers pipelines shares; a family is a subclass in a file of its own.

Left out of the stock pipelines: IP adapters, ControlNets, prompt rewriting and callbacks.
Classifier-free guidance is the sampler's: it combines two halves of one call of `velocity`.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor, nn
from typing_extensions import Self

from sfgrpo import backbones
from sfgrpo.backbones import _adapters, _attention, _cut, _loading, _weights
from sfgrpo.backbones._loading import TextEncoders, Weights
from sfgrpo.backbones._sizes import Sizes
from sfgrpo.backbones.base import Conditioning, Modality
from sfgrpo.scheduler import FlowMatchSDEScheduler

GUIDANCE_KEY = "sample.embedded_guidance"


class PipelineBackbone(Sizes):
    """The parts of a diffusers pipeline, called the way the pipeline calls them.

    `load` keeps the decoder in float32: SD3's overflows in float16, and rounding is no reward.
    Text encoders and autoencoder are frozen; `transformer.requires_grad` is left as it is.
    """

    pipeline_classes: ClassVar[tuple[type[DiffusionPipeline], ...]]
    """Pipelines of this family; the first is the usual one."""
    reads_as: ClassVar[Mapping[str, type[DiffusionPipeline]]] = {}
    """Further names of pipelines, of other families, and as what their folders are read."""
    lora_targets: tuple[str, ...]
    """Ends of the names of the linear layers that adapters attach to."""
    modality: Modality = "image"
    default_length: ClassVar[int]
    """Text tokens that the stock pipeline takes unless told otherwise."""
    masks_text: ClassVar[bool] = False
    """Whether attention leaves out padding, which not every attention kernel can."""
    takes_images: ClassVar[range] = range(1)
    """How many images a prompt may bring."""
    makes_sound: ClassVar[bool] = False
    """Whether it is a `SoundBackbone`."""
    decoders: ClassVar[tuple[str, ...]] = ("vae",)
    """The parts that make samples of latents, loaded in float32."""
    left_out: ClassVar[Mapping[str, tuple[str, ...]]] = _loading.LEFT_OUT
    """By `text_encoders`, how the names of the parts begin that are not loaded."""
    context_parallel: int = 1
    """Ranks that are to share each sequence."""

    def __init__(
        self,
        pipeline: Any,
        *,
        max_sequence_length: int | None = None,
        embedded_guidance: float | None = None,
        decode_batch: int | None = None,
        text_encoders: TextEncoders = "resident",
    ) -> None:
        """Wrap a loaded pipeline; see `load` for the options.

        Raises:
            ValueError: options that the model cannot serve, naming the recipe's key.
        """
        length = self.default_length if max_sequence_length is None else max_sequence_length
        batch = (64 if self.modality == "image" else 1) if decode_batch is None else decode_batch
        if length < 0 or batch < 1:
            raise ValueError(
                f"max_sequence_length must be >= 0 and decode_batch >= 1, got {length} and {batch}"
            )
        self.pipeline = pipeline
        self.max_sequence_length, self.decode_batch = length, batch
        self.embedded_guidance, self.text_encoders = embedded_guidance, text_encoders
        self._watch = _cut.Watch(pipeline, length)
        for frozen in (*(getattr(pipeline, name) for name in self.decoders), *self.encoders()):
            if frozen is not None:
                frozen.requires_grad_(False).eval()
        if text_encoders != "only":
            self._prepare()

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        pipeline: Any = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        max_sequence_length: int | None = None,
        embedded_guidance: float | None = None,
        attention: str = "auto",
        compile_blocks: bool = False,
        decode_batch: int | None = None,
        vae_tiling: bool = False,
        vae_slicing: bool = False,
        text_encoders: TextEncoders = "resident",
        weights: Weights = "device",
        context_parallel: int = 1,
        **from_pretrained: Any,
    ) -> Self:
        """Load a pipeline folder or a Hub id with diffusers' `from_pretrained`.

        Args:
            path: local folder or Hub id; "embedded" and "numbers" are models in this package.
            pipeline: a pipeline that is loaded already, in place of `path`.
            device: where the network, the decoder and (if resident) the text encoders lie.
            dtype: of the network and the text encoders; the decoder is float32.
            max_sequence_length: text tokens, None for the stock pipeline's own number.
            embedded_guidance: what a guidance-distilled network is told.
            attention: see `sfgrpo.backbones._attention`.
            compile_blocks: torch.compile the repeated transformer blocks.
            decode_batch: samples decoded at once; None is 64 images or one video.
            vae_tiling, vae_slicing: decode in tiles, or sample by sample, for less memory.
            text_encoders: "resident" on the device, "offload" to the CPU between uses, "absent":
                not loaded (embeddings come from `sfgrpo.embeddings`), or "only": nothing else is.
            weights: the network's: on the "device", on the "host" until an engine shards them, or
                "absent" (on the meta device) where the engine has those of another rank.
            context_parallel: ranks that are to share each sequence, which not all attention can.
            from_pretrained: what else goes to `from_pretrained` (`revision`, `variant`, a part).

        Raises:
            OSError: says where a folder or id was looked for.
            ValueError: options that the model or the device cannot serve, naming the key.
        """
        path = backbones.EMBEDDED.get(str(path), path)
        given = pipeline is not None
        pipeline = pipeline or _loading.read(
            cls, path, dtype, text_encoders, from_pretrained, weights=weights
        )
        self = cls(
            pipeline, max_sequence_length=max_sequence_length, decode_batch=decode_batch,
            embedded_guidance=embedded_guidance, text_encoders=text_encoders,
        )  # fmt: skip
        there = None if weights == "device" else torch.device(device)
        if not given:
            stay = self._networks() if there else []
            stay += self.encoders() if text_encoders == "offload" else []
            _loading.place(pipeline, torch.device(device), stay=stay)
        if text_encoders == "only":
            return self
        self.context_parallel, shared = context_parallel, context_parallel > 1
        for part in self._networks():
            _attention.choose(part, attention, masked=cls.masks_text, device=there, shared=shared)
            if compile_blocks:
                _loading.compile_blocks(part)
        for wanted, method in ((vae_tiling, "enable_tiling"), (vae_slicing, "enable_slicing")):
            if wanted:
                getattr(pipeline.vae, method)()
        return self

    def encoders(self) -> list[Any]:
        """The text encoders, as far as they are loaded."""
        parts = self.pipeline.components.items()
        return [part for name, part in parts if name.startswith(self.left_out["absent"]) and part]

    def _networks(self) -> list[Any]:
        """The velocity networks of the pipeline."""
        return [self.pipeline.transformer]

    def _prepare(self) -> None:
        """Guidance that a network was distilled to read is to be said, and only there."""
        told, reads = self.embedded_guidance, self._reads_guidance()
        if reads and told is None:
            stock = inspect.signature(type(self.pipeline).__call__).parameters["guidance_scale"]
            raise ValueError(
                f"{GUIDANCE_KEY}: this network was distilled to read its guidance, so it must be "
                f"given one (the stock pipeline's default is {stock.default}); "
                "sample.guidance_scale is classifier-free guidance, 1 for none"
            )
        if told is not None and not reads:
            raise ValueError(
                f"{GUIDANCE_KEY}: got {told}, but this network reads no guidance; use null, and "
                "sample.guidance_scale for classifier-free guidance"
            )

    def _reads_guidance(self) -> bool:
        return bool(self.pipeline.transformer.config.get("guidance_embeds", False))

    def _guidance_rows(self, t: Tensor) -> Tensor | None:
        """The guidance each row is told, [B], for networks that read it."""
        told = self.embedded_guidance
        return None if told is None else t.new_full((len(t),), told, dtype=torch.float32)

    @property
    def transformer(self) -> nn.Module:
        return self.pipeline.transformer

    @property
    def device(self) -> torch.device:
        return (self.pipeline.vae or self.encoders()[0]).device

    @property
    def dtype(self) -> torch.dtype:
        return (self.pipeline.transformer or self.encoders()[0]).dtype

    def sigmas(self, num_steps: int, latent_shape: tuple[int, ...]) -> Tensor:
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {num_steps}")
        # A fresh scheduler: set_timesteps changes the one it is called on.
        scheduler = FlowMatchSDEScheduler.from_config(self.pipeline.scheduler.config, sampler="ode")
        scheduler.set_timesteps(device="cpu", **self._schedule(num_steps, latent_shape))
        return scheduler.sigmas.clone()

    def _schedule(self, num_steps: int, latent_shape: tuple[int, ...]) -> dict[str, Any]:
        """What the stock pipeline hands to its scheduler's `set_timesteps`."""
        return {"num_inference_steps": num_steps}

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        if isinstance(prompts, str):
            raise TypeError("prompts must be a sequence of strings, got one string")
        texts = list(prompts)
        with self._encoders_at_hand(), self._watch.over(texts):
            return self._embedded(texts).to(self.device, self.dtype)

    def _embedded(self, texts: list[str]) -> Conditioning:
        starts = range(0, len(texts), self.encode_batch)
        return Conditioning.cat([self._encode(texts[k : k + self.encode_batch]) for k in starts])

    def _encode(self, prompts: list[str]) -> Conditioning:
        """Embed a few prompts at once, by the stock pipeline's own method; here tokens alone."""
        tokens, *_ = self.pipeline.encode_prompt(
            prompt=prompts, device=self.device, do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )  # fmt: skip
        return Conditioning(tokens=tokens)

    @abstractmethod
    def velocity(
        self, transformer: nn.Module, x: Tensor, t: Tensor, cond: Conditioning
    ) -> Tensor: ...

    @contextmanager
    def _encoders_at_hand(self) -> Iterator[None]:
        """Within the context the text encoders are on the device."""
        if self.text_encoders == "absent":
            raise RuntimeError("the text encoders were not loaded")
        if self.text_encoders != "offload":
            yield
            return
        encoders = self.encoders()
        for encoder in encoders:
            encoder.to(self.device)
        try:
            yield
        finally:
            for encoder in encoders:
                encoder.to("cpu")

    def guide(self, v: Tensor, v_uncond: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
        return v, v_uncond

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        parts = latents.to(self.device, self.pipeline.vae.dtype).split(self.decode_batch)
        return torch.cat([(self._decode(part).float() / 2 + 0.5).clamp(0, 1) for part in parts])

    def _of_patches(self, height: int, width: int, frames: int, *, patch: int) -> tuple[int, ...]:
        """Shape of an image's latent whose tokens are patch x patch places, as `latent_shape`."""
        scale = self.pipeline.vae_scale_factor
        h, w = self._spatial(height, width, frames, scale=scale, multiple=patch * scale)
        return self.pipeline.transformer.config.in_channels, h, w

    def _decode(self, latents: Tensor) -> Tensor:
        """Samples in [-1, 1] of a few latents, here of an AutoencoderKL's."""
        config = self.pipeline.vae.config
        unscaled = latents / config.scaling_factor + (config.shift_factor or 0.0)
        return self.pipeline.vae.decode(unscaled, return_dict=False)[0]

    def _one_frame(self, latents: Tensor) -> Tensor:
        """Images in [-1, 1] of a few latents [B, C, h, w] by an autoencoder of videos."""
        unscaled = self._unnormalised(latents[:, :, None])
        return self.pipeline.vae.decode(unscaled, return_dict=False)[0][:, :, 0]

    def _unnormalised(self, latents: Tensor) -> Tensor:
        """Latents [B, C, F, h, w] as the video autoencoders of Wan and Qwen want them."""
        config = self.pipeline.vae.config
        mean, std = (latents.new_tensor(x) for x in (config.latents_mean, config.latents_std))
        return torch.addcmul(mean.view(-1, 1, 1, 1), latents, std.view(-1, 1, 1, 1))

    def save(self, folder: Path) -> None:
        network: Any = self.transformer
        if adapters := _adapters.of(network):
            _adapters.save(self.pipeline, folder, *adapters)
        else:
            network.save_pretrained(folder / "transformer")

    def restore(self, folder: Path) -> None:
        parts = getattr(self.transformer, "weight_folders", _weights.WHOLE)
        _weights.restore(self.transformer, folder, parts=parts)
