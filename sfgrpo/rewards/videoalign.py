"""VideoAlign's VideoReward: what people prefer of videos (Liu et al. 2025, arXiv 2501.13918).

Qwen2-VL (2B, with LoRA) reads an instruction with the prompt in it and sees frames of the video; a
linear layer makes a score of its state at each of three tokens: visual quality (VQ), motion quality
(MQ) and text alignment (TA). Each is normalised by the mean and standard deviation that the
checkpoint brings, and the score is their sum, as published, or what `parts` weighs: a few units
around 0.

The published weights, LoRA added to what it adapts, are loaded into transformers' `Qwen2VLModel`.
Videos [B, F, 3, H, W] in [0, 1] come whole. As in the published code, a video of `fps` frames a
second is shown at 2 a second, 4 at least and evenly spread, an even number, each frame of 8 bits
resized to 8 bits of 100,352 to 200,704 pixels; there the frames come out of a compressed file. The
instruction, videoalign.txt, is the published one. Code: MIT; weights and Qwen2-VL's: Apache-2.0.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sfgrpo.names import unknown_name
from sfgrpo.rewards import _qwen2_vl, _weights, evenly
from sfgrpo.rewards._pixels import CLIP_MEAN, CLIP_STD, normalise, resize
from sfgrpo.rewards._qwen2_vl import Reader
from sfgrpo.rewards._weights import Place, Settings, Weights
from sfgrpo.rewards.base import Metadata

INSTRUCTION = Path(__file__).with_suffix(".txt")
CONFIG = "model_config.json"
PARTS = ("VQ", "MQ", "TA")
JUDGED = [f"<|{part}_reward|>" for part in PARTS]
LEAST_PIXELS, LEAST_FRAMES, MOST_FRAMES = 128 * 28 * 28, 4, 768
PREFIX = "base_model.model."
"""With which peft begins the names of what it wraps."""
ADAPTED = ".base_layer.weight"
"""With which peft ends the names of the weights that LoRA adapts."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """How a checkpoint was trained, by its model_config.json."""

    fps: float
    """Frames of a second of video that are shown."""
    pixels: int
    """Of a frame at most."""
    scaling: float
    """Of what LoRA adds."""
    means: tuple[float, ...]
    """Of each part's scores."""
    stds: tuple[float, ...]

    @classmethod
    def of(cls, settings: str) -> Trained:
        """ValueError for a checkpoint that was trained otherwise than the published one; OSError if
        there is no such file."""
        source = f"{settings}/{CONFIG}"
        text = _weights.fetched("videoalign", source).read_text(encoding="utf-8")
        try:
            told: Any = json.loads(text)
            data, lora, norms = (
                told[key] for key in ("data_config", "peft_lora_config", "inference_config")
            )
            asked = data["prompt_template_type"], data["sample_type"], data.get("num_frames")
            root = math.sqrt(lora["lora_r"]) if lora["use_rslora"] else lora["lora_r"]
            found = cls(
                fps=data["fps"], pixels=data["max_frame_pixels"], scaling=lora["lora_alpha"] / root,
                means=tuple(norms[f"{part}_mean"] for part in PARTS),
                stds=tuple(norms[f"{part}_std"] for part in PARTS),
            )  # fmt: skip
        except KeyError as error:
            raise ValueError(f"reward 'videoalign': '{source}' lacks {error}") from error
        except (ValueError, TypeError) as error:
            raise ValueError(f"reward 'videoalign': '{source}' cannot be read: {error}") from error
        if asked != ("detailed_special", "uniform", None):
            raise ValueError(
                f"reward 'videoalign': '{source}': data_config must have prompt_template_type "
                "detailed_special, sample_type uniform and no num_frames, as what is published, "
                f"has {asked}"
            )
        return found


def merged(state: Mapping[str, Tensor], scaling: float, dtype: torch.dtype) -> dict[str, Tensor]:
    """peft's state dict without peft: what LoRA adds is added, in fp32, and names are those of the
    network that was wrapped.

    Raises:
        ValueError: a half of what LoRA adds is missing, or belongs to nothing.
    """
    unused = {name for name in state if ".lora_" in name}
    found = {}
    for name, value in state.items():
        if ".lora_" in name:
            continue
        if name.endswith(ADAPTED):
            down, up = (f"{name.removesuffix(ADAPTED)}.lora_{side}.default.weight" for side in "AB")
            for half in (down, up):
                if half not in unused:
                    raise ValueError(f"reward 'videoalign': '{half}' is missing")
                unused.remove(half)
            more = state[up].float() @ state[down].float()
            value = (value.float() + scaling * more).to(dtype)
        found[name.removeprefix(PREFIX).replace(".base_layer.", ".")] = value
    if unused:
        raise ValueError(f"reward 'videoalign': '{min(unused)}' belongs to nothing")
    return found


def sampled(count: int, *, fps: float, shown: float) -> list[int]:
    """Which of `count` frames, `fps` a second, are shown at about `shown` a second: an even number
    of them, evenly spread."""
    most = min(MOST_FRAMES, count) // 2 * 2
    wanted = min(max(count / fps * shown, LEAST_FRAMES), most)
    return evenly(round(wanted / 2) * 2, count)


class VideoAlign:
    """The weighted sum of what Qwen2-VL foresees of three qualities of each video."""

    takes_video = True

    def __init__(
        self, place: Place, *, reader: Reader, head: nn.Module, trained: Trained, fps: float,
        parts: Mapping[str, float],
    ) -> None:  # fmt: skip
        self._place, self._reader, self._trained, self._fps = place, reader, trained, fps
        self._head = head.to(place.device).eval().requires_grad_(False)
        self._text = INSTRUCTION.read_text(encoding="utf-8")
        self._weights = torch.tensor([parts.get(part, 0.0) for part in PARTS])

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Tensor:
        """Scores [B] of the videos [B, F, 3, H, W]; ValueError for images, and for fewer than two
        frames."""
        return (self.parts(images, prompts) * self._weights).sum(1)

    @torch.no_grad()
    def parts(self, videos: Tensor, prompts: Sequence[str]) -> Tensor:
        """[B, 3] on the CPU: VQ, MQ and TA of each video, normalised."""
        if videos.ndim != 5 or videos.shape[1] < 2:
            raise ValueError(
                "needs videos [B, F, 3, H, W] of at least two frames, got "
                f"{tuple(videos.shape)}: it scores motion, too"
            )
        found = [torch.empty(0, len(PARTS))]
        for rows in self._place.batches(len(videos)):
            found.append(self._scores(videos[rows], prompts[rows]).cpu())
        means, stds = (torch.tensor(v) for v in (self._trained.means, self._trained.stds))
        return (torch.cat(found) - means) / stds

    def _scores(self, videos: Tensor, prompts: Sequence[str]) -> Tensor:
        chosen = sampled(videos.shape[1], fps=self._fps, shown=self._trained.fps)
        # Bytes before and after, of 0 to 255 in between: what torchvision makes of a file's frames.
        frames = videos[:, chosen].detach().to(self._place.device).float().clamp(0, 1)
        frames = (frames * 255).round()
        size = _qwen2_vl.fitted(
            *frames.shape[-2:], factor=self._reader.factor, least=LEAST_PIXELS,
            most=self._trained.pixels,
        )  # fmt: skip
        resized = resize(frames.flatten(0, 1), size).clamp(0, 255).round() / 255
        shown = normalise(resized, CLIP_MEAN, CLIP_STD)
        texts = [self._text.replace("{prompt}", prompt) for prompt in prompts]
        states = self._reader(shown.unflatten(0, frames.shape[:2]), texts, prompts)
        return self._head(states)[..., 0]


def build(
    *,
    model: Weights = "KlingTeam/VideoReward/checkpoint-11352/model.pth",
    settings: Settings = "KlingTeam/VideoReward",
    base: Settings = "Qwen/Qwen2-VL-2B-Instruct",
    parts: Mapping[str, float] | None = None,
    fps: float = 16,
    device: str = "auto",
    dtype: Literal["fp32", "bf16", "fp16"] = "bf16",
    batch: int = 4,
) -> VideoAlign:
    """The VideoAlign reward.

    Args:
        model: a local file or "owner/name/file" on the hub: the checkpoint's state dict, LoRA and
            all, in the published names.
        settings: local folder or hub id of its model_config.json.
        base: local folder or hub id of Qwen2-VL's configuration and tokeniser.
        parts: weights of VQ, MQ and TA, of which one that is left out counts nothing; None is 1
            each.
        fps: frames a second of the videos that are scored.
        device: "auto" is this rank's GPU, or the CPU where there is none.
        dtype: precision of Qwen2-VL, published in bf16; the layer on top and scores are fp32.
        batch: videos of one forward.

    Raises:
        ValueError: values that make no sense, or weights that do not fit, naming them.
        OSError: where a file cannot be found.
    """
    parts = dict.fromkeys(PARTS, 1.0) if parts is None else parts
    for name, weight in parts.items():
        if name not in PARTS:
            raise ValueError(f"reward 'videoalign': {unknown_name('part', name, PARTS)}")
        if not math.isfinite(weight):
            raise ValueError(f"reward 'videoalign': parts: {name} must be finite, got {weight}")
    if not any(parts.values()) or not 0 < fps < math.inf:
        raise ValueError(
            "reward 'videoalign': needs parts that are not all 0, and a positive fps, got "
            f"{dict(parts)} and {fps}"
        )
    place = Place.of("videoalign", device=device, dtype=dtype, batch=batch)
    tokenizer = _qwen2_vl.open_tokenizer(base, JUDGED)
    trained = Trained.of(settings)
    state = merged(_weights.read("videoalign", model), trained.scaling, place.dtype)
    layer = {name: state.pop(name).float() for name in [*state] if name.startswith("rm_head.")}
    network = _qwen2_vl.assemble(place, model, base, _qwen2_vl.renamed(state))
    head = nn.ModuleDict({"rm_head": nn.Linear(network.config.text_config.hidden_size, 1, False)})
    _weights.fit("videoalign", model, head, layer)
    reader = Reader(place, network=network, tokenizer=tokenizer, judged=JUDGED, kind="video")
    return VideoAlign(
        place, reader=reader, head=head["rm_head"], trained=trained, fps=fps, parts=parts
    )
