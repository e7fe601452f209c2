"""Prompt files, which prompts are trained on and which shown, and which an iteration draws."""

from __future__ import annotations

import hashlib
from importlib import resources
from pathlib import Path

import torch

from sfgrpo.prompts import files, folders, images
from sfgrpo.prompts.prompt import Prompt, Split

BUILTIN = {
    "embedded": ("sfgrpo.embedded", "prompts.jsonl"),
    "signs": ("sfgrpo.prompts.sets", "signs.jsonl"),
    "numbers": ("sfgrpo.embedded", "numbers/prompts.jsonl"),
    "sign_edits": ("sfgrpo.prompts.sets", "sign_edits.jsonl"),
}
"""Sets in this package; a folder of such a name is written `./signs`."""


def load(source: str) -> list[Prompt]:
    """The prompts of a source that training uses.

    A source is "embedded" or "numbers" (the sets of the embedded models), "signs" (prompts that ask
    for text in an image, `{"text": ...}`), "sign_edits" (the same of images that come along), a
    file (`sfgrpo.prompts.files`: text, JSON, CSV or Parquet), or a folder
    (`sfgrpo.prompts.folders`), of which this is the split "train". The prompt stands in the column
    "prompt", else "caption", else "text"; the others are its metadata. Rows with a blank prompt are
    passed over.

    Raises:
        ValueError: names the file or folder, and the line or row where there is one.
    """
    if _is_folder(source):
        return folders.training(folders.read(source), source)
    return _read_file(source)


def split(
    source: str, *, prompts_from: str | None = None, held_out: float = 0,
    pictures: range = images.NONE,
) -> Split:  # fmt: skip
    """The prompts of a run: to train on, and to show in evaluation.

    Evaluation shows, whichever is given: the prompts of `prompts_from` (a source like any other;
    of a folder its split for evaluation, or the only one); a share `held_out` of `source`, which
    training then never sees; the validation or test split of `source`, if it is a folder that has
    one. Otherwise it shows the training prompts, on noise that training never draws.

    A prompt is held out if the hash of its text, as a number in [0, 1), is below `held_out`. So the
    choice depends on no seed and no other prompt: it stays when a file grows or is sorted anew,
    copies of a prompt go together, and a larger share contains a smaller one. The share is
    `held_out` only on average.

    `pictures` is how many images a prompt may bring to the generator, under "image" in its
    metadata, see `sfgrpo.prompts.images`; if none, what stands there is for rewards alone.

    Raises:
        ValueError: as `load`; two of these are given; nothing would be left for one side; a
            prompt's images are too many or too few, or cannot be read.
    """
    if not 0 <= held_out < 1:
        raise ValueError(f"eval.held_out: needs 0 <= held_out < 1, got {held_out}")
    if prompts_from is not None and held_out:
        raise ValueError(
            f"eval: prompts_from ('{prompts_from}') and held_out ({held_out}) exclude each other"
        )
    if not _is_folder(source):
        train, brought = _read_file(source, pictures), None
    else:
        splits = folders.read(source, pictures=pictures)
        train = folders.training(splits, source)
        brought = folders.evaluation(splits)
    if prompts_from is not None:
        return Split(train=train, evaluation=_for_evaluation(prompts_from, pictures))
    if held_out and brought is not None:
        raise ValueError(
            f"eval.held_out: folder '{source}' has a split for evaluation; set held_out to 0, or "
            "name the file to train on"
        )
    if held_out:
        return _hold_out(train, held_out, source)
    return Split(train=train, evaluation=train if brought is None else brought)


def _hold_out(found: list[Prompt], share: float, source: str) -> Split:
    chosen = {prompt.text for prompt in found if _place(prompt.text) < share}
    train = [prompt for prompt in found if prompt.text not in chosen]
    evaluation = [prompt for prompt in found if prompt.text in chosen]
    if not train or not evaluation:
        side = "evaluation" if train else "training"
        raise ValueError(
            f"eval.held_out: {share} of the {len(found)} prompts of '{source}' leaves none for "
            f"{side}; use another share, or eval.prompts_from"
        )
    return Split(train=train, evaluation=evaluation)


def _place(text: str) -> float:
    """The hash of a text as a number in [0, 1)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def _for_evaluation(source: str, pictures: range) -> list[Prompt]:
    if not _is_folder(source):
        return _read_file(source, pictures)
    splits = folders.read(source, pictures=pictures)
    found = folders.evaluation(splits)
    return folders.training(splits, source) if found is None else found


def _is_folder(source: str) -> bool:
    return source not in BUILTIN and Path(source).is_dir()


def _read_file(source: str, pictures: range = images.NONE) -> list[Prompt]:
    path = Path(source)
    if source in BUILTIN:
        package, name = BUILTIN[source]
        path = resources.files(package) / name
    elif not path.is_file():
        raise ValueError(
            f"prompts: file '{source}' does not exist, nor does a folder; known sets are "
            f"{', '.join(BUILTIN)}"
        )
    elif not files.readable(source):
        raise ValueError(
            f"prompts: '{source}' is none of {', '.join(files.READERS)}; other formats are read "
            "from a folder that holds them"
        )
    found = files.read(path, source, pictures=pictures)
    if not found:
        raise ValueError(f"prompts: '{source}' holds no prompt")
    return found


def draw(count: int, available: int, *, seed: int, iteration: int) -> list[int]:
    """Which prompts iteration `iteration` uses: each once per pass, each pass in its own order.

    Every prompt drawn becomes one group, `sample.group_size` trajectories over all ranks together:
    Flow-GRPO's "repeat k" sampling (its `DistributedKRepeatSampler`, which draws an iteration's
    prompts from all of the file, where this one goes through the file before it repeats a prompt).
    An iteration in which one pass ends and another begins may draw a prompt in both: two groups.

    A function of its arguments alone, whatever torch's default device is, so a resumed run draws
    what the first would have.
    """
    drawn: list[int] = []
    for position in range(iteration * count, (iteration + 1) * count):
        epoch, place = divmod(position, available)
        generator = torch.Generator("cpu").manual_seed((seed * 1_000_003 + epoch) % 2**63)
        order = torch.randperm(available, generator=generator, device="cpu")
        drawn.append(int(order[place]))
    return drawn


def spread(count: int, available: int) -> list[int]:
    """`count` prompts spread evenly over the file, the same every time."""
    # A default dtype of bfloat16 would round to other prompts.
    places = torch.linspace(
        0, available - 1, min(count, available), dtype=torch.float32, device="cpu"
    )
    return places.round().long().tolist()
