"""Qwen2-VL as HPSv3 and VideoAlign use it: it reads a question about an image or a video, and what
it thinks of the answer is its state at tokens of their own.

Text, image and video count their positions one by one: the class that both published leaves out
Qwen2-VL's positions in three directions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from sfgrpo.rewards import _weights
from sfgrpo.rewards._weights import Place

TALK = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    "<|vision_start|>{shown}<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n"
)
"""Qwen2-VL's chat template of one question about one image or video."""
PAD = {"image": "<|image_pad|>", "video": "<|video_pad|>"}


def fitted(height: int, width: int, *, factor: int, least: int, most: int) -> tuple[int, int]:
    """Height and width in multiples of `factor`, of `least` to `most` pixels where that can be:
    Qwen2-VL's way."""
    whole = [max(factor, round(side / factor) * factor) for side in (height, width)]
    if math.prod(whole) > most:
        ratio = math.sqrt(height * width / most)
        whole = [math.floor(side / ratio / factor) * factor for side in (height, width)]
    elif math.prod(whole) < least:
        ratio = math.sqrt(least / (height * width))
        whole = [math.ceil(side * ratio / factor) * factor for side in (height, width)]
    return whole[0], whole[1]


def patches(videos: Tensor, *, patch: int, merge: int, frames: int) -> Tensor:
    """[B, F, 3, H, W] -> [B * patches, 3 * frames * patch * patch] in the order of Qwen2-VL: blocks
    of merge x merge patches, each of so many `frames` one after another."""
    rows, columns = (side // patch // merge for side in videos.shape[-2:])
    cut = videos.unflatten(4, (columns, merge, patch)).unflatten(3, (rows, merge, patch))
    timed = cut.unflatten(1, (-1, frames))  # [B, times, frames, 3, rows, merge, p, columns, ...]
    ordered = timed.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9)
    return ordered.flatten(0, 5).flatten(1)


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Qwen2-VL's weights in the names of transformers 4, in which they were published, as
    transformers names them since."""
    found = {}
    for name, value in state.items():
        if name.startswith("model."):
            found[f"language_model.{name.removeprefix('model.')}"] = value
        elif name != "lm_head.weight":  # writes text, which is not asked for
            found[name] = value
    return found


class Reader:
    """Qwen2-VL's states at the tokens `judged`, which stand in its question in this order."""

    def __init__(
        self, place: Place, *, network: Any, tokenizer: Any, judged: Sequence[str],
        kind: Literal["image", "video"],
    ) -> None:  # fmt: skip
        self._place, self._kind = place, kind
        self._network = place.settle(network)
        self._tokenizer = tokenizer
        self._judged = dict(zip(judged, tokenizer.convert_tokens_to_ids([*judged]), strict=True))
        vision = network.config.vision_config
        self.patch, self.merge = vision.patch_size, vision.spatial_merge_size
        self.frames = vision.temporal_patch_size

    @property
    def factor(self) -> int:
        """Of which height and width are multiples."""
        return self.patch * self.merge

    def __call__(self, videos: Tensor, texts: Sequence[str], prompts: Sequence[str]) -> Tensor:
        """States [B, judged, width] fp32.

        Args:
            videos: [B, F, 3, H, W], normalised, F and the sides multiples of `frames` and
                `factor`; an image is `frames` times itself.
            texts: the questions, one a video.
            prompts: what messages call the texts.

        Raises:
            ValueError: a text has a token of `judged` twice, from its prompt.
        """
        pixels = patches(videos, patch=self.patch, merge=self.merge, frames=self.frames)
        count, shown, _, height, width = videos.shape
        grid = torch.tensor([[shown // self.frames, height // self.patch, width // self.patch]])
        tokens = self._tokens(texts, prompts, int(grid.prod()) // self.merge**2)
        places = torch.arange(tokens["input_ids"].shape[1], device=self._place.device)
        values = "pixel_values" if self._kind == "image" else "pixel_values_videos"
        seen = {
            values: pixels.to(self._place.dtype),
            f"{self._kind}_grid_thw": grid.expand(count, -1).to(self._place.device),
        }
        read = self._network(
            **tokens, **seen, use_cache=False, position_ids=places.expand(3, count, -1)
        ).last_hidden_state
        found = [read[tokens["input_ids"] == token] for token in self._judged.values()]
        return torch.stack(found, 1).float()

    def _tokens(self, texts: Sequence[str], prompts: Sequence[str], seen: int) -> dict[str, Tensor]:
        """The whole talk of each text, with `seen` tokens of what is shown."""
        talks = [TALK.format(shown=PAD[self._kind] * seen, text=text) for text in texts]
        tokens = self._tokenizer(talks, padding=True, padding_side="right", return_tensors="pt")
        for word, token in self._judged.items():
            counts = (tokens["input_ids"] == token).sum(1)
            for prompt, count in zip(prompts, counts.tolist(), strict=True):
                if count != 1:
                    raise ValueError(f"the prompt has {word} in it: {prompt!r}")
        return {k: tokens[k].to(self._place.device) for k in ("input_ids", "attention_mask")}


def open_tokenizer(base: str, judged: Sequence[str]) -> Any:
    """The tokeniser of a folder or hub id, which knows the tokens `judged`, too."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([*judged], special_tokens=True)
    return tokenizer


def assemble(place: Place, model: str, base: str, state: Mapping[str, Tensor]) -> Any:
    """A network of weights in `renamed` names, its configuration of the folder or hub id `base`.

    Args:
        model: what messages call the weights.

    Raises:
        ValueError: they do not fit; names the first entry that does not.
    """
    from transformers import Qwen2VLConfig, Qwen2VLModel

    config: Any = Qwen2VLConfig.from_pretrained(base)
    words = state.get("language_model.embed_tokens.weight")
    if words is None:
        raise ValueError(
            f"reward '{place.reward}': '{model}' is no Qwen2-VL: no model.embed_tokens.weight"
        )
    config.text_config.vocab_size = len(words)
    return _weights.assemble(place, model, Qwen2VLModel, config, state)
