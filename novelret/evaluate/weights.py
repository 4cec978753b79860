"""How often each query is asked, and its bucket of traffic: head, torso or tail."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from novelret.data.source import is_header, is_number, read_lines, read_part, split_columns
from novelret.errors import UserError

BUCKETS = ("head", "torso", "tail")


@dataclass(frozen=True)
class Bucket:
    """Some queries and what the merged list does for them.

    Attributes:
        name: "head", "torso", "tail", or "all by traffic", where queries count by their frequency.
        queries: how many.
        traffic: their share of all traffic.
        least: lowest frequency among them.
        most: highest.
        models: model → metric (MergedAdded, MergedDensity, MergedCoverage, MergedJudged) → mean per query.
    """

    name: str
    queries: int
    traffic: float
    least: float
    most: float
    models: dict[str, dict[str, float]]


def load_weights(data: str, query_ids: list[str], path: Path | None) -> np.ndarray | None:
    """Frequencies of a split's queries, (Q,) float64; None where neither a file nor the queries carry any.

    Args:
        data: BEIR folder or Hugging Face data set; `weight` of its queries is read.
        query_ids: the split's queries.
        path: tab-separated query id and frequency, in place of the queries' own field.

    Raises:
        UserError: a malformed line, a frequency that is negative or no number, or a query without one.
    """
    found = _read_own(data, set(query_ids)) if path is None else _read_file(path)
    if not found and path is None:
        return None
    missing = [query_id for query_id in query_ids if query_id not in found]
    if missing:
        raise UserError(
            f"{path or data}: no weight for query {missing[0]!r} ({len(missing)} of {len(query_ids)} "
            "queries); give every query of the split one, 0 where it is never asked"
        )
    weights = np.array([found[query_id] for query_id in query_ids], dtype=np.float64)
    if weights.sum() == 0:
        raise UserError(f"{path or data}: every weight is 0; expected how often each query is asked")
    return weights


def bucket_of(weights: np.ndarray) -> np.ndarray:
    """Bucket number of each query, (Q,) int: 0 head, 1 torso, 2 tail, a third of the traffic each.

    Queries are taken from the most frequent down; those of one frequency stay together, in the bucket where
    the middle of their traffic lies.
    """
    values, group = np.unique(-weights, return_inverse=True)
    traffic = np.bincount(group, weights, minlength=len(values)) / weights.sum()
    middle = np.cumsum(traffic) - traffic / 2
    return np.minimum((middle * len(BUCKETS)).astype(int), len(BUCKETS) - 1)[group]


def merged_by_bucket(weights: np.ndarray, per_query: dict[str, dict[str, np.ndarray]]) -> list[Bucket]:
    """The merged list's figures in each bucket that holds queries, then over all by traffic.

    Args:
        weights: (Q,) frequencies.
        per_query: model → metric → (Q,) figures.
    """
    number, even = bucket_of(weights), np.ones(len(weights))
    parts = [(name, number == n, even) for n, name in enumerate(BUCKETS)]
    parts.append(("all by traffic", np.ones(len(weights), dtype=bool), weights))
    return [
        Bucket(
            name,
            int(kept.sum()),
            float(weights[kept].sum() / weights.sum()),
            float(weights[kept].min()),
            float(weights[kept].max()),
            {
                model: {
                    metric: float(np.average(values[here], weights=by[here]))
                    for metric, values in figures.items()
                    if metric.startswith("Merged") and (here := kept & ~np.isnan(values) & (by > 0)).any()
                }
                for model, figures in per_query.items()
            },
        )
        for name, kept, by in parts
        if kept.any()
    ]


def _read_own(data: str, wanted: set[str]) -> dict[str, float]:
    found = {}
    for where, row in read_part(data, "queries"):
        value = row.get("weight")
        if value is not None and str(row.get("_id")) in wanted:
            found[str(row["_id"])] = _number(where, value)
    return found


def _read_file(path: Path) -> dict[str, float]:
    found: dict[str, float] = {}
    for line_number, line in read_lines(path):
        where = f"{path}:{line_number}"
        columns = split_columns(line)
        if len(columns) != 2:
            raise UserError(f"{where}: {len(columns)} columns, expected query-id and weight (tab-separated)")
        if line_number == 1 and is_header(columns[1]):
            continue
        if columns[0] in found:
            raise UserError(f"{where}: query {columns[0]!r} has a weight already; keep one")
        found[columns[0]] = _number(where, columns[1])
    return found


def _number(where: str, value: object) -> float:
    number = float(str(value)) if is_number(str(value)) else math.nan
    if not 0 <= number < math.inf:
        raise UserError(f"{where}: the weight {value!r} is not a number of at least 0")
    return number
