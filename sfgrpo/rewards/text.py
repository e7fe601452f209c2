"""How much of a given text can be read in an image: the OCR reward of Flow-GRPO (arXiv 2505.05470).

All text of the image is found and read by PP-OCRv6 (detector and recogniser, small), which the
package `rapidocr` brings along: nothing is downloaded. With r what was read, t the target, both
normalised, and d the edit distance,

    score = 1 - min(d(r, t), |t|) / |t|

Flow-GRPO's code gives 1 to a target that stands anywhere in what was read, its paper does not;
`anywhere` chooses. A target with a character outside the recogniser's alphabet (Cyrillic, Hebrew,
Hangul, ...) is refused, since the best image of it would score as the worst. Where
`sfgrpo.rewards.ocr` is told a single character and asks how surely it is there, this reward reads
lines wherever they are, in images large enough to have some.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Literal

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from sfgrpo.cores import cores
from sfgrpo.rewards import ocr
from sfgrpo.rewards.base import Metadata, expect_images

DETECTOR = "PP-OCRv6_det_small.onnx"


def normalise(text: str) -> str:
    """Without white space and differences of case; compatible forms become one (Unicode's NFKC),
    since the recogniser likes to read "!" as its full-width twin."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance: how many characters to insert, delete or replace."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        corner, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (left != right))
    return row[-1]


def quoted(prompt: str) -> str | None:
    """What stands between the first two double quotes; None if there are no two."""
    parts = prompt.split('"', 2)
    return parts[1] if len(parts) == 3 else None


class TextReward:
    """1 where the image reads as the target, 0 where nothing of it does."""

    def __init__(
        self,
        *,
        target: Literal["metadata", "quoted"],
        anywhere: bool,
        confidence: float,
        side: int,
        threads: int,
    ) -> None:
        if target not in ("metadata", "quoted"):
            raise ValueError(
                f"reward 'text': target must be 'metadata' or 'quoted', got {target!r}"
            )
        if not 0 <= confidence < 1 or side < 32 or threads < 1:
            raise ValueError(
                "reward 'text': needs 0 <= confidence < 1, side >= 32 and threads >= 1, got "
                f"{confidence}, {side} and {threads}"
            )
        recogniser = ocr.model_path()
        session = onnxruntime.InferenceSession(recogniser, providers=["CPUExecutionProvider"])
        self._readable = set().union(*map(normalise, ocr.alphabet(session)))
        from rapidocr import RapidOCR

        self._engine = RapidOCR(
            params={
                # Given paths are taken as they are; names are looked up, and downloaded if absent.
                "Det.model_path": str(recogniser.with_name(DETECTOR)),
                "Rec.model_path": str(recogniser),
                "Det.limit_side_len": side,
                "Global.text_score": confidence,
                "Global.use_cls": False,
                # It warns of every image without text.
                "Global.log_level": "error",
                # A number above that of the cores would be ignored.
                "EngineConfig.onnxruntime.intra_op_num_threads": min(threads, cores()),
                "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            }
        )
        self._target = target
        self._anywhere = anywhere

    def read(self, image: Tensor) -> str:
        """All text of an image [3, H, W], line after line, top to bottom."""
        bytes_HWC = (image.detach().float().cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
        # The models were trained on OpenCV's images: blue first.
        found = self._engine(np.ascontiguousarray(bytes_HWC.numpy()[..., ::-1]))
        return " ".join(getattr(found, "txts", None) or ())

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Tensor:
        expect_images(images)
        targets = [self._asked(*pair) for pair in zip(prompts, metadata, strict=True)]
        scores = [
            self._score(normalise(self.read(image)), target)
            for image, target in zip(images, targets, strict=True)
        ]
        return torch.tensor(scores, dtype=torch.float32, device="cpu")

    def check(self, prompts: Sequence[str], metadata: Sequence[Metadata]) -> None:
        """KeyError or ValueError for a prompt whose target is missing or cannot be read."""
        for pair in zip(prompts, metadata, strict=True):
            self._asked(*pair)

    def _score(self, text: str, target: str) -> float:
        if self._anywhere and target in text:
            return 1.0
        return 1 - min(edit_distance(text, target), len(target)) / len(target)

    def _asked(self, prompt: str, entry: Metadata) -> str:
        if self._target == "quoted":
            text = quoted(prompt)
            if text is None:
                raise ValueError(f"reward 'text': no text in double quotes in prompt {prompt!r}")
        elif "text" not in entry:
            raise KeyError(
                f"reward 'text': prompt {prompt!r} has no metadata 'text', the text to be read; "
                "the option target: quoted takes what the prompt has in double quotes"
            )
        else:
            text = entry["text"]
        if not isinstance(text, str) or not normalise(text):
            raise ValueError(f"reward 'text': nothing to read in {text!r}, of prompt {prompt!r}")
        target = normalise(text)
        if unknown := set(target) - self._readable:
            raise ValueError(
                f"reward 'text': the recogniser cannot read {' '.join(sorted(unknown))} of "
                f"{text!r}, of prompt {prompt!r}; no image would score"
            )
        return target


def build(
    *,
    target: Literal["metadata", "quoted"] = "metadata",
    anywhere: bool = False,
    confidence: float = 0.5,
    side: int = 736,
    threads: int = 2,
) -> TextReward:
    """The reward of readable text, on `threads` CPU cores.

    Args:
        target: where the text to be read stands: in `metadata["text"]`, or in the prompt between
            double quotes, as in Flow-GRPO's files.
        anywhere: whether the target may stand in the middle of other text at no cost.
        confidence: a line is passed over if the recogniser is less sure of it.
        side: pixels that the shorter side of an image is enlarged to before text is looked for;
            smaller is faster.
    """
    return TextReward(
        target=target, anywhere=anywhere, confidence=confidence, side=side, threads=threads
    )
