"""Scores that people or a file gave to pairs: which mean relevant, and which contradict each other."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from novelret.errors import UserError
from novelret.membership import find_sorted, sorted_union
from novelret.progress import Reporter


def check_threshold(threshold: float | None, option: str = "--threshold") -> None:
    """Refuse a lowest relevant score that is no number.

    Raises:
        UserError: it is none.
    """
    if threshold is not None and not math.isfinite(threshold):
        raise UserError(f"{option} {threshold}: must be a number")


def are_relevant(scores: np.ndarray, threshold: float | None) -> np.ndarray:
    """Which of (n,) scores mean relevant, bool: those from the threshold on, by default all above 0."""
    found: np.ndarray = scores > 0 if threshold is None else scores >= threshold
    return found


def warn_of_contradictions(path: Path, pairs: np.ndarray, relevant: np.ndarray, report: Reporter) -> None:
    """Say how many pairs are relevant by one line and irrelevant by another.

    Args:
        path: the file.
        pairs: (n,) int64, the same number for lines about the same query and item.
        relevant: (n,) bool.
        report: told so.
    """
    no = np.sort(pairs[~relevant])  # np.intersect1d hashes, forty times as long
    both = int(find_sorted(no, sorted_union(pairs[relevant]))[0].sum())
    if both:
        report.warn(
            f"{path}: {both:,} pair{'s' * (both != 1)} called relevant in one line and irrelevant in "
            "another; the last line counts"
        )
