"""Whether the reward was exploited: signs in the images and their thresholds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sfgrpo.report import curves, markup
from sfgrpo.run.alarms import ALARMS, JUDGE, alarm

Log = Sequence[Mapping[str, Any]]


def section(evaluations: Log) -> str:
    """A panel for each sign with its threshold; nothing for runs of versions without them."""
    rows = [
        {"iteration": row["iteration"], **row["alarms"]} for row in evaluations if "alarms" in row
    ]
    if not rows:
        return ""
    shown, alarmed = [], []
    for name in dict.fromkeys(name for row in rows for name in row if name != "iteration"):
        own, values = alarm(name), [row for row in rows if name in row]
        limit = own.limit(rows[0])
        since = [row["iteration"] for row in values if own.crossed(row[name], rows[0])]
        told = f"alarm since iteration {since[0]}" if since else "quiet"
        alarmed += [f"{own.title} ({told})"] if since else []
        kind = "bad" if since else "good"
        shown.append(
            f"<figure><h3>{markup.escaped(own.title)} "
            f'<span class="{kind} state">{told}</span></h3>'
            f"{markup.svg(curves.number(values, name, dots=True, limit=limit))}"
            f"<figcaption>{markup.escaped(own.about)}</figcaption></figure>"
        )
    verdict = f"Alarms: {'; '.join(alarmed)}." if alarmed else "No alarm in this run."
    return markup.section(
        "alarms", "Was the reward exploited?",
        f"Measured at every evaluation; the dashed line is the threshold. {verdict}",
        markup.cards(shown, small=True), _advice(rows),
    )  # fmt: skip


def _advice(rows: Log) -> str:
    if any(name.startswith(JUDGE) for name in rows[0] if name not in ALARMS):
        return ""
    return (
        '<p class="note">No judge of this run says which way is better, so none can be told to '
        "part from the reward; decorate it with <code>sfgrpo.run.alarms.better</code>.</p>"
    )
