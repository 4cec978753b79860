"""A scatter chart as inline SVG: points told apart by shape and label, not by colour alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from itertools import pairwise

_WIDTH, _LEAST_HEIGHT = 740, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 250, 16, 52
# Stands in the picture itself, so that a chart also looks right as a file of its own.
_STYLE = (
    "svg text{font:13px system-ui,sans-serif}.grid,.leader{stroke:#8884}"
    ".rule{stroke:#888;stroke-dasharray:5 4}.ring,.front{fill:none;stroke:#888;stroke-width:1.5}"
)
_GAP = 20  # between the labels of two points
_LONGEST = 32  # characters of a label that fit
_SHAPES = ("circle", "square", "triangle", "diamond", "cross")


@dataclass(frozen=True)
class Mark:
    """One point of a scatter chart.

    Attributes:
        label: its name, drawn beside it.
        x: horizontal position.
        y: vertical position.
        ringed: a ring is drawn around it, and the ringed points are joined by a line.
    """

    label: str
    x: float
    y: float
    ringed: bool = False


def scatter(marks: list[Mark], x_title: str, y_title: str, *, line_at: float | None = None) -> str:
    """An SVG picture of labelled points.

    Args:
        marks: the points, at least one.
        x_title: title of the horizontal axis.
        y_title: title of the vertical axis.
        line_at: where to draw a dashed vertical line, if anywhere.
    """
    height = max(_LEAST_HEIGHT, _GAP * len(marks) + _TOP + _BOTTOM)
    xs = [mark.x for mark in marks] + ([] if line_at is None else [line_at])
    x_ticks, y_ticks = (
        _ticks(min(xs), max(xs)),
        _ticks(min(0.0, *(m.y for m in marks)), max(m.y for m in marks)),
    )

    def across(x: float) -> float:
        return _LEFT + (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (_WIDTH - _LEFT - _RIGHT)

    def down(y: float) -> float:
        return height - _BOTTOM - (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (height - _TOP - _BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img" '
        f'aria-label="{escape(y_title)} by {escape(x_title)}">'
    ]
    for tick in x_ticks:
        parts.append(  # noqa: PERF401 - a comprehension over these f-strings reads worse
            f'<line class="grid" x1="{across(tick):.1f}" x2="{across(tick):.1f}" y1="{_TOP}" '
            f'y2="{height - _BOTTOM}"/><text class="tick" text-anchor="middle" x="{across(tick):.1f}" '
            f'y="{height - _BOTTOM + 18}">{tick:g}</text>'
        )
    for tick in y_ticks:
        parts.append(  # noqa: PERF401
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{down(tick):.1f}" '
            f'y2="{down(tick):.1f}"/><text class="tick" text-anchor="end" x="{_LEFT - 8}" '
            f'y="{down(tick) + 4:.1f}">{tick:g}</text>'
        )
    middle_x, middle_y = (_LEFT + _WIDTH - _RIGHT) / 2, (_TOP + height - _BOTTOM) / 2
    parts.append(
        f'<text class="axis" text-anchor="middle" x="{middle_x}" y="{height - 8}">{escape(x_title)}</text>'
        f'<text class="axis" text-anchor="middle" transform="translate(16 {middle_y}) rotate(-90)">'
        f"{escape(y_title)}</text>"
    )
    if line_at is not None:
        parts.append(
            f'<line class="rule" x1="{across(line_at):.1f}" x2="{across(line_at):.1f}" y1="{_TOP}" '
            f'y2="{height - _BOTTOM}"/>'
        )
    front = sorted((across(mark.x), down(mark.y)) for mark in marks if mark.ringed)
    if len(front) > 1:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in front)
        parts.append(f'<polyline class="front" points="{path}"/>')
    edge = _WIDTH - _RIGHT
    label_heights = _spread([down(mark.y) for mark in marks], height - _BOTTOM)
    for number, (mark, beside) in enumerate(zip(marks, label_heights, strict=True)):
        x, y = across(mark.x), down(mark.y)
        name = escape(mark.label[:_LONGEST])
        ring = f'<circle class="ring" cx="{x:.1f}" cy="{y:.1f}" r="11"/>' if mark.ringed else ""
        parts.append(
            f'<g class="mark mark{number % len(_SHAPES)}"><title>{escape(mark.label)}: {escape(x_title)} '
            f"{mark.x:.4f}, {escape(y_title)} {mark.y:.3f}</title>{_shape(number, x, y)}{ring}"
            f'<line class="leader" x1="{x + 7:.1f}" y1="{y:.1f}" x2="{edge + 8}" y2="{beside:.1f}"/>'
            f'<text class="name" x="{edge + 12}" y="{beside + 4:.1f}">{name}</text></g>'
        )
    return "".join(parts) + f"<style>{_STYLE}</style></svg>"


def _shape(number: int, x: float, y: float) -> str:
    kind = _SHAPES[number % len(_SHAPES)]
    if kind == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6"/>'
    if kind == "square":
        return f'<rect x="{x - 5:.1f}" y="{y - 5:.1f}" width="10" height="10"/>'
    corners = {
        "triangle": ((0, -7), (7, 6), (-7, 6)),
        "diamond": ((0, -7), (7, 0), (0, 7), (-7, 0)),
        "cross": (
            (-2, -6),
            (2, -6),
            (2, -2),
            (6, -2),
            (6, 2),
            (2, 2),
            (2, 6),
            (-2, 6),
            (-2, 2),
            (-6, 2),
            (-6, -2),
            (-2, -2),
        ),
    }[kind]
    return '<polygon points="{}"/>'.format(" ".join(f"{x + a:.1f},{y + b:.1f}" for a, b in corners))


def _spread(heights: list[float], bottom: float) -> list[float]:
    """Label heights near the points' own, moved apart until they do not overlap."""
    order = sorted(range(len(heights)), key=lambda n: heights[n])
    placed = list(heights)
    for before, now in pairwise(order):
        placed[now] = max(placed[now], placed[before] + _GAP)
    placed[order[-1]] = min(placed[order[-1]], bottom)
    for now, after in pairwise(reversed(order)):
        placed[after] = min(placed[after], placed[now] - _GAP)
    return placed


def _ticks(low: float, high: float) -> list[float]:
    """Five or so round values that enclose a range."""
    span = high - low
    if span <= 1e-9 * max(abs(low), abs(high)):  # the same, rounding aside
        span = abs(high) or 1.0
    raw = max(span, 1e-6) / 4  # no finer than ticks are rounded
    step = 10 ** math.floor(math.log10(raw))
    step *= next(f for f in (1, 2, 2.5, 5, 10) if f * step >= raw)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(n * step, 10) for n in range(first, max(last, first + 1) + 1)]
