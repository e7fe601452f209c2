"""A run's logs and images -> one self-contained report.html, and a short summary in text."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from sfgrpo import files
from sfgrpo.report import logs, plots
from sfgrpo.run.records import read

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1f2933; background: #f7f9fa; margin: 0; }
main { max-width: 1080px; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; }
p.lead { color: #52606d; margin: 0 0 1.5rem; max-width: 70ch; }
.tiles { display: flex; flex-wrap: wrap; gap: .75rem; }
.tile { background: #fff; border: 1px solid #e4e7eb; border-radius: 10px; padding: .8rem 1rem;
        flex: 1 1 9.5rem; }
.tile b { display: block; font-size: 1.45rem; font-variant-numeric: tabular-nums; }
.tile span { color: #7b8794; font-size: .85rem; }
.pair { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; background: #fff; border: 1px solid #e4e7eb; border-radius: 10px;
         padding: .75rem; flex: 1 1 20rem; min-width: 0; }
figure img { width: 100%; height: auto; display: block; }
figcaption { color: #52606d; font-size: .9rem; margin-top: .4rem; }
pre { background: #fff; border: 1px solid #e4e7eb; border-radius: 10px; padding: 1rem;
      overflow-x: auto; font-size: .8rem; }
"""


def _picture(data: bytes, caption: str, kind: str = "png") -> str:
    encoded = base64.b64encode(data).decode()
    return (
        f'<figure><img alt="{html.escape(caption)}" src="data:image/{kind};base64,{encoded}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def _figure(figure: Figure, caption: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight")
    plt.close(figure)
    return _picture(buffer.getvalue(), caption)


def _numbers(log: Sequence[Mapping[str, Any]]) -> list[str]:
    names = [name for name in log[0] if name != "iteration"]
    return [name for name in names if all(isinstance(row.get(name), int | float) for row in log)]


def _tiles(evaluations: Sequence[Mapping[str, Any]]) -> str:
    first, last = evaluations[0], evaluations[-1]
    tiles = [
        f'<div class="tile"><span>{html.escape(name.replace("_", " "))}</span>'
        f"<b>{last[name]:.3f}</b><span>before: {first[name]:.3f}</span></div>"
        for name in _numbers(evaluations)
    ]
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _images(folder: Path, evaluations: Sequence[Mapping[str, Any]]) -> list[str]:
    """The section of pictures, if the run makes any."""
    if not (folder / "images").is_dir():
        return []
    first, last = evaluations[0]["iteration"], evaluations[-1]["iteration"]
    caption = "The same prompts and the same noise; all evaluated prompts are in the folder images."
    pictures = ["<h2>Images</h2>", _figure(plots.before_after(folder, first, last), caption)]
    return [*pictures, *_videos(folder, first, last)]


def _videos(folder: Path, first: int, last: int) -> list[str]:
    """The same videos before and after, playing side by side."""
    shown = []
    for after in sorted((folder / "videos").glob(f"{last:06d}-*.webp")):
        number = after.stem.partition("-")[2]
        before = after.with_name(f"{first:06d}-{number}.webp")
        for path, when in ((before, "before"), (after, "after")):
            shown.append(_picture(path.read_bytes(), f"{when}: video {number}", "webp"))
    return ["<h2>Videos</h2>", f'<div class="pair">{"".join(shown)}</div>'] if shown else []


def summary(folder: Path) -> str:
    """Before and after on held-out noise, as a table in text."""
    evaluations = read(folder / "eval.jsonl")
    first, last = evaluations[0], evaluations[-1]
    lines = [f"held-out noise         before    after   (iteration {last['iteration']})"]
    for name in _numbers(evaluations):
        lines.append(f"  {name:<20}{first[name]:>7.3f}{last[name]:>9.3f}")
    return "\n".join(lines)


def write(folder: Path) -> str:
    """Write `folder/report.html`; returns the summary and where the report is.

    Raises:
        ValueError: the folder holds no finished iteration.
    """
    metrics, evaluations = logs.rows(folder, "metrics"), logs.rows(folder, "eval")
    recipe, _ = logs.recipe(folder)
    judged = [name for name in _numbers(evaluations) if name != "reward"]
    curves = [
        _figure(plots.reward_curve(metrics, evaluations), "Mean reward of final images."),
        _figure(
            plots.gain_per_step(metrics),
            "How much the clean estimate improves or worsens in each step: where credit goes.",
        ),
        _figure(plots.reward_per_state(metrics), "How early the reward is decided."),
        _figure(plots.timing(read(folder / "timing.jsonl")), "Where the time goes."),
    ]
    counted = [row for row in metrics if "cost" in row]  # runs of earlier versions did not count
    if counted:
        caption = "What an iteration takes, on all ranks; under guidance a velocity is two rows."
        curves.append(_figure(plots.cost(counted), caption))
    body = [
        f"<h1>{html.escape(folder.name)}</h1>",
        f'<p class="lead">{metrics[-1]["iteration"]} iterations of GRPO on a flow-matching model. '
        "All numbers in this row were measured on noise that training never draws.</p>",
        _tiles(evaluations),
        *_images(folder, evaluations),
        "<h2>Reward and credit</h2>",
        f'<div class="pair">{"".join(curves)}</div>',
        "<h2>On held-out noise</h2>",
        _figure(
            plots.judges(evaluations, judged), "Rewards and judges; judges are never trained on."
        ),
        "<h2>Health of the optimisation</h2>",
        _figure(
            plots.health(metrics),
            "KL to the start, clipping, gradient norm, and |logp in training - logp at sampling|.",
        ),
        "<h2>Recipe</h2>",
        f"<pre>{html.escape(recipe)}</pre>",
    ]
    title = html.escape(f"sfgrpo: {folder.name}")
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body><main>{''.join(body)}</main></body></html>"
    )
    path = folder / "report.html"
    files.write(path, page)
    return f"{summary(folder)}\nreport: {path}"
