"""The tasks that this package has data, weights and judges for: what a caption asks to be drawn.

Every image is a line of real handwritten digits, side by side in cells of equal width. A task is
an entry of `TASKS`; data, architecture, pretraining and judges take whatever differs from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent

NUMERALS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True, kw_only=True)
class Task:
    """One kind of image and its captions."""

    name: str
    """What recipes call it, as `model.path` and `prompts`."""
    folder: Path
    """Holds `model/`, the pretrained pipeline, and `prompts.jsonl`."""
    height: int
    width: int
    """Pixels, multiples of 8: of the autoencoder's 4 and the transformer's patches of 2."""
    digits: int
    """In an image."""
    tallest: float
    shortest: float
    """Height in pixels of the scan that a digit fills, drawn between the two."""
    narrowing: float
    """A drawn digit's width by its height: the scans are square, printed digits are not."""
    caption: str
    """Of one image: {text}, {foreground} and {background} are filled in, {article} is that of the
    foreground."""
    spelled: bool
    """Whether {text} is a word, "seven", instead of numerals, "472"."""
    pairs: int | None
    """Pairs of colours that each text is prompted in; None is all that can be read."""
    images: int
    """Drawn once for pretraining."""
    batch: int
    """Of them to a step."""
    learning_rate: float
    """Of transformer and text encoders in pretraining."""
    vae_steps: int
    """Batches that fit the autoencoder, its decoder alone where it is another task's."""
    steps: int
    """Batches that fit the flow: stopped early on purpose, see `sfgrpo.embedded.pretrain`."""
    start: str | None = None
    """The task whose model pretraining starts from; None: from nothing."""

    @property
    def texts(self) -> list[str]:
        """What can be asked for: "0" to "9", "000" to "999", ..."""
        return [f"{number:0{self.digits}d}" for number in range(10**self.digits)]

    def describe(self, text: str, foreground: str, background: str) -> str:
        """The caption of `text` (numerals) in two colour words."""
        return self.caption.format(
            article="an" if foreground[0] in "aeiou" else "a",
            text=" ".join(NUMERALS[int(char)] for char in text) if self.spelled else text,
            foreground=foreground,
            background=background,
        )


DIGIT = Task(
    name="embedded",
    folder=HERE,
    height=32,
    width=32,
    digits=1,
    shortest=23,
    tallest=28,
    narrowing=0.85,
    caption="{article} {foreground} {text} on a {background} background",
    spelled=True,
    pairs=None,
    images=24_000,
    batch=64,
    learning_rate=2e-3,
    vae_steps=1000,
    steps=3000,
)
"""A digit: "a red seven on a dark blue background"."""

NUMBER = Task(
    name="numbers",
    folder=HERE / "numbers",
    height=32,
    width=64,
    digits=3,
    shortest=23,
    tallest=27,
    narrowing=0.75,
    # The numerals stand first, so that each has its place among the tokens.
    caption="{text} in {foreground} on {background}",
    spelled=False,
    pairs=1,
    images=12_000,
    batch=32,
    learning_rate=1e-3,
    vae_steps=300,
    steps=4000,
    start="embedded",
)
"""A number of three digits: "472 in red on dark blue"."""

TASKS = {task.name: task for task in (DIGIT, NUMBER)}


def find(name: str) -> Task:
    """The task called `name`; ValueError lists those there are."""
    if name not in TASKS:
        raise ValueError(f"unknown task '{name}'; there are: {', '.join(TASKS)}")
    return TASKS[name]
