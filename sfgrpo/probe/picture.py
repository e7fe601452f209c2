"""What a probe found, as a picture."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from sfgrpo import files
from sfgrpo.names import shortened
from sfgrpo.probe.findings import Findings, Measured
from sfgrpo.report.plots import COLOURS, INK, MUTED


def draw(found: Findings, out: Path) -> None:
    """Agreement against cost, agreement of each step, and what each step explains."""
    figure, (cost, steps, shares) = plt.subplots(1, 3, figsize=(16.5, 4.4))
    _cost(cost, found)
    _agreement(steps, found)
    _shares(shares, found)
    # Here it hides nothing: what costs more agrees better.
    cost.legend(*steps.get_legend_handles_labels(), loc="lower right", fontsize=8)
    with files.replacing(out) as aside:
        figure.savefig(aside, dpi=140)
    plt.close(figure)


def _cost(axes: Axes, found: Findings) -> None:
    """A disc for each way to get advantages, the recipe's ringed, and a diamond for each window."""
    for row, colour in zip(found.rows, COLOURS * 2, strict=False):
        axes.errorbar(
            found.sampling + row.evaluations, row.agreement.value, _bar(row.agreement), fmt="o",
            color=colour, capsize=3, markersize=9, markeredgewidth=2,
            markeredgecolor=INK if row.chosen else colour,
        )  # fmt: skip
    for row in found.windows:
        x, y = row.sampling + row.evaluations, row.agreement.value
        axes.plot(x, y, "D", color=MUTED, markersize=5)
        place = f"{row.steps[0]}-{row.steps[-1]}"
        axes.annotate(place, (x, y), (4, 4), textcoords="offset points", fontsize=7, color=MUTED)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(
        title="Agreement with exact estimates against cost",
        xlabel="network rows of a trajectory (diamonds: noise in these steps alone)",
        ylabel="correlation of the advantages",
    )


def _bar(measured: Measured) -> float | None:
    return None if math.isnan(measured.error) else measured.error


def _agreement(axes: Axes, found: Findings) -> None:
    """One line for each, in the colours of the first panel."""
    noisy = [step.step for step in found.steps if step.noise]
    for row, colour in zip(found.rows, COLOURS * 2, strict=False):
        label = shortened(row.name) + (" (the recipe's)" if row.chosen else "")
        values = [row.per_step[k] for k in noisy]
        axes.plot(
            noisy, [math.nan if v is None else v for v in values], "o-", color=colour,
            markersize=4, linewidth=2.4 if row.chosen else 1.4, label=label,
        )  # fmt: skip
    axes.set_xticks(noisy)
    axes.set(title="Agreement of each step", xlabel="sampling step")


def _shares(axes: Axes, found: Findings) -> None:
    """Bars that add up to 1."""
    places = [step.step for step in found.steps]
    errors = [_bar(step.share) or 0.0 for step in found.steps]
    axes.bar(
        places, [s.share.value for s in found.steps], yerr=errors, color=COLOURS[0],
        ecolor=MUTED, capsize=3,
    )  # fmt: skip
    axes.set_xticks(places, [f"{s.step}\n{s.t:.2f}" for s in found.steps])
    axes.set(
        title="Share of the final reward's variance",
        xlabel="sampling step, noise level before it",
    )
