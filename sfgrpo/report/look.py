"""How reports look: one style sheet for light, dark and paper, and the frame of a page."""

from __future__ import annotations

import html
from pathlib import Path

from sfgrpo import files

INK, MUTED, GRID = "#1f2933", "#7b8794", "#e4e7eb"
COLOURS = (
    "#0b6e99",
    "#d9730d",
    "#2f7d4f",
    "#a3336b",
    "#6b4fbb",
    "#8a6d3b",
    "#56a3c2",
    "#9aa5b1",
    "#c7a92c",
    "#3f4a54",
)
"""Of lines and bars, in their order; what is drawn into a page takes the variable of the colour."""
AT_NIGHT = {
    INK: "#e6e9ec", MUTED: "#98a3ae", GRID: "#313940",
    "#0b6e99": "#4fb3dd", "#d9730d": "#f0964a", "#2f7d4f": "#5fb783", "#a3336b": "#e07bb0",
    "#6b4fbb": "#a48fe8", "#8a6d3b": "#c9a96e", "#3f4a54": "#c3ccd4",
}  # fmt: skip
"""The same on a dark page; those that are missing stand on both."""


def variable(colour: str) -> str:
    """The name under which the style sheet knows a colour of figures."""
    return f"--c{colour.removeprefix('#')}"


def _variables(*, night: bool) -> str:
    colours = {colour: colour for colour in (INK, MUTED, GRID, *COLOURS)}
    colours.update(AT_NIGHT if night else {})
    return " ".join(f"{variable(name)}: {value};" for name, value in colours.items())


STYLE = """
:root { color-scheme: light dark; --paper: #f7f7f5; --card: #ffffff; --line: #e3e5e8;
  --ink: #1f2933; --soft: #5a6672; --accent: #0b6e99; --good: #2f7d4f; --bad: #b4402a;
  --wash: #eef1f3; DAY }
@media (prefers-color-scheme: dark) { :root { --paper: #14181c; --card: #1b2026; --line: #2c343b;
  --ink: #e6e9ec; --soft: #a3adb7; --accent: #4fb3dd; --good: #6cc391; --bad: #f08a70;
  --wash: #242b32; NIGHT } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
  overflow-wrap: anywhere; }
main { max-width: 1140px; margin: 0 auto;
  padding: clamp(1.2rem, 4vw, 3rem) clamp(.9rem, 3vw, 2rem); }
h1 { font-size: clamp(1.6rem, 4vw, 2.3rem); line-height: 1.15; letter-spacing: -.02em;
  margin: 0 0 .4rem; }
h2 { font-size: 1.35rem; letter-spacing: -.01em; margin: 0 0 .25rem; }
h3 { font-size: .95rem; margin: 0 0 .4rem; }
h2 + p, h1 + p { margin-top: 0; }
p { max-width: 74ch; } p.lead { color: var(--soft); margin: 0 0 1.1rem; }
a { color: var(--accent); }
code { font: .88em ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
section { margin-top: clamp(2.2rem, 5vw, 3.4rem); }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1rem; font-size: .88rem; margin: .3rem 0 1.4rem; }
nav a { text-decoration: none; } nav a:hover { text-decoration: underline; }
.kicker { color: var(--accent); font-size: .78rem; font-weight: 650; letter-spacing: .08em;
  text-transform: uppercase; margin: 0 0 .3rem; }
.cards { display: grid; gap: 1rem; margin-top: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); }
.cards.small {
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); }
.card, figure { margin: 0; min-width: 0; background: var(--card); border: 1px solid var(--line);
  border-radius: 12px; padding: .95rem 1.05rem; }
figure > svg { display: block; width: 100%; height: auto; }
figure > img { display: block; width: 100%; height: auto; border-radius: 6px; }
figcaption, .note { color: var(--soft); font-size: .86rem; line-height: 1.45; margin: .55rem 0 0; }
.tiles { display: grid; gap: .7rem; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: .75rem .95rem; }
.tile b { display: block; font-size: 1.5rem; line-height: 1.25; letter-spacing: -.01em; }
.tile span { color: var(--soft); font-size: .82rem; display: block; }
.tile b, td, .number { font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; overflow-wrap: normal; }
.scroll td:first-child { min-width: 8.5rem; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: .8rem; }
th, td { padding: .32rem .6rem .32rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
tr:last-child td { border-bottom: 0; }
td.number, th.number { text-align: right; white-space: nowrap; overflow-wrap: normal; }
td.bar { width: 34%; vertical-align: middle; }
td.bar i { display: block; height: .6rem; border-radius: 3px; min-width: 1px; }
.stack { display: flex; height: 1.1rem; border-radius: 5px; overflow: hidden;
  margin: .2rem 0 .8rem; }
.stack i { display: block; height: 100%; }
.dot { display: inline-block; width: .65rem; height: .65rem; border-radius: 2px;
  margin-right: .45rem; }
.good { color: var(--good); } .bad { color: var(--bad); }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 1rem;
  overflow-x: auto; font: .8rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
summary { cursor: pointer; color: var(--accent); }
.prompt { display: grid; gap: .1rem 1rem; grid-template-columns: 1fr 1fr; padding: .6rem 0;
  border-top: 1px solid var(--line); }
.prompt:first-of-type { border-top: 0; padding-top: 0; } .prompt:last-child { padding-bottom: 0; }
.prompt > p { grid-column: 1 / -1; margin: 0 0 .3rem; font-size: .9rem; max-width: none;
  display: flex; justify-content: space-between; gap: 1rem; }
.prompt span { white-space: nowrap; }
.prompt img { width: 100%; display: block; border-radius: 5px; }
.prompt .source { grid-column: 1 / -1; } .prompt .source img { width: auto; height: 6rem; }
.prompt small { color: var(--soft); font-size: .76rem; }
.film { margin-top: 1rem; } .film ol { list-style: none; margin: 0; padding: 0; display: grid;
  gap: .7rem .4rem; grid-template-columns: repeat(auto-fit, minmax(4rem, 1fr)); }
.film li { min-width: 0; max-width: 8rem; text-align: center; font-size: .8rem; line-height: 1.3; }
.film img { width: 100%; display: block; border-radius: 5px; margin-bottom: .25rem; }
.film b { display: block; font-variant-numeric: tabular-nums; } .film small { color: var(--soft); }
.gain { display: flex; flex-direction: column; height: 5.6rem; padding-bottom: .3rem; }
.gain span { height: 1.1rem; font-size: .78rem; font-variant-numeric: tabular-nums; }
.gain div { position: relative; flex: 1; background: linear-gradient(var(--line), var(--line))
  center / 100% 1px no-repeat; }
.gain i { position: absolute; left: 30%; width: 40%; border-radius: 2px; background: currentColor; }
.state { font-weight: 400; font-size: .8rem; margin-left: .4rem; }
.pixels { image-rendering: pixelated; }
footer { margin-top: 3rem; color: var(--soft); font-size: .82rem; }
@media print {
  :root { --paper: #fff; } body { font-size: 10.5pt; } main { max-width: none; padding: 0; }
  nav, summary { display: none; } section { margin-top: 1.4rem; }
  .card, figure, .tile, .prompt, tr { break-inside: avoid; }
  h2, h3, .lead { break-after: avoid; break-inside: avoid; }
  .cards { grid-template-columns: 1fr 1fr; gap: .6rem; }
  .cards.small { grid-template-columns: repeat(3, 1fr); }
  #cost .cards { grid-template-columns: 1fr; } .scroll { overflow: visible; }
  pre { white-space: pre-wrap; columns: 3; font-size: 7pt; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  details::details-content { content-visibility: visible; height: auto; }
}
""".replace("DAY", _variables(night=False)).replace("NIGHT", _variables(night=True))  # fmt: skip


def write_page(path: Path, title: str, body: str) -> None:
    """Write a page that needs nothing but itself."""
    files.write(
        path,
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{html.escape(title)}</title>"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head>\n<body><main>\n{body}\n</main></body></html>\n",
    )
