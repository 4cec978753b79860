"""How sure the figures are: bootstrap intervals and paired randomisation tests over queries."""

from __future__ import annotations

import numpy as np

_CHUNK = 200  # resamples at a time: memory stays flat


def bootstrap_interval(
    values: np.ndarray, *, samples: int = 2_000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean over queries (Efron and Tibshirani, 1993).

    Args:
        values: (Q,) one figure per query; NaN ones are left out.
        samples: number of resamples.
        level: nominal coverage.
        seed: decides the resamples; the same seed pairs the resamples of several models.
    """
    kept = values[~np.isnan(values)].astype(np.float64)
    if len(kept) == 0:
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    means = []
    for start in range(0, samples, _CHUNK):
        # Counts of how often each query is drawn: one matrix product instead of a gather.
        size = min(_CHUNK, samples - start)
        counts = rng.multinomial(len(kept), np.full(len(kept), 1 / len(kept)), size=size)
        means.append(counts @ kept / len(kept))
    tail = (1 - level) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return float(low), float(high)


def randomization_test(
    first: np.ndarray, second: np.ndarray, *, samples: int = 10_000, seed: int = 0
) -> float:
    """Two-sided p-value of the paired difference of means under random sign flips (Fisher, 1935).

    Queries where either figure is NaN are left out.
    """
    difference = (first - second).astype(np.float64)
    difference = difference[~np.isnan(difference)]
    changed = difference[difference != 0]
    if len(changed) == 0:
        return 1.0
    rng = np.random.default_rng(seed)
    seen = abs(changed.sum()) - 1e-12
    as_extreme = 0
    for start in range(0, samples, _CHUNK):
        size = min(_CHUNK, samples - start)
        signs = rng.integers(0, 2, size=(size, len(changed)), dtype=np.int8) * 2 - 1
        as_extreme += int((np.abs(signs @ changed) >= seen).sum())
    return (as_extreme + 1) / (samples + 1)


def holm(p_values: dict[str, float]) -> dict[str, float]:
    """p-values corrected for being several (Holm, 1979); the order of the input is kept."""
    corrected: dict[str, float] = {}
    largest = 0.0
    for place, name in enumerate(sorted(p_values, key=lambda n: p_values[n])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[name]))
        corrected[name] = largest
    return {name: corrected[name] for name in p_values}
