"""Metrics, one file each: arrays of top lists in, one figure per query out.

Lists are (Q, K) catalog rows, best first, −1 where a list is shorter; `k` cuts them. Which of their places
hold novel items or feedback is found once for all metrics and cuts, by `novel` and `feedback_hits`. Order
within a list is given by the one tie rule in `novelret.search`: score rounded to six decimals, then item id,
descending.
"""

from novelret.evaluate.metrics.coverage import catalog_coverage
from novelret.evaluate.metrics.judged import judged, novel_judged
from novelret.evaluate.metrics.merged import Merged, merge
from novelret.evaluate.metrics.mrr import reciprocal_rank
from novelret.evaluate.metrics.ndcg import ndcg
from novelret.evaluate.metrics.novelty import novel, novel_precision, novelty, relevant_novelty
from novelret.evaluate.metrics.precision import ENOUGH_JUDGED, precision
from novelret.evaluate.metrics.recall import LOGGED_RECALL, RECALLS, recall
from novelret.membership import feedback_hits

__all__ = [
    "ENOUGH_JUDGED",
    "LOGGED_RECALL",
    "RECALLS",
    "Merged",
    "catalog_coverage",
    "feedback_hits",
    "judged",
    "merge",
    "ndcg",
    "novel",
    "novel_judged",
    "novel_precision",
    "novelty",
    "precision",
    "recall",
    "reciprocal_rank",
    "relevant_novelty",
]
