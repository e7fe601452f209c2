"""GenEval: are the prompted objects there, in number, colour and place (Ghosh et al. 2023, arXiv
2310.11513)?

A detector looks for what each prompt's metadata tell, in GenEval's own format:

    {"include": [{"class": "cup", "count": 2, "color": "red"},
                 {"class": "dog", "count": 1, "position": ["left of", 0]}],
     "exclude": [{"class": "cup", "count": 3}], "tag": "position"}

Colours are CLIP's choice among ten, on the cut out object before grey; places are those of boxes'
centres. Three scores, as `score` chooses:

    correct  1 if all of it holds, else 0: GenEval's, with at least as many objects as are asked for
    strict   the same with exactly as many, without `exclude`: Flow-GRPO's strict reward
    partial  the share that holds, in [0, 1]: what Flow-GRPO trains with. As published, a wrong
             place still counts half of its share

The published detector is mmdetection's Mask2Former (Swin-S); the default is the same network by its
authors in transformers' format. One that is asked in words (OWLv2, Grounding DINO) finds classes
that COCO does not have. Images are [B, 3, H, W] in [0, 1]. Code: MIT (GenEval); weights: MIT
(Mask2Former, CLIP).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sfgrpo.names import unknown_name
from sfgrpo.rewards import _zero_shot
from sfgrpo.rewards._clip import Clip
from sfgrpo.rewards._detector import Box, Detector, Found
from sfgrpo.rewards._weights import Place, Settings, Weights
from sfgrpo.rewards._zero_shot import ZeroShot
from sfgrpo.rewards.base import Metadata

SCORES = ("correct", "strict", "partial")
COLOURS = (
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white",
)  # fmt: skip
TEMPLATES = (
    "a photo of a {c} {name}",
    "a photo of a {c}-colored {name}",
    "a photo of a {c} object",
)
GREY = 0x99 / 255
RELATIONS = ("left of", "right of", "above", "below")
ALIASES = {"computer mouse": "mouse", "tv remote": "remote", "computer keyboard": "keyboard"}
"""GenEval's names of classes that COCO, and so a detector, calls otherwise."""
MOST = 16
"""Objects of a class that are looked at."""
SLACK = 0.1
"""Of the objects' sizes, that centres may lie apart and still be level."""


def relations(a: Box, b: Box) -> set[str]:
    """Where the first box is, seen from the second; two words if it is so diagonally."""
    offset = [(a[k] + a[k + 2] - b[k] - b[k + 2]) / 2 for k in (0, 1)]
    sizes = [a[k + 2] - a[k] + b[k + 2] - b[k] for k in (0, 1)]
    apart = [max(abs(o) - SLACK * s, 0) for o, s in zip(offset, sizes, strict=True)]
    if max(apart) < 1e-3:
        return set()
    x, y = (math.copysign(d, o) / math.hypot(*offset) for d, o in zip(apart, offset, strict=True))
    held = zip(RELATIONS, (x < -0.5, x > 0.5, y < -0.5, y > 0.5), strict=True)
    return {relation for relation, holds in held if holds}


def judge(
    objects: Mapping[str, Sequence[Found]],
    entry: Metadata,
    colours: Callable[[Sequence[Found], str], list[str]],
    *,
    exact: bool,
) -> tuple[bool, float]:
    """Whether an image has what its metadata ask for, and what share of it.

    Args:
        objects: class -> what was found of it, the surest first.
        colours: the colour of each object of a class.
        exact: whether more objects than are asked for are wrong.
    """
    groups: list[Sequence[Found] | None] = []
    shares: list[float] = []
    for clause in entry["include"]:
        name, count = clause["class"], clause["count"]
        found = objects.get(name, [])
        found = found if exact else found[:count]
        shares.append(1 - abs(count - len(found)) / count)
        good = len(found) == count
        if not good and ("color" in clause or "position" in clause):
            shares.append(0.0)
        if good and "color" in clause:
            right = colours(found, name).count(clause["color"])
            shares.append(1 - abs(count - right) / count)
            good = right == count
        if good and "position" in clause:
            relation, target = clause["position"]
            others = groups[target]
            good = others is not None and all(
                relation in relations(a.box, b.box) for a in found for b in others
            )
            shares += [] if good else [0.0]
            shares += [1.0] if others is not None else []
        groups.append(found if good else None)
    there = all(group is not None for group in groups)
    if not exact:
        unwanted = entry.get("exclude", [])
        there = there and all(len(objects.get(c["class"], [])) < c["count"] for c in unwanted)
    return there, sum(shares) / len(shares)


class GenEval:
    """Whether the prompted objects are there."""

    def __init__(
        self, detector: Detector | ZeroShot, clip: Clip, *, score: str,
        thresholds: tuple[float, float],
    ) -> None:  # fmt: skip
        self._detector, self._clip = detector, clip
        self._score = score
        self._threshold, self._counting = thresholds
        self._named: dict[str, Tensor] = {}

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Tensor:
        found = self._detector(
            images, threshold=min(self._threshold, self._counting), asked=[*map(classes, metadata)]
        )
        scores = [
            self._of(image, objects, entry)
            for image, objects, entry in zip(images, found, metadata, strict=True)
        ]
        return torch.tensor(scores, dtype=torch.float32, device="cpu")

    def check(self, prompts: Sequence[str], metadata: Sequence[Metadata]) -> None:
        """KeyError or ValueError for metadata that are not in GenEval's format, or ask for what the
        detector does not know."""
        for entry in metadata:
            if not entry.get("include"):
                raise KeyError("no metadata 'include', the list of objects to be found")
            for place, clause in enumerate(entry["include"]):
                self._check(clause, place)
            for clause in entry.get("exclude", []):
                self._check(clause, 0)

    def _check(self, clause: Any, place: int) -> None:
        if not isinstance(clause, Mapping) or not {"class", "count"} <= clause.keys():
            raise ValueError(f"an object needs 'class' and 'count', got {clause!r}")
        name, count = clause["class"], clause["count"]
        known = self._detector.labels
        if known is None and (not isinstance(name, str) or not name.strip() or "." in name):
            raise ValueError(f"class must be words without a full stop, got {name!r}")
        if known is not None and ALIASES.get(name, name) not in known:
            raise ValueError(unknown_name("class", str(name), known))
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"count must be a whole number from 1, got {count!r}")
        if "color" in clause and clause["color"] not in COLOURS:
            raise ValueError(unknown_name("color", str(clause["color"]), COLOURS))
        if "position" in clause:
            match clause["position"]:
                case [str(relation), int(other)] if relation in RELATIONS and 0 <= other < place:
                    return
            raise ValueError(
                f"position must be one of {list(RELATIONS)} and the number of an earlier object, "
                f"got {clause['position']!r}"
            )

    def _of(self, image: Tensor, objects: Mapping[str, list[Found]], entry: Metadata) -> float:
        least = self._counting if entry.get("tag") == "counting" else self._threshold
        called = {label: name for name, label in ALIASES.items()}
        kept = {
            key: [it for it in found if it.score > least][:MOST]
            for label, found in objects.items()
            for key in (label, called.get(label, label))
        }
        there, share = judge(
            kept, entry, lambda found, name: self._colours(image, found, name),
            exact=self._score != "correct",
        )  # fmt: skip
        return share if self._score == "partial" else float(there)

    def _colours(self, image: Tensor, found: Sequence[Found], name: str) -> list[str]:
        """The colour of each object, of [3, H, W]."""
        seen = torch.cat([self._clip.images(cut_out(image, it)[None]) for it in found])
        best = (seen @ self._names(name).T).argmax(1)
        return [COLOURS[n] for n in best.tolist()]

    def _names(self, name: str) -> Tensor:
        """Embeddings of a class in each colour, [colours, D]: the mean over the templates."""
        if name not in self._named:
            texts = [t.format(c=colour, name=name) for colour in COLOURS for t in TEMPLATES]
            means = self._clip.texts(texts).unflatten(0, (len(COLOURS), -1)).mean(1)
            self._named[name] = F.normalize(means, dim=1)
        return self._named[name]


def classes(entry: Metadata) -> tuple[str, ...]:
    """What metadata ask for, each once."""
    clauses = [*entry["include"], *entry.get("exclude", [])]
    return tuple(dict.fromkeys(clause["class"] for clause in clauses))


def cut_out(image: Tensor, found: Found) -> Tensor:
    """What of [3, H, W] is in the object's box, grey where its mask is not."""
    left, top, right, bottom = (round(side) for side in found.box)
    if found.mask is not None:
        image = torch.where(found.mask.to(image.device), image, GREY)
    # A box of less than a pixel is looked at as one.
    left, top = min(left, image.shape[2] - 1), min(top, image.shape[1] - 1)
    return image[:, top : max(bottom, top + 1), left : max(right, left + 1)]


def build(
    *,
    detector: Weights = "facebook/mask2former-swin-small-coco-instance",
    clip: Weights = "openai/clip-vit-large-patch14",
    processor: Settings | None = None,
    score: Literal["correct", "strict", "partial"] = "correct",
    threshold: float = 0.3,
    counting_threshold: float = 0.9,
    device: str = "auto",
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32",
    batch: int = 8,
) -> GenEval:
    """The GenEval reward.

    Args:
        detector: local folder or hub id of a detector (safetensors), with COCO's classes: instance
            segmentation, or boxes alone (DETR, YOLOS), whose objects keep what is around them; or
            with any classes: OWL-ViT, OWLv2, Grounding DINO, which are asked for them in words and
            find boxes, of other scores than `threshold` and `counting_threshold` are made for.
        clip: local folder or hub id of the CLIP model that tells colours.
        processor: of its tokeniser and image settings, if they are elsewhere.
        score: which of those above.
        threshold: an object is passed over if the detector is no surer of it.
        counting_threshold: the same where the metadata's tag is "counting".
        device: "auto" is this rank's GPU, or the CPU where there is none.
        dtype: precision of both networks.
        batch: images of one forward.

    Raises:
        ValueError: values that make no sense, naming them.
        OSError: transformers' message, where a model cannot be found or has no safetensors.
    """
    if score not in SCORES:
        raise ValueError(f"reward 'geneval': score must be one of {list(SCORES)}, got {score!r}")
    for name, value in (("threshold", threshold), ("counting_threshold", counting_threshold)):
        if not 0 <= value < 1:
            raise ValueError(f"reward 'geneval': {name} must be from 0 and below 1, got {value}")
    place = Place.of("geneval", device=device, dtype=dtype, batch=batch)
    eyes = Clip.load(place, model=clip, processor=processor or clip, rounds=True)
    kind = ZeroShot if _zero_shot.knows(detector) else Detector
    finder = kind(place, model=detector)
    return GenEval(finder, eyes, score=score, thresholds=(threshold, counting_threshold))
