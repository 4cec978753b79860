"""Judgements of a file that contradict each other."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from novelret.progress import Reporter


def warn_of_contradictions(path: Path, pairs: np.ndarray, relevant: np.ndarray, report: Reporter) -> None:
    """Say how many pairs are relevant by one line and irrelevant by another.

    Args:
        path: the file.
        pairs: (n,) int64, the same number for lines about the same query and item.
        relevant: (n,) bool.
        report: told so.
    """
    both = len(np.intersect1d(pairs[relevant], pairs[~relevant]))
    if both:
        report.warn(
            f"{path}: {both:,} pair{'s' * (both != 1)} called relevant in one line and irrelevant in "
            "another; the last line counts"
        )
