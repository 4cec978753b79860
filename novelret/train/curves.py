"""curves.svg: what the log and the validations say, against steps; one small chart a quantity."""

from __future__ import annotations

from html import escape
from typing import Any

from novelret.train.validation import Point

_WIDTH, _HEIGHT, _GAP = 300, 150, 50
_COLUMNS = 3
_STYLE = (
    "text{font:12px system-ui,sans-serif}.frame{fill:none;stroke:#8886}"
    ".curve{fill:none;stroke:#2563eb;stroke-width:2}.budget{stroke:#888;stroke-dasharray:5 4}"
)

Curve = list[tuple[float, float]]


def curves(lines: list[dict[str, Any]], points: list[Point], max_recall_drop: float) -> str:
    """An SVG picture.

    Args:
        lines: of log.jsonl.
        points: the validation points, possibly none.
        max_recall_drop: the budget that the recall chart shows dashed.
    """
    charts: list[tuple[str, Curve, float | None]] = [
        (name, [(line["step"], line[name]) for line in lines if line.get(name) is not None], None)
        for name in ("loss", "reward", "entropy")
    ]
    points = [point for point in points if point.is_checkpoint]
    if points:
        budget = points[0].base_recall * (1 - max_recall_drop)
        charts += [
            ("held back: novelty", [(p.step, p.novelty) for p in points], None),
            ("held back: relevant novel, likely", [(p.step, p.likely) for p in points], None),
            ("held back: recall, budget dashed", [(p.step, p.recall) for p in points], budget),
        ]
    drawn = [(name, curve, level) for name, curve, level in charts if curve]
    rows = -(-len(drawn) // _COLUMNS)
    width, height = _COLUMNS * (_WIDTH + _GAP) + _GAP, rows * (_HEIGHT + _GAP) + _GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="training curves"><style>{_STYLE}</style>'
    ]
    for number, (name, curve, level) in enumerate(drawn):
        left = _GAP + number % _COLUMNS * (_WIDTH + _GAP)
        top = _GAP // 2 + number // _COLUMNS * (_HEIGHT + _GAP)
        parts.append(f'<g transform="translate({left} {top})">{_chart(name, curve, level)}</g>')
    return "".join(parts) + "</svg>"


def _chart(name: str, curve: Curve, level: float | None) -> str:
    values = [y for _, y in curve] + ([] if level is None else [level])
    low, high = min(values), max(values)
    span, last = (high - low) or 1.0, max(x for x, _ in curve) or 1.0

    def at(x: float, y: float) -> str:
        return f"{x / last * _WIDTH:.1f},{_HEIGHT - (y - low) / span * _HEIGHT:.1f}"

    path = " ".join(at(x, y) for x, y in curve)
    dashed = ""
    if level is not None:
        height = at(0, level).split(",")[1]
        dashed = f'<line class="budget" x1="0" x2="{_WIDTH}" y1="{height}" y2="{height}"/>'
    return (
        f'<rect class="frame" width="{_WIDTH}" height="{_HEIGHT}"/>{dashed}'
        f'<polyline class="curve" points="{path}"/><text y="-6">{escape(name)}</text>'
        f'<text x="-4" y="10" text-anchor="end">{high:.3g}</text>'
        f'<text x="-4" y="{_HEIGHT}" text-anchor="end">{low:.3g}</text>'
        f'<text x="{_WIDTH}" y="{_HEIGHT + 15}" text-anchor="end">step {last:g}</text>'
    )
