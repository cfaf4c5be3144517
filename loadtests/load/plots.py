"""Line plots as SVG: inline, in the colours of the page that holds them, or as documents of their own."""

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 420, 260
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 30, 40  # margins around the axes
DASHES = ("", "5 3", "2 3", "8 3 2 3", "1 2", "12 3", "12 3 2 3", "4 1")
LEGEND_HEIGHT = 16  # of a line of a document's legend
TITLE_LENGTH = 44  # characters that fit above the axes
MOST_TICKS = 9  # of a logarithmic axis; with more there is one for each power of ten
# Classes of text and lines, and a colour for each of as many lines as there are dashes.
STYLE = """
text { fill: var(--ink) }
.title { font-size: 13px; font-weight: 600 }
.end { text-anchor: end }
.middle { text-anchor: middle }
.grid { stroke: var(--faint) }
polyline { fill: none; stroke-width: 2; stroke: currentColor }
circle { fill: currentColor }
.s0 { color: #0b62c4 }
.s1 { color: #c2410c }
.s2 { color: #15803d }
.s3 { color: #7e22ce }
.s4 { color: #0f766e }
.s5 { color: #be123c }
.s6 { color: #a16207 }
.s7 { color: #475569 }
@media (prefers-color-scheme: dark) {
  .s0 { color: #6cb2ff }
  .s1 { color: #ff9a62 }
  .s2 { color: #5fd38a }
  .s3 { color: #cf9bff }
  .s4 { color: #4fd1c5 }
  .s5 { color: #ff7a9c }
  .s6 { color: #eab308 }
  .s7 { color: #a3b1c6 }
}
"""
DOCUMENT_STYLE = """
svg { --ink: #1c2024; --faint: #d5d9de; --page: #fff; font: 11px system-ui, sans-serif }
rect { fill: var(--page) }
@media (prefers-color-scheme: dark) { svg { --ink: #e6e9ec; --faint: #3a4048; --page: #15181c } }
"""


class Line(NamedTuple):
    """One series: its points in order of x."""

    name: str
    points: Sequence[tuple[float, float]]
    style: int | None = None  # the number of its colour and dash; None: its place among the lines of the plot


class Axis(NamedTuple):
    """The vertical one."""

    lowest: float
    highest: float
    logarithmic: bool

    def place(self, value: float) -> float:
        """Where a value lies in the picture."""
        scale: Callable[[float], float] = math.log if self.logarithmic else float
        low, high, at = map(scale, (self.lowest, self.highest, value))
        return HEIGHT - BOTTOM - (at - low) / (high - low) * (HEIGHT - TOP - BOTTOM)


def plot(title: str, x_name: str, lines: Sequence[Line]) -> str:
    """Return an SVG element. The x axis has equal steps between its values; the y axis begins at 0."""
    described = escape(f"{title}, by {x_name}")
    drawn = _axes_and_lines(title, x_name, lines)
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{described}">{drawn}</svg>'
        f"<figcaption>{_legend(lines)}</figcaption></figure>"
    )


def document(title: str, x_name: str, lines: Sequence[Line], *, logarithmic: bool = False) -> str:
    """Return the same plot as an SVG document, with its colours and its legend; its y axis may be logarithmic.

    Raises ValueError for a title that is too long, and for a logarithmic axis of values that are not above 0.
    """
    if len(title) > TITLE_LENGTH:
        raise ValueError(f"a plot's title has at most {TITLE_LENGTH} characters, not {len(title)}: {title}")
    height = HEIGHT + LEGEND_HEIGHT * (len(lines) + 1) // 2 + LEGEND_HEIGHT
    parts = [f'<rect width="{WIDTH}" height="{height}"/>', _axes_and_lines(title, x_name, lines, logarithmic)]
    for number, line in enumerate(lines):
        x, y = LEFT + number % 2 * (WIDTH - LEFT) // 2, HEIGHT + LEGEND_HEIGHT * (number // 2) + 12
        style = _style(number, line)
        sample = f'<polyline points="{x},{y - 4} {x + 28},{y - 4}" stroke-dasharray="{DASHES[style]}"/>'
        parts.append(f'<g class="s{style}">{sample}<text x="{x + 34}" y="{y}">{escape(line.name)}</text></g>')
    named = f'role="img" aria-label="{escape(f"{title}, by {x_name}")}"'
    space = 'xmlns="http://www.w3.org/2000/svg"'
    colours = f"<style>{DOCUMENT_STYLE}{STYLE}</style>"
    size = f'width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}"'
    return f"<svg {space} {size} {named}>{colours}{''.join(parts)}</svg>\n"


def _axes_and_lines(title: str, x_name: str, lines: Sequence[Line], logarithmic: bool = False) -> str:
    places = sorted({x for line in lines for x, _ in line.points})
    values = [y for line in lines for _, y in line.points]
    steps = logarithmic_ticks(min(values), max(values)) if logarithmic else ticks(max(values, default=0.0) or 1.0)
    axis = Axis(steps[0], steps[-1], logarithmic)
    parts = [f'<text class="title" x="{LEFT}" y="16">{escape(title)}</text>']
    for step in steps:
        y = axis.place(step)
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>')
        parts.append(f'<text class="end" x="{LEFT - 6}" y="{y + 4:.1f}">{_short(step)}</text>')
    for place in places:
        x = _x(place, places)
        parts.append(f'<text class="middle" x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}">{shown(place)}</text>')
    parts.append(f'<text class="middle" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}">{escape(x_name)}</text>')
    parts += [_line(_style(number, line), line, places, axis) for number, line in enumerate(lines)]
    return "".join(parts)


def _style(number: int, line: Line) -> int:
    return (number if line.style is None else line.style) % len(DASHES)


def _line(style: int, line: Line, places: Sequence[float], axis: Axis) -> str:
    at = [(_x(x, places), axis.place(y), y) for x, y in line.points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in at)
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{escape(line.name)}: {shown(value)}</title></circle>'
        for x, y, value in at
    )
    return f'<g class="s{style}"><polyline points="{path}" stroke-dasharray="{DASHES[style]}"/>{dots}</g>'


def _legend(lines: Sequence[Line]) -> str:
    samples = (
        f'<span class="s{style}"><svg class="key" viewBox="0 0 28 8"><polyline points="0,4 28,4" '
        f'stroke-dasharray="{DASHES[style]}"/></svg> {escape(line.name)}</span>'
        for style, line in ((_style(number, line), line) for number, line in enumerate(lines))
    )
    return " ".join(samples)


def ticks(highest: float) -> list[float]:
    """Return round numbers from 0 to one that is not below the highest value: three to six of them."""
    size = 10.0 ** math.floor(math.log10(highest))
    step = next(step for step in (0.2 * size, 0.5 * size, size, 2 * size, 5 * size) if highest <= 5 * step)
    return [step * number for number in range(math.ceil(highest / step - 1e-9) + 1)]


def logarithmic_ticks(lowest: float, highest: float) -> list[float]:
    """Return 1, 2 and 5 times powers of ten around the values, or powers of ten if those are many.

    Raises ValueError for values that are not above 0.
    """
    if lowest <= 0:
        raise ValueError(f"a logarithmic axis has no place for {lowest:g}: draw this plot with a linear one")
    powers = range(math.floor(math.log10(lowest)), math.ceil(math.log10(highest)) + 1)
    for factors in ((1, 2, 5), (1,)):
        steps = [factor * 10.0**power for power in powers for factor in factors]
        first = max(index for index, step in enumerate(steps) if step <= lowest)
        last = min(index for index, step in enumerate(steps) if step >= highest)
        steps = steps[first : max(last, first + 1) + 1]
        if len(steps) <= MOST_TICKS:
            break
    return steps


def shown(value: float) -> str:
    """Return a number with at most three digits that say something."""
    return f"{value:.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def _short(value: float) -> str:
    """A number that fits beside the axis."""
    if value >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}k" if value >= 1e4 else shown(value)


def _x(place: float, places: Sequence[float]) -> float:
    share = places.index(place) / (len(places) - 1) if len(places) > 1 else 0.5
    inset = 14
    return LEFT + inset + share * (WIDTH - LEFT - RIGHT - 2 * inset)
