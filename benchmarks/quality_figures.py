"""Figures of the quality benchmark: equal recall, intervals, ratios. Pure functions of arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Place:
    """A point on a run's polyline of checkpoints.

    Attributes:
        gain: its relevant novel items.
        first: position of the checkpoint before it.
        second: position of the checkpoint behind it; `first` at a checkpoint itself.
        weight: how far it lies from the first to the second, 0 to 1.
    """

    gain: float
    first: int
    second: int
    weight: float


def at_equal_recall(points: Sequence[tuple[float, float]], base_recall: float) -> Place | None:
    """The most gain on the polyline through (recall, gain) points, in the order of steps, at base recall.

    Gain is linear on a segment, so its maximum lies at a checkpoint that keeps the base's recall or where a
    segment crosses it.

    Returns:
        the place, or None where all of the polyline lies below the base's recall.
    """
    floor = base_recall - 1e-12
    places = [Place(gain, n, n, 0.0) for n, (recall, gain) in enumerate(points) if recall >= floor]
    for n, ((recall, gain), (next_recall, next_gain)) in enumerate(pairwise(points)):
        if (recall >= floor) != (next_recall >= floor):
            weight = (base_recall - recall) / (next_recall - recall)
            places.append(Place(gain + weight * (next_gain - gain), n, n + 1, weight))
    return max(places, key=lambda place: place.gain, default=None)


def t_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Mean and half width of Student's interval; NaN for the width of a single value."""
    array = np.asarray(values, dtype=np.float64)
    if len(array) < 2:
        return float(array.mean()), float("nan")
    error = array.std(ddof=1) / len(array) ** 0.5
    return float(array.mean()), float(error * stats.t.ppf((1 + level) / 2, len(array) - 1))


def ratio_interval(
    ours: np.ndarray, theirs: np.ndarray, *, samples: int = 2_000, level: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """Ratio of two means with its percentile bootstrap interval over queries and seeds.

    A resample draws queries and, independently, seeds, the same for both methods: the seeds share their
    held-back queries.

    Args:
        ours: (S, Q) figures.
        theirs: (S, Q) the other method's.
        samples: number of resamples.
        level: nominal coverage.
        seed: decides the resamples.

    Returns:
        ratio, lower and upper end; infinite where the other's mean is 0.
    """
    n_seeds, n_queries = ours.shape
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), size=samples).astype(np.float64)
    sums = np.empty((2, samples))
    for start in range(0, samples, 500):
        part = slice(start, min(start + 500, samples))
        size = part.stop - part.start
        queries = rng.multinomial(n_queries, np.full(n_queries, 1 / n_queries), size=size)
        for row, figures in enumerate((ours, theirs)):
            sums[row, part] = ((drawn[part] @ figures) * queries).sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = sums[0] / sums[1]
        ratio = float(np.float64(ours.mean()) / np.float64(theirs.mean()))
    # 0 / 0 says nothing: it stands on both sides.
    ordered = (
        np.sort(np.where(np.isnan(ratios), 0, ratios)),
        np.sort(np.where(np.isnan(ratios), np.inf, ratios)),
    )
    tail = (1 - level) / 2
    low, high = int(np.floor(tail * (samples - 1))), int(np.ceil((1 - tail) * (samples - 1)))
    return ratio, float(ordered[0][low]), float(ordered[1][high])


def flip_verdicts(relevant: np.ndarray, false_positives: float, misses: float, seed: int) -> np.ndarray:
    """What a noisy judge says of pairs, (n,) bool.

    Args:
        relevant: (n,) bool, the truth.
        false_positives: share of the irrelevant pairs that it calls relevant.
        misses: share of the relevant pairs that it calls irrelevant.
        seed: decides which.
    """
    draws = np.random.default_rng(seed).random(len(relevant))
    said: np.ndarray = np.where(relevant, draws >= misses, draws < false_positives)
    return said
