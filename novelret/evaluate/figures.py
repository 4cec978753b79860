"""Every figure of every model, from its lists and their verdicts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from novelret.data.split import Split
from novelret.evaluate import metrics
from novelret.evaluate.config import BASE, EvalConfig
from novelret.evaluate.human import FEW_PAIRS, FEW_RELEVANT, Corrected, human_figures, is_uneven
from novelret.evaluate.significance import (
    bootstrap_intervals,
    holm,
    randomization_tests,
)
from novelret.label.table import IRRELEVANT, UNKNOWN, LabelTable
from novelret.progress import Reporter


@dataclass(frozen=True)
class Lists:
    """A model's lists for every query of the split.

    Attributes:
        rows: (Q, K) catalog rows, −1 padded.
        scores: (Q, K) scores rounded to six decimals; None for a run that was read.
        verdicts: (Q, K) int8.
    """

    rows: np.ndarray
    scores: np.ndarray | None
    verdicts: np.ndarray


def with_verdicts(
    found: dict[str, tuple[np.ndarray, np.ndarray | None]], table: LabelTable, longest: int
) -> tuple[Lists, dict[str, Lists]]:
    """Every list with its verdicts: the deployed model's whole one, and all of them cut to `longest`."""
    lists = {}
    for name, (rows, scores) in found.items():
        lists[name] = Lists(rows, scores, table.lookup(np.arange(len(rows))[:, None], rows))
    base = lists[BASE]
    scores = None if base.scores is None else base.scores[:, :longest]
    lists[BASE] = Lists(base.rows[:, :longest], scores, base.verdicts[:, :longest])
    return base, lists


def per_query_figures(
    name: str,
    lists: Lists,
    deployed: Lists,
    split: Split,
    known: tuple[np.ndarray, np.ndarray],
    config: EvalConfig,
) -> dict[str, np.ndarray]:
    """Every metric's figure per query; `known` are the (query row, item row) pairs known to be relevant."""
    new = metrics.novel(lists.rows, deployed.rows)
    feedback = metrics.feedback_hits(lists.rows, split.feedback_queries, split.feedback_items)
    all_known = metrics.feedback_hits(lists.rows, *known) if config.judge is not None else feedback
    figures: dict[str, np.ndarray] = {}
    for k in config.k:
        figures[f"Novelty@{k}"] = metrics.novelty(new, k)
        figures[f"Recall@{k}"] = metrics.recall(*feedback, k)
        figures[f"nDCG@{k}"] = metrics.ndcg(*feedback, k)
        figures[f"MRR@{k}"] = metrics.reciprocal_rank(*feedback, k)
        if config.judge is not None:
            figures[f"KnownRecall@{k}"] = metrics.recall(*all_known, k)
            figures[f"RelevantNovel@{k}"] = metrics.relevant_novelty(new, lists.verdicts, k)
            figures[f"Precision@{k}"] = metrics.precision(lists.verdicts, k)
            figures[f"Judged@{k}"] = metrics.judged(lists.rows, lists.verdicts, k)
            figures[f"NovelJudged@{k}"] = metrics.novel_judged(new, lists.verdicts, k)
            figures[f"NovelPrecision@{k}"] = metrics.novel_precision(new, lists.verdicts, k)
    # The base beside itself adds nothing: its own list is what the others are merged behind.
    added = np.zeros_like(new) if name == BASE else new
    merged = metrics.merge(added, lists.verdicts, deployed.rows, deployed.verdicts, config.merge_budget)
    figures["MergedAdded"] = merged.added
    if config.judge is not None:
        figures["MergedDensity"] = merged.density
        figures["MergedCoverage"] = merged.covered
        figures["MergedJudged"] = merged.judged
    return {metric: values.astype(np.float64) for metric, values in figures.items()}


def mean_figures(
    figures: dict[str, np.ndarray], lists: Lists, config: EvalConfig, catalog_size: int
) -> dict[str, float]:
    """Mean of every metric over queries; what no query has a figure for is left out.

    NovelJudged@k is the share of all queries' novel items: of these RelevantNovel@k counts the judged ones.
    """
    means = {metric: _mean(values) for metric, values in figures.items()}
    for k in config.k:
        if f"NovelJudged@{k}" in figures:
            count = figures[f"Novelty@{k}"]
            judged = np.nan_to_num(figures[f"NovelJudged@{k}"]) @ count
            means[f"NovelJudged@{k}"] = float(judged / count.sum()) if count.any() else math.nan
        means[f"CatalogCoverage@{k}"] = metrics.catalog_coverage(lists.rows, k, catalog_size)
    return {metric: value for metric, value in means.items() if not math.isnan(value)}


def _mean(values: np.ndarray) -> float:
    kept = values[~np.isnan(values)]
    return float(kept.mean()) if len(kept) else math.nan


def judged_share(lists: dict[str, Lists], deployed: Lists) -> float:
    """Share of judged items among all places of the lists, the deployed ones' included; 1 without any."""
    every = [deployed, *lists.values()]
    present = sum(int((of.rows >= 0).sum()) for of in every)
    return sum(int((of.verdicts != UNKNOWN).sum()) for of in every) / present if present else 1.0


def bound_of(metric: str, means: dict[str, float], judged: float | None) -> str:
    """How a mean is marked that too few verdicts stand behind; nothing where enough do.

    What is not judged counts as irrelevant: a count of relevant items is then a lower bound, "≥", and the
    recall of what is known to be relevant may be off either way, "~".

    Args:
        metric: its name.
        means: the model's means.
        judged: `judged_share`; None without a judge.
    """
    name, _, cut = metric.partition("@")
    if judged is None:
        return ""
    if name == "KnownRecall":
        return "~" if judged < metrics.ENOUGH_JUDGED else ""
    share = {
        "RelevantNovel": f"NovelJudged@{cut}",
        "MergedDensity": "MergedJudged",
        "MergedCoverage": "MergedJudged",
    }
    # Without a novel item there is nothing to judge.
    return "≥" if name in share and means.get(share[name], 1.0) < metrics.ENOUGH_JUDGED else ""


def significance_of(per_query: dict[str, dict[str, np.ndarray]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Intervals of every mean; p-values against the base, corrected over the models compared.

    What hardly any query has a figure for has no interval, and no p-value where a model and the base share
    none; nor has NovelJudged, which is no mean over queries.
    """
    names = [name for name in per_query[BASE] if not name.startswith("NovelJudged")]
    figures = {model: np.stack([of[name] for name in names], axis=1) for model, of in per_query.items()}
    others = [model for model in figures if model != BASE]
    # All models side by side in one matrix share the resamples and the sign flips.
    shape = (-1, len(names))
    low, high = (
        end.reshape(shape) for end in bootstrap_intervals(np.concatenate([*figures.values()], axis=1))
    )
    p_values = np.empty((0, len(names)))
    if others:
        differences = np.concatenate([figures[model] - figures[BASE] for model in others], axis=1)
        is_shared = (~np.isnan(differences)).any(axis=0)
        p_values = np.where(is_shared, randomization_tests(differences), np.nan).reshape(shape)
    corrected = holm(p_values)
    result: dict[str, dict[str, dict[str, Any]]] = {}
    for place, model in enumerate(figures):
        ends = zip(names, low[place].tolist(), high[place].tolist(), strict=True)
        result[model] = {
            name: {} if math.isnan(start) else {"low": start, "high": end} for name, start, end in ends
        }
    for place, model in enumerate(others):
        for column in np.flatnonzero(~np.isnan(p_values[place])):
            found = {"p": float(p_values[place, column]), "p_holm": float(corrected[place, column])}
            result[model][names[column]] |= found
    return result


def main_metrics(config: EvalConfig) -> list[str]:
    """The metrics on which models are compared with each other."""
    deepest = max(config.k)
    names = list(dict.fromkeys([f"Novelty@{deepest}", f"Recall@{deepest}", config.recall_metric]))
    if config.judge is not None:
        names += [f"RelevantNovel@{deepest}", f"Precision@{min(config.k)}", "MergedDensity"]
    return names


def human_corrections(
    lists: dict[str, Lists], deployed: Lists, people: LabelTable | None, config: EvalConfig, report: Reporter
) -> dict[str, dict[str, Corrected]]:
    """Model → metric → the figure corrected by human labels; warns of samples that are too few or uneven."""
    if people is None:
        return {}
    top = deployed.rows
    found = {name: human_figures(of.rows, of.verdicts, top, people, config.k) for name, of in lists.items()}
    # Novel items are rare at shallow cuts; what matters is that the deepest one has its labels.
    main = [f"Precision@{min(config.k)}", f"RelevantNovel@{max(config.k)}"]
    counts = [
        (*((of[metric].pairs, of[metric].relevant) if metric in of else (0, 0)), f"{metric} of {name}")
        for name, of in found.items()
        for metric in main
        if name != BASE or metric == main[0]
    ]
    fewest, _, figure = min(counts)
    uneven = [name for name, of in lists.items() if is_uneven(of.rows, top, people)]
    if not (people.verdicts == IRRELEVANT).any():
        report.warn(
            f"{config.human}: calls no pair irrelevant, as clicks and qrels often do not; a sample that "
            "people labelled holds noes, too, and without them the corrected figures are far too high"
        )
    if uneven:
        report.warn(
            f"{config.human}: in the lists of {', '.join(uneven)}, novel and other items are not labelled at "
            "the same rate, as in a random sample of them; their corrected figures are biased"
        )
    if fewest < FEW_PAIRS:
        report.warn(
            f"{config.human}: only {fewest} human labels fall on {figure}; intervals from fewer than "
            f"{FEW_PAIRS} are too narrow, label more pairs"
        )
    else:
        _, liked, figure = min(counts, key=lambda count: count[1])
        if liked < FEW_RELEVANT:
            report.warn(
                f"{config.human}: people call only {liked} of the pairs relevant that {figure} rests on; "
                f"intervals from fewer than {FEW_RELEVANT} are too narrow, label more pairs"
            )
    return found
