"""The sections of one run's report."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sfgrpo.report import curves, logs, markup, pictures
from sfgrpo.run.records import read

Log = Sequence[Mapping[str, Any]]

SHOWN = 8
"""Prompts whose images are shown."""


def images(run: Path, evaluations: Log) -> str:
    """Prompts with their images before and after; nothing if the run makes none."""
    asked = pictures.prompts(run)
    first, last = evaluations[0]["iteration"], evaluations[-1]["iteration"]
    paths = [run / "images" / f"{iteration:06d}.png" for iteration in (first, last)]
    if not asked or not all(path.is_file() for path in paths):
        return ""
    columns = logs.parsed(run).get("eval", {}).get("images_per_prompt", 1)
    before, after = (pictures.Grid(path, len(asked), columns) for path in paths)
    changes = _changes(run, len(asked), first, last)
    if changes is None:
        chosen = [(prompt, "") for prompt in pictures.spread(len(asked), SHOWN)]
        middle = -(-len(chosen) // 2)
        lists = {"": chosen[:middle], " ": chosen[middle:]}
    else:
        most, least = -(-len(changes) // 2), len(changes) // 2
        lists = {
            "Improved most": changes[::-1][: min(SHOWN // 2, most)],
            "Improved least": changes[: min(SHOWN // 2, least)],
        }
    shown = [
        f'<div class="card">{f"<h3>{title}</h3>" if title.strip() else ""}'
        f"{''.join(_pair(asked[k], told, before, after, k, run) for k, told in rows)}</div>"
        for title, rows in lists.items()
        if rows
    ]
    return markup.section(
        "images", "Images",
        "Left the model before training, right the trained one: the same prompts and the same "
        "noise, which training never draws. All evaluated prompts are in the run's folder images.",
        f'<div class="cards">{"".join(shown)}</div>', *_videos(run, first, last),
    )  # fmt: skip


def _changes(run: Path, count: int, first: int, last: int) -> list[tuple[int, str]] | None:
    """The prompts by how much their reward rose, least first, with what is told of it; None for a
    run that did not keep the rewards of prompts."""
    rows = {row["iteration"]: row for row in read(run / "eval_prompts.jsonl")}
    if not {first, last} <= rows.keys():
        return None
    before, after = rows[first]["reward"], rows[last]["reward"]
    known = [k for k in range(count) if before[k] is not None and after[k] is not None]
    order = sorted(known, key=lambda k: after[k] - before[k])
    return [(k, _change(before[k], after[k])) for k in order]


def _change(before: float, after: float) -> str:
    kind = "good" if after >= before else "bad"
    return f'{before:.2f} to {after:.2f} <b class="{kind}">{after - before:+.2f}</b>'


def _pair(
    prompt: str, told: str, before: pictures.Grid, after: pictures.Grid, row: int, run: Path
) -> str:
    text = textwrap.shorten(prompt, 160, placeholder="...")
    change = f'<span class="number">{told}</span>' if told else ""
    brought = pictures.source(run, row, f"source: {text}")
    source = f'<div class="source">{brought}<small>source</small></div>' if brought else ""
    return (
        f'<div class="prompt"><p>{markup.escaped(text)}{change}</p>{source}'
        f"<div>{before.row(row, f'before: {text}')}<small>before</small></div>"
        f"<div>{after.row(row, f'after: {text}')}<small>after</small></div></div>"
    )


def _videos(run: Path, first: int, last: int) -> list[str]:
    """The same videos before and after, playing side by side."""
    shown = []
    for after in sorted((run / "videos").glob(f"{last:06d}-*.webp")):
        number = after.stem.partition("-")[2]
        before = after.with_name(f"{first:06d}-{number}.webp")
        for path, when in ((before, "before"), (after, "after")):
            told = f"{when}: video {number}"
            shown.append(
                f"<figure>{pictures.video(path, told)}<figcaption>{told}</figcaption></figure>"
            )
    return ["<h3>Videos</h3>", markup.cards(shown, small=True)] if shown else []


def credit(metrics: Log, evaluations: Log) -> str:
    """How the reward rose and which steps earned it."""
    cards = [
        markup.figure(
            curves.reward(metrics, evaluations), "Reward",
            "Mean reward of final images. Training samples are drawn with noise in their steps and "
            "new prompts each time, so their curve is rougher than that of the evaluations.",
        )
    ]  # fmt: skip
    if np.any([row["gain_per_step"] for row in metrics]):
        cards += [
            markup.figure(
                curves.gains(metrics), "Where credit goes",
                "Mean |gain| of each step in each iteration: how much the reward of the clean "
                "estimate, the image that the state would become without further noise, changes in "
                "the step. Blank cells are steps without noise, which earn no credit.",
            ),
            markup.figure(
                curves.gain_per_step(metrics), "Mean |gain| per step",
                "The same over the first and the last fifth of the run. As the policy improves, "
                "there is less left to decide.",
            ),
            markup.figure(
                curves.reward_per_state(metrics), "How early the reward is decided",
                "Mean reward of the clean estimate of each state. A curve that is flat from some "
                "state on says that what comes later changes nothing on average. With a window of "
                "noise each state is scored in some iterations only, so curves are rough.",
            ),
        ]  # fmt: skip
    lead = (
        "A step is credited with its gain: the reward of the clean estimate after the step minus "
        "that before it."
        if len(cards) > 1
        else "Every step is credited with the reward of the final image; no gains were measured."
    )
    return markup.section("credit", "Reward and credit", lead, markup.cards(cards))


def judges(evaluations: Log, names: Sequence[str]) -> str:
    """Everything else that was measured on held-out noise."""
    if not names:
        return ""
    shown = [
        markup.figure(curves.number(evaluations, name, dots=True), name.replace("_", " "), "")
        for name in names
    ]
    return markup.section(
        "judges", "On held-out noise",
        "The parts of the reward, and judges: measures that training never sees. A reward that "
        "rises while they worsen is being exploited.",
        markup.cards(shown, small=True),
    )  # fmt: skip


ALWAYS = ("kl", "grad_norm", "clip_fraction")
"""Numbers that are shown even if they are 0 throughout; a drift that is says nothing."""


def health(metrics: Log, clip_range: float | None) -> str:
    """Whether the optimisation is in order."""
    shown = [
        markup.figure(curves.number(metrics, name), title, caption)
        for name, title, caption in (
            ("kl", "KL to the start", "How far the policy has moved from the model it began as."),
            ("grad_norm", "Gradient norm", "Before clipping, mean of the optimiser steps."),
            ("clip_fraction", "Clip fraction", "Rows whose ratio left the clip range."),
            (
                "logp_drift_max", "Largest drift",
                "|log-density in training - at sampling| of the worst row, before the first "
                "update. Rounding explains a little; dropout or other weights would show here.",
            ),
        )
        if name in metrics[0] and (name in ALWAYS or any(row.get(name) for row in metrics))
    ]  # fmt: skip
    if clip_range is not None and "ratio_min" in metrics[0]:
        told = (
            f"New over old probability of a step, the extremes of each iteration; the band is the "
            f"clip range, 1 +- {clip_range:g}."
        )
        shown.append(markup.figure(curves.ratio(metrics, clip_range), "Ratio", told))
    return markup.section(
        "optimisation", "Optimisation",
        "Numbers of the policy updates, one point for each iteration.",
        markup.cards(shown, small=True), markup.cards(_per_step(metrics)),
    )  # fmt: skip


PER_STEP = {
    "clip_fraction_per_step": (
        "Clip fraction per step", "share of rows",
        "Which steps leave the clip range; blank where none did. Late steps have little noise, so "
        "that a small change of the network moves their log-density most.",
    ),
    "ratio_deviation_per_step": (
        "Ratio per step", "mean |ratio - 1|",
        "How far the ratio is from 1 at each step, over all optimiser steps of an iteration.",
    ),
    "logp_drift_per_step": (
        "Drift per step", "mean |difference|",
        "|log-density in training - at sampling| at each step; blank where both agree to the bit.",
    ),
}  # fmt: skip
"""Numbers of each step: title, unit, caption."""


def _per_step(metrics: Log) -> list[str]:
    """Heat maps of the numbers that the run has and that are not 0 throughout."""
    return [
        markup.figure(curves.heat(metrics, name, unit, logarithmic=True), title, caption)
        for name, (title, unit, caption) in PER_STEP.items()
        if np.any([row[name] for row in metrics if name in row])
    ]


def recipe(text: str) -> str:
    """The recipe with all its keys."""
    return markup.section(
        "recipe", "Recipe", "Every key of the run; the same recipe and seed repeat it.",
        f"<details><summary>show</summary><pre>{markup.escaped(text)}</pre></details>",
    )  # fmt: skip


def clip_range(run: Path) -> float | None:
    """`train.clip_range` of a run's recipe."""
    return logs.parsed(run).get("train", {}).get("clip_range")
