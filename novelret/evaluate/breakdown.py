"""Where a model gains and loses: its queries' spread, by their length, by its overlap with the base."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from novelret.membership import is_in

if TYPE_CHECKING:
    from novelret.evaluate.evaluate import Evaluation

_GROUPS = 4
_SPREAD = ((0, 0), (1, 1), (2, 2), (3, 5), (6, 10), (11, 10**9))


@dataclass(frozen=True)
class Group:
    """Some queries and what one model does for them.

    Attributes:
        label: what the queries have in common.
        model: the model's name.
        queries: how many there are.
        gain: mean RelevantNovel at the deepest cut, or Novelty without a judge.
        recall_change: mean difference of recall to the base's, over the queries that have one.
        lost: share of those queries whose recall is lower than the base's.
    """

    label: str
    model: str
    queries: int
    gain: float
    recall_change: float
    lost: float


def gain_metric(evaluation: Evaluation) -> str:
    """The metric that says what a model brings."""
    return f"{'RelevantNovel' if evaluation.judge else 'Novelty'}@{max(evaluation.config.k)}"


def gained_items(evaluation: Evaluation) -> str:
    """What that metric counts, in words."""
    return "relevant novel items" if evaluation.judge else "novel items"


def spread(evaluation: Evaluation, model: str) -> list[tuple[str, float]]:
    """Shares of queries by how many items a model brings them (see `gain_metric`): (label, share)."""
    counts = evaluation.per_query[model][gain_metric(evaluation)]
    most = max(of[gain_metric(evaluation)].max() for of in evaluation.per_query.values())
    return [
        (
            str(low) if low in (high, most) else f"{low}–{int(min(high, most))}",
            float(((counts >= low) & (counts <= high)).mean()),
        )
        for low, high in _SPREAD
        if low <= most
    ]


def recall_spread(evaluation: Evaluation, model: str) -> tuple[float, float, float]:
    """Shares of queries with feedback whose deepest recall is below, equal to and above the base's."""
    change = _recall_change(evaluation, model)
    change = change[~np.isnan(change)]
    return float((change < 0).mean()), float((change == 0).mean()), float((change > 0).mean())


def by_length(evaluation: Evaluation) -> list[Group]:
    """Gains and losses by the number of words of the query."""
    words = np.array([len(text.split()) for text in evaluation.split.query_texts])
    edges = _edges(words)
    groups = []
    for low, high in edges:
        label = (
            "1 word" if low == high == 1 else f"{low:g} words" if low == high else f"{low:g}–{high:g} words"
        )
        kept = (words >= low) & (words <= high)
        groups += [_group(evaluation, label, model, kept) for model in _others(evaluation)]
    return groups


def by_overlap(evaluation: Evaluation) -> list[Group]:
    """Gains and losses by the share of a model's deepest list that is in the base's list of that length."""
    base = evaluation.lists["base"].rows
    overlap = {}
    for model in _others(evaluation):
        rows = evaluation.lists[model].rows
        shared = is_in(rows, base).sum(axis=1) / np.maximum((rows >= 0).sum(axis=1), 1)
        overlap[model] = np.round(100 * shared).astype(int)
    if not overlap:
        return []
    return [
        _group(
            evaluation,
            f"{low:g} %" if low == high else f"{low:g}–{high:g} %",
            model,
            (percent >= low) & (percent <= high),
        )
        for low, high in _edges(np.concatenate(list(overlap.values())))
        for model, percent in overlap.items()
    ]


def _others(evaluation: Evaluation) -> list[str]:
    return [model for model in evaluation.lists if model != "base"]


def _recall_change(evaluation: Evaluation, model: str) -> np.ndarray:
    recall = evaluation.config.recall_metric
    change: np.ndarray = evaluation.per_query[model][recall] - evaluation.per_query["base"][recall]
    return change


def _group(evaluation: Evaluation, label: str, model: str, kept: np.ndarray) -> Group:
    change = _recall_change(evaluation, model)[kept]
    change = change[~np.isnan(change)]
    gain = evaluation.per_query[model][gain_metric(evaluation)][kept]
    return Group(label, model, int(kept.sum()), _mean(gain), _mean(change), _mean(change < 0))


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else 0.0


def _edges(values: np.ndarray) -> list[tuple[int, int]]:
    """Inclusive integer ranges that hold about a quarter of the values each; fewer where values repeat."""
    tops = np.unique(np.quantile(values, np.arange(1, _GROUPS + 1) / _GROUPS, method="lower").astype(int))
    bottoms = [int(values.min()), *(int(top) + 1 for top in tops[:-1])]
    ranges = []
    for low, high in zip(bottoms, tops.tolist(), strict=True):
        inside = values[(values >= low) & (values <= high)]
        ranges.append((int(inside.min()), int(inside.max())))
    return ranges
