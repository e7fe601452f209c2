"""How surely a text recogniser reads the prompted line.

`sfgrpo.rewards.ocr` for several characters: the recogniser takes the whole image for one line of
text, and the score is the probability p of the prompted one, summed over all its alignments
(connectionist temporal classification, Graves et al. 2006), by the character: p ^ (1 / length). The
root keeps lines with a wrong character apart from lines with several. Anything else that is read,
one character too many, too, lowers p.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sfgrpo.rewards.base import Metadata
from sfgrpo.rewards.ocr import CTC_BLANK, Recogniser


class LineReward:
    """Probability, by the character, of the line in `metadata["text"]`."""

    def __init__(self, *, threads: int, batch: int) -> None:
        self._recogniser = Recogniser(threads=threads, batch=batch)

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Tensor:
        targets = [self._target(entry) for entry in metadata]
        scores, done = [images.new_empty(0, dtype=torch.float32, device="cpu")], 0
        for part in self._recogniser.probabilities(images) if targets else ():
            scores.append(probability(part, targets[done : done + len(part)]))
            done += len(part)
        return torch.cat(scores)

    def check(self, prompts: Sequence[str], metadata: Sequence[Metadata]) -> None:
        """KeyError or ValueError for metadata whose "text" the recogniser could not read."""
        for entry in metadata:
            self._target(entry)

    def _target(self, entry: Metadata) -> list[int]:
        if "text" not in entry:
            raise KeyError("no metadata 'text', the line to be read")
        text, classes = entry["text"], self._recogniser.classes
        if not isinstance(text, str) or not text or set(text) - set(classes):
            raise ValueError(
                f"metadata['text'] must be characters of the recogniser's set, got {text!r}"
            )
        return [classes[char] for char in text]


def probability(positions: Tensor, targets: Sequence[Sequence[int]]) -> Tensor:
    """Length-normalised probabilities [B] of lines: probabilities [B, T, K] of the classes at T
    positions, and the classes of each line. 0 where T is too short for a line."""
    lengths = torch.tensor([len(target) for target in targets], device="cpu")
    losses = F.ctc_loss(
        # A probability may underflow; its logarithm may not.
        positions.clamp_min(torch.finfo(torch.float32).tiny).log().transpose(0, 1),
        torch.tensor([index for target in targets for index in target], device="cpu"),
        torch.full_like(lengths, positions.shape[1]),
        lengths,
        blank=CTC_BLANK,
        reduction="none",
    )
    return (-losses / lengths).exp()


def build(*, threads: int = 2, batch: int = 64) -> LineReward:
    """The reward of a readable line, on `threads` CPU cores, `batch` images at a time."""
    return LineReward(threads=threads, batch=batch)
