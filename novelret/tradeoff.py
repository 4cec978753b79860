"""Recall against novelty: what a recall budget allows, and which of several points none beats."""

from __future__ import annotations

from collections.abc import Sequence


def keeps_recall(recall: float, base: float, max_drop: float) -> bool:
    """Whether a recall is at most the share `max_drop` below the base's, rounding aside."""
    return recall >= base * (1 - max_drop) - 1e-12


def unbeaten(points: Sequence[tuple[float, float]]) -> list[bool]:
    """The Pareto set: whether no other point is as good in both figures and better in one, rounding aside."""
    rounded = [(round(x, 12), round(y, 12)) for x, y in points]
    return [
        not any(x >= point[0] and y >= point[1] and (x, y) != point for x, y in rounded) for point in rounded
    ]
