"""How surely a text recogniser reads the prompted character.

The recogniser is PP-OCRv6 (small), an ONNX file inside the `rapidocr` wheel (Apache-2.0). The
package itself is never imported: its detector and its image loading are of no use here, since the
whole image is the line of text. The score is the recogniser's probability, not right or wrong: an
image that is almost legible already scores above one that is not, which is what makes the change
of the reward along a trajectory informative.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from torch import Tensor

from sfgrpo.rewards.base import Metadata, expect_images

MODEL = Path("models") / "PP-OCRv6_rec_small.onnx"
HEIGHT = 48
CTC_BLANK = 0


def model_path() -> Path:
    """The recogniser inside the installed `rapidocr`; FileNotFoundError says what to install."""
    spec = importlib.util.find_spec("rapidocr")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            "the ocr reward needs the package rapidocr: pip install rapidocr==3.10.0"
        )
    path = Path(spec.origin).parent / MODEL
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: install rapidocr==3.10.0, which ships this model")
    return path


def alphabet(session: onnxruntime.InferenceSession) -> list[str]:
    """The characters that a recogniser can read, in the order of its classes after the blank."""
    return session.get_modelmeta().custom_metadata_map["character"].splitlines()


class Recogniser:
    """Reads an image as one line of text; `classes` are the numbers of its characters."""

    def __init__(self, *, threads: int, batch: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Threads that spin while they wait take the cores that PyTorch is about to need.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(
            model_path(), options, providers=["CPUExecutionProvider"]
        )
        self._input = self._session.get_inputs()[0].name
        characters = alphabet(self._session)
        self.classes = {char: index for index, char in enumerate(characters, start=CTC_BLANK + 1)}
        self.batch = batch

    def probabilities(self, images: Tensor) -> Iterator[Tensor]:
        """Class probabilities [B, T, K] of images [B, 3, H, W], one row per 8 columns of pixels; a
        batch at a time, since K is 18,710."""
        expect_images(images)
        height, width = images.shape[-2:]
        columns = max(1, round(HEIGHT * width / height))
        resized = F.interpolate(
            images.detach().float().cpu(),
            size=(HEIGHT, columns),
            mode="bilinear",
            antialias=height > HEIGHT,
            align_corners=False,
        )
        # The recogniser was trained on OpenCV images: blue first, in [-1, 1].
        pixels = (resized.flip(1) * 2 - 1).numpy()
        for i in range(0, len(pixels), self.batch):
            (found,) = self._session.run(None, {self._input: pixels[i : i + self.batch]})
            yield torch.from_numpy(np.asarray(found))

    def read(self, images: Tensor) -> list[str]:
        """The likeliest text of each image by greedy decoding; the last class is the blank space,
        which the alphabet leaves out."""
        characters = {index: char for char, index in self.classes.items()}
        return [
            "".join(characters.get(int(index), " ") for index in row.unique_consecutive() if index)
            for part in self.probabilities(images)
            for row in part.argmax(2)
        ]


class OcrReward:
    """Probability of the character in `metadata["text"]`, at the position where it is largest."""

    def __init__(self, *, threads: int, batch: int) -> None:
        self._recogniser = Recogniser(threads=threads, batch=batch)

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Tensor:
        if not metadata:
            return images.new_empty(0, dtype=torch.float32)
        targets = torch.tensor([self._target(entry) for entry in metadata], device="cpu")
        parts = self._recogniser.probabilities(images)
        return torch.cat(
            [
                part.take_along_dim(target[:, None, None], 2).amax((1, 2))
                for part, target in zip(parts, targets.split(self._recogniser.batch), strict=True)
            ]
        )

    def check(self, prompts: Sequence[str], metadata: Sequence[Metadata]) -> None:
        """KeyError or ValueError for metadata whose "text" is no character of the recogniser's."""
        for entry in metadata:
            self._target(entry)

    def _target(self, entry: Metadata) -> int:
        if "text" not in entry:
            raise KeyError("no metadata 'text', the character to be read")
        text = entry["text"]
        if not isinstance(text, str) or text not in self._recogniser.classes:
            raise ValueError(
                f"metadata['text'] must be one character of the recogniser's set, got {text!r}"
            )
        return self._recogniser.classes[text]


def build(*, threads: int = 2, batch: int = 64) -> OcrReward:
    """The OCR reward, on `threads` CPU cores, `batch` images at a time."""
    return OcrReward(threads=threads, batch=batch)
