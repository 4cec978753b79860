"""The novelty–recall frontier of several models, and the point that a recall budget allows."""

from __future__ import annotations

from dataclasses import dataclass

from novelret.tradeoff import keeps_recall, unbeaten


@dataclass(frozen=True)
class FrontierPoint:
    """One model on the frontier.

    Attributes:
        model: its name.
        recall: the recall that the budget is about.
        recall_change: relative to the base, −0.02 for a loss of two percent.
        novelty: Novelty at the deepest cut, a mean count.
        relevant_novel: RelevantNovel at the deepest cut; None without a judge.
        pareto_novelty: no other model has as much recall and novelty, and more of one.
        pareto_relevant_novel: the same for RelevantNovel.
    """

    model: str
    recall: float
    recall_change: float
    novelty: float
    relevant_novel: float | None
    pareto_novelty: bool
    pareto_relevant_novel: bool


@dataclass(frozen=True)
class Frontier:
    """Every model compared, and the one to launch.

    Attributes:
        k: the cut of all figures, the deepest one.
        recall_metric: "Recall@k", or "KnownRecall@k".
        max_recall_drop: the budget: how much of the base's recall may be lost, relative.
        points: the base first, as the origin.
        selected: the model that brings most within the budget; None where none brings more than the base.
    """

    k: int
    recall_metric: str
    max_recall_drop: float
    points: list[FrontierPoint]
    selected: str | None


def make_frontier(
    means: dict[str, dict[str, float]], base: str, k: int, max_recall_drop: float, recall_metric: str
) -> Frontier:
    """Mark the Pareto set among models and choose within the recall budget.

    Most relevant novel items win (most novel ones without a judge); ties go to novelty, then to recall.

    Args:
        means: model → metric → figure, the base among them.
        base: the base's name.
        k: the cut.
        max_recall_drop: relative loss of recall that is acceptable.
        recall_metric: which recall at that cut.
    """
    recall = {model: of[recall_metric] for model, of in means.items()}
    novelty = {model: of[f"Novelty@{k}"] for model, of in means.items()}
    relevant = {model: of.get(f"RelevantNovel@{k}") for model, of in means.items()}
    judged = {model: value for model, value in relevant.items() if value is not None}
    best_novelty, best_relevant = _pareto(recall, novelty), _pareto(recall, judged)
    points = [
        FrontierPoint(
            model,
            recall[model],
            recall[model] / recall[base] - 1 if recall[base] > 0 else 0.0,
            novelty[model],
            relevant[model],
            model in best_novelty,
            model in best_relevant,
        )
        for model in means
    ]
    gain = judged or novelty
    inside = [
        model
        for model in gain
        if gain[model] > gain[base] and keeps_recall(recall[model], recall[base], max_recall_drop)
    ]
    selected = max(inside, key=lambda model: (gain[model], novelty[model], recall[model]), default=None)
    return Frontier(k, recall_metric, max_recall_drop, points, selected)


def _pareto(recall: dict[str, float], gain: dict[str, float]) -> set[str]:
    best = unbeaten([(recall[model], gain[model]) for model in gain])
    return {model for model, is_best in zip(gain, best, strict=True) if is_best}
