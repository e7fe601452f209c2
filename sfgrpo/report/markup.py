"""Pieces of a page: figures, tiles, tables, bars."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Mapping, Sequence

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from sfgrpo.report.look import COLOURS, GRID, INK, MUTED, variable

NAMED = re.compile("|".join((INK, MUTED, GRID, *COLOURS)))
UNUSED = re.compile(r"<metadata>.*?</metadata>|<!--.*?-->|<!DOCTYPE[^>]*>|<\?xml[^>]*>", re.DOTALL)
COUNTED = re.compile(r' id="[a-z0-9]+_\d+"')
"""Names that matplotlib numbers anew in every figure, which nothing refers to."""
FONT = re.compile(r"font: (?:(\d+) )?([\d.]+px) [^;\"]+")


def escaped(text: object) -> str:
    """Text as HTML shows it."""
    return html.escape(str(text))


def svg(figure: Figure) -> str:
    """A figure as SVG that takes the page's font and colours, those of the night, too."""
    buffer = io.StringIO()
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "sfgrpo"}):
        figure.savefig(buffer, format="svg", transparent=True, dpi=160)
    plt.close(figure)
    drawn = COUNTED.sub("", UNUSED.sub("", buffer.getvalue())).strip()
    drawn = FONT.sub(r"font-size: \2", drawn)
    drawn = NAMED.sub(lambda found: f"var({variable(found[0])})", drawn)
    return re.sub(r"\n\s*", "\n", drawn)


def figure(drawn: Figure, title: str, caption: str) -> str:
    """A card with a figure, its title above and what one sees in it below."""
    alt = f'<svg role="img" aria-label="{escaped(title)}"'
    return (
        f"<figure><h3>{escaped(title)}</h3>{svg(drawn).replace('<svg', alt, 1)}"
        f"<figcaption>{escaped(caption)}</figcaption></figure>"
    )


def image(data: bytes, alt: str, kind: str, *, pixels: bool = False) -> str:
    """A picture that is part of the page; `pixels` of a small one are shown as they are."""
    encoded, sharp = base64.b64encode(data).decode(), ' class="pixels"' if pixels else ""
    return f'<img{sharp} alt="{escaped(alt)}" src="data:image/{kind};base64,{encoded}">'


def section(name: str, title: str, lead: str, *parts: str) -> str:
    """A section with its heading and a sentence that says what it is about."""
    return (
        f'<section id="{name}"><h2>{escaped(title)}</h2><p class="lead">{escaped(lead)}</p>'
        f"{''.join(parts)}</section>\n"
    )


def cards(figures: Sequence[str], *, small: bool = False) -> str:
    """Figures side by side, as many as the page is wide."""
    return f'<div class="cards{" small" if small else ""}">{"".join(figures)}</div>'


def number(value: float) -> str:
    """A number in a few characters."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3f}"


def tiles(first: Mapping[str, float], last: Mapping[str, float]) -> str:
    """What was measured, the last value large and the first beside it."""
    found = [
        f'<div class="tile"><span>{escaped(name.replace("_", " "))}</span>'
        f"<b>{number(value)}</b><span>before: {number(first[name])}</span></div>"
        for name, value in last.items()
    ]
    return f'<div class="tiles">{"".join(found)}</div>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[int]) -> str:
    """A table of HTML cells; columns `numbers` are set to the right. What is wider than the page
    scrolls by itself."""
    kind = [' class="number"' if k in numbers else "" for k in range(len(head))]
    heads = "".join(f"<th{k}>{text}</th>" for k, text in zip(kind, head, strict=True))
    lines = [
        "".join(
            text if text.startswith("<td") else f"<td{k}>{text}</td>"
            for k, text in zip(kind, row, strict=True)
        )
        for row in rows
    ]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table><tr>{heads}</tr>{body}</table></div>'


def bar(share: float, colour: str) -> str:
    """A cell with a bar of that share of its width."""
    style = f"width:{100 * share:.1f}%;background:var({variable(colour)})"
    return f'<td class="bar"><i style="{style}"></i></td>'


def stack(shares: Sequence[float]) -> str:
    """Parts of a whole beside each other, in the order of `COLOURS`."""
    parts = [
        f'<i style="width:{100 * share:.2f}%;background:var({variable(_colour(k))})"></i>'
        for k, share in enumerate(shares)
    ]
    return f'<div class="stack">{"".join(parts)}</div>'


def dot(place: int) -> str:
    """The colour of a part of a stack."""
    return f'<i class="dot" style="background:var({variable(_colour(place))})"></i>'


def _colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)]
