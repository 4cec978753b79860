"""Figures by an LLM judge corrected by a few human labels: prediction-powered inference.

The judge labels every item of every list and errs; people label a small random sample of these (query, item)
pairs and are taken for the truth. The corrected figure is the judge's own plus the mean error that the sample
shows, and its interval counts both the queries' variation and the sample's size (Angelopoulos, Bates,
Fannjiang, Jordan and Zrnic, *Prediction-powered inference*, Science 2023). How far the judge is believed is
tuned so that the interval is shortest (Angelopoulos, Duchi and Zrnic, *PPI++*, 2023): a judge that knows
nothing then costs nothing. Pairs of one query are alike, so the variance is taken over whole queries.

The sample must be drawn at random from the lists that are compared: any pair as likely as any other, as
`human_sample` draws it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from novelret.errors import UserError
from novelret.evaluate.metrics.novelty import novel
from novelret.label.table import RELEVANT, UNKNOWN, LabelTable

_LEAST_QUERIES = 5
FEW_PAIRS = 200
"""Fewer human-labelled pairs than this give an interval that is too narrow: the judge's errors are rare."""
FEW_RELEVANT = 30
"""Likewise fewer relevant ones: with 2 % of 300 labels, 95 % intervals held under 90 % in simulation."""


@dataclass(frozen=True)
class Corrected:
    """A judged figure after correction.

    Attributes:
        value: the corrected figure.
        low: lower end of its interval.
        high: upper end.
        pairs: human-labelled pairs it rests on.
        relevant: those of them that people call relevant.
        queries: queries these belong to.
        trust: how far the judge is believed, from 0 (the people's labels alone) to 1 (plain PPI).
    """

    value: float
    low: float
    high: float
    pairs: int
    relevant: int
    queries: int
    trust: float


def check_overlap(path: Path, people: LabelTable, lists: list[np.ndarray]) -> None:
    """Refuse human labels that are about none of the (Q, K) lists.

    Raises:
        UserError: there is no labelled pair in any list.
    """
    queries = np.arange(len(lists[0]))[:, None]
    if not any((people.lookup(queries, rows) != UNKNOWN).any() for rows in lists):
        raise UserError(
            f"{path}: none of its pairs is in any list; have people label a random sample of the "
            "(query, item) pairs in the lists that are compared"
        )


def human_figures(
    rows: np.ndarray, verdicts: np.ndarray, base: np.ndarray, people: LabelTable, cuts: tuple[int, ...]
) -> dict[str, Corrected]:
    """A model's judged figures corrected, by name, without those that too few labels fall on.

    Args:
        rows: (Q, K) lists, −1 padded.
        verdicts: (Q, K) int8 the judge's verdicts.
        base: (Q, width) the deployed lists, −1 padded.
        people: their verdicts.
        cuts: cuts of the lists.
    """
    human = people.lookup(np.arange(len(rows))[:, None], rows)
    new = novel(rows, base)
    figures = {}
    for k in cuts:
        figures[f"Precision@{k}"] = corrected_precision(rows, verdicts, human, k)
        figures[f"RelevantNovel@{k}"] = corrected_relevant_novelty(new, verdicts, human, k)
    return {name: figure for name, figure in figures.items() if figure is not None}


def is_uneven(rows: np.ndarray, base: np.ndarray, people: LabelTable) -> bool:
    """Whether people's labels lie so unevenly in some lists that they cannot be a random sample of them.

    Compares the labelled share of novel and of other places by a two-proportion z-test at z = 4: a sample
    drawn from other models' lists, or from novel items alone, biases the corrected figures.
    """
    labelled = people.lookup(np.arange(len(rows))[:, None], rows) != UNKNOWN
    new = novel(rows, base)
    places = np.array([new.sum(), ((rows >= 0) & ~new).sum()], dtype=np.float64)
    if places.min() == 0:
        return False
    shares = np.array([(labelled & new).sum(), (labelled & ~new).sum()]) / places
    whole = float((shares * places).sum() / places.sum())
    error = np.sqrt(whole * (1 - whole) * (1 / places).sum())
    return bool(abs(shares[0] - shares[1]) > 4 * error)


def corrected_precision(
    rows: np.ndarray, verdicts: np.ndarray, human: np.ndarray, k: int, *, level: float = 0.95
) -> Corrected | None:
    """Precision@k as people would measure it: the mean per-query share of relevant items in the top k.

    Args:
        rows: (Q, K) lists, −1 padded.
        verdicts: (Q, K) int8 the judge's verdicts; an unknown one is taken for "not relevant" and corrected.
        human: (Q, K) int8 people's verdicts, UNKNOWN nearly everywhere.
        k: cut of the lists.
        level: nominal coverage of the interval.

    Returns:
        The corrected figure; None where fewer than five queries have human labels in the top k.
    """
    places = rows[:, :k] >= 0
    some = places.any(axis=1)
    share = 1 / places[some].sum(axis=1)
    return _correct(places[some], share, verdicts[some, :k], human[some, :k], level, 1.0)


def corrected_relevant_novelty(
    new: np.ndarray, verdicts: np.ndarray, human: np.ndarray, k: int, *, level: float = 0.95
) -> Corrected | None:
    """RelevantNovel@k as people would measure it; `new` is (Q, K) bool, as of `metrics.novel` (see above)."""
    return _correct(new[:, :k], np.ones(len(new)), verdicts[:, :k], human[:, :k], level, float(k))


def _correct(
    places: np.ndarray,
    share: np.ndarray,
    verdicts: np.ndarray,
    human: np.ndarray,
    level: float,
    most: float,
) -> Corrected | None:
    """The mean over queries of share · (number of relevant places), estimated from both sources.

    θ = mean(λF) + mean(W)·r with r = Σ share·(h − λf) / Σ share over the labelled places; F and W are the
    judge's relevant places and all places of a query. The variance is that of its linearisation, one term ψ
    per query; ψ is linear in λ, so the λ that makes it least is a regression coefficient.
    """
    from scipy import stats  # loads for over a second

    labelled = places & (human != UNKNOWN)
    pairs_of = labelled.sum(axis=1)
    queries = int((pairs_of > 0).sum())
    if queries < _LEAST_QUERIES:
        return None
    relevant = verdicts == RELEVANT
    judged = share * (places & relevant).sum(axis=1)
    whole = share * places.sum(axis=1)
    seen = share * pairs_of
    seen_human = share * (labelled & (human == RELEVANT)).sum(axis=1)
    seen_judged = share * (labelled & relevant).sum(axis=1)
    by_human, by_judge = seen_human.sum() / seen.sum(), seen_judged.sum() / seen.sum()
    scale = whole.mean() / seen.sum()
    spread = (whole - whole.mean()) / len(whole)
    without = by_human * spread + scale * (seen_human - by_human * seen)
    gained = (
        by_judge * spread + scale * (seen_judged - by_judge * seen) - (judged - judged.mean()) / len(judged)
    )
    power = float(gained @ gained)
    trust = min(1.0, max(0.0, float(without @ gained) / power)) if power > 0 else 0.0
    value = trust * judged.mean() + whole.mean() * (by_human - trust * by_judge)
    terms = without - trust * gained
    error = float(np.sqrt(terms @ terms * queries / (queries - 1)))
    reach = error * float(stats.t.ppf((1 + level) / 2, queries - 1))
    unexplained = seen_human - trust * seen_judged - (by_human - trust * by_judge) * seen
    if np.abs(unexplained).max() < 1e-9:
        # A sample without any error still allows for −log(1 − level) / n of them (the rule of three).
        reach = float(np.hypot(reach, whole.mean() * -np.log(1 - level) / pairs_of.sum()))
    low, middle, high = (min(max(float(end), 0.0), most) for end in (value - reach, value, value + reach))
    liked = int((labelled & (human == RELEVANT)).sum())
    return Corrected(middle, low, high, int(pairs_of.sum()), liked, queries, trust)
