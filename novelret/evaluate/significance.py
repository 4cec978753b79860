"""How sure the figures are: bootstrap intervals and paired randomisation tests over queries.

All take one row per query and one column per figure, so that a resample is drawn once for all figures. Of
very many queries, random groups are drawn and flipped as one: that is as valid, and takes no longer for a
million queries than for ten thousand.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np

_GROUPS = 10_000  # of which a standard error is known to within a hundredth
_CHUNK, _CELLS = 500, 1 << 24  # resamples at a time, and resamples × queries: memory stays flat
_COLUMNS = 256  # differences of two models' figures at a time
_LEAST_QUERIES = 5  # of which resamples tell something


def bootstrap_intervals(
    values: np.ndarray, *, samples: int = 2_000, level: float = 0.95, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Percentile bootstrap intervals of means over queries (Efron and Tibshirani, 1993).

    Args:
        values: (Q, M) figures per query; NaN ones are left out of their column.
        samples: number of resamples.
        level: nominal coverage.
        seed: decides the resamples; the same seed pairs the resamples of several models.

    Returns:
        (M,) lower and (M,) upper ends; NaN for a column with fewer than 5 figures.
    """
    sums, known = _by_group(values)
    n_groups = len(sums)
    rng = np.random.default_rng(seed)
    means = []
    chunk = _chunk(n_groups)
    for start in range(0, samples, chunk):
        # How often each one is drawn: one matrix product instead of a gather.
        size = min(chunk, samples - start)
        counts = rng.multinomial(n_groups, np.full(n_groups, 1 / n_groups), size=size).astype(float)
        with np.errstate(invalid="ignore", divide="ignore"):
            means.append((counts @ sums) / (counts @ known))
    tail = (1 - level) / 2
    # A resample may hold none of a rare figure's queries.
    drawn = np.concatenate(means)
    ends = np.full((2, values.shape[1]), np.nan)
    some = known.sum(axis=0) >= _LEAST_QUERIES
    ends[:, some] = np.nanquantile(drawn[:, some], [tail, 1 - tail], axis=0)
    return ends[0], ends[1]


def randomization_tests(differences: np.ndarray, *, samples: int = 10_000, seed: int = 0) -> np.ndarray:
    """Two-sided p-values of paired differences of means under random sign flips (Fisher, 1935).

    Args:
        differences: (Q, M) one model's figures minus the other's; queries with NaN are left out.
        samples: number of sign flips.
        seed: decides them.

    Returns:
        (M,) p-values.
    """
    sums = _by_group(differences)[0].astype(np.float32)
    seen = np.abs(sums.sum(axis=0, dtype=np.float64))
    rng = np.random.default_rng(seed)
    as_extreme = np.zeros(differences.shape[1])
    chunk = _chunk(len(sums))
    for start in range(0, samples, chunk):
        size = min(chunk, samples - start)
        signs = rng.integers(0, 2, size=(size, len(sums)), dtype=np.int8).astype(np.float32) * 2 - 1
        # float32 sums of thousands of figures agree to about six digits; ties must count as extreme.
        as_extreme += (np.abs(signs @ sums) >= seen * (1 - 1e-5)).sum(axis=0)
    return (as_extreme + 1) / (samples + 1)


def _by_group(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sums of (Q, M) figures, and how many there are, (G, M) float64, of random groups of equal size.

    Each query is a group of its own as long as there are no more than `_GROUPS`. Under the null hypothesis a
    group's sum is symmetric, as its parts are; groups of independent queries are independent.
    """
    if len(values) <= _GROUPS:
        return np.nan_to_num(values), (~np.isnan(values)).astype(np.float64)
    group = np.random.default_rng(0).permutation(len(values)) % _GROUPS
    sums, known = np.empty((2, _GROUPS, values.shape[1]))
    for column, figures in enumerate(values.T):  # one by one: many queries' figures fill the memory once
        some = ~np.isnan(figures)
        sums[:, column] = np.bincount(group[some], figures[some], minlength=_GROUPS)
        known[:, column] = np.bincount(group[some], minlength=_GROUPS)
    return sums, known


def _chunk(groups: int) -> int:
    return min(_CHUNK, max(1, _CELLS // max(1, groups)))


def holm(p_values: np.ndarray) -> np.ndarray:
    """p-values corrected for being several (Holm, 1979), along the first axis; NaN is no test and stays."""
    order = np.argsort(p_values, axis=0, kind="stable")  # NaN last
    tests = (~np.isnan(p_values)).sum(axis=0)
    ranks = np.arange(len(p_values)).reshape(-1, *([1] * (p_values.ndim - 1)))
    ordered = np.minimum(1.0, np.take_along_axis(p_values, order, axis=0) * np.maximum(tests - ranks, 1))
    corrected = np.empty_like(ordered)
    np.put_along_axis(corrected, order, np.maximum.accumulate(ordered, axis=0), axis=0)
    return corrected


@dataclass(frozen=True)
class PairTest:
    """Two models on one metric.

    Attributes:
        first: a model.
        second: the other one.
        metric: what is compared.
        difference: the first one's mean minus the second one's, over queries where both have a figure.
        p: two-sided p-value of the paired randomisation test.
        p_holm: corrected for all pairs of this metric.
    """

    first: str
    second: str
    metric: str
    difference: float
    p: float
    p_holm: float


def compare_pairs(per_query: dict[str, dict[str, np.ndarray]], metrics: list[str]) -> list[PairTest]:
    """Paired tests between all models, on some metrics; none where two share no query with a figure.

    Args:
        per_query: model → metric → (Q,) figures.
        metrics: those to compare.
    """
    pairs = list(combinations(per_query, 2))
    if not pairs or not metrics:
        return []
    means, p_values = [], []
    step = max(1, _COLUMNS // len(metrics))
    for start in range(0, len(pairs), step):
        some = pairs[start : start + step]
        differences = np.stack([per_query[a][m] - per_query[b][m] for a, b in some for m in metrics], axis=1)
        known = (~np.isnan(differences)).sum(axis=0)
        means.append((np.nansum(differences, axis=0) / np.maximum(known, 1)).reshape(len(some), len(metrics)))
        # By one seed, so that all pairs share the sign flips.
        p = np.where(known > 0, randomization_tests(differences), np.nan)
        p_values.append(p.reshape(len(some), len(metrics)))
    difference, p = np.concatenate(means), np.concatenate(p_values)
    corrected = holm(p)
    return [
        PairTest(a, b, metric, *(float(of[row, column]) for of in (difference, p, corrected)))
        for row, (a, b) in enumerate(pairs)
        for column, metric in enumerate(metrics)
        if not np.isnan(p[row, column])
    ]


def stars(p_value: float | None) -> str:
    """The mark that tables put behind a figure: ** for p < 0.01, * for p < 0.05."""
    if p_value is None:
        return ""
    return "**" if p_value < 0.01 else "*" if p_value < 0.05 else ""
