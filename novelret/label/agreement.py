"""How far a judge can be trusted: its verdicts held against people's, pair by pair."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from novelret.artifacts import read_manifest
from novelret.data.source import read_part, read_qrels_file
from novelret.data.split import load_queries
from novelret.errors import UserError
from novelret.label.table import RELEVANT, UNKNOWN
from novelret.progress import Reporter

ENOUGH = 0.85
"""PG-Ret uses a prompt only after it agreed with people on more than this (KDD 2024, section 5.2)."""

FIGURES = ("accuracy", "precision", "recall", "kappa")
_CELLS_AT_ONCE = 20_000_000  # resample counts held at a time: 160 MB


@dataclass(frozen=True)
class Disagreement:
    """One pair that the judge and the people see differently.

    Attributes:
        query_id: the query.
        item_id: the item.
        query: its text.
        item: its text.
        judge: whether the judge calls it relevant.
        human: the people's score.
        answer: the judge's raw answer, where it gave one.
    """

    query_id: str
    item_id: str
    query: str
    item: str
    judge: bool
    human: float
    answer: str | None


@dataclass(frozen=True)
class Agreement:
    """A judge beside people.

    Attributes:
        judge: who gave the verdicts, as given to --judge.
        pairs: pairs that both have judged.
        queries: distinct queries of those.
        not_judged: pairs in the people's file that the labels do not hold.
        unusable: pairs whose answer from the judge could not be read.
        confusion: counts as "judge-human", each "yes" or "no".
        figures: accuracy, precision, recall and kappa; None where undefined.
        intervals: 95 % bootstrap interval of each; None where undefined.
        disagreements: the worst ones, worst first.
    """

    judge: str
    pairs: int
    queries: int
    not_judged: int
    unusable: int
    confusion: dict[str, int]
    figures: dict[str, float | None]
    intervals: dict[str, tuple[float, float] | None]
    disagreements: list[Disagreement]


def measure_agreement(
    labels: Path,
    human: Path,
    *,
    data: str | None = None,
    threshold: float | None = None,
    show: int = 10,
    seed: int = 0,
    report: Reporter | None = None,
) -> Agreement:
    """Hold a LABELS folder against people's judgements.

    Args:
        labels: LABELS folder.
        human: people's judgements as qrels; the last line about a pair counts.
        data: where the texts of the disagreements are; by default what the labels were made from.
        threshold: lowest human score that counts as relevant; by default anything above 0.
        show: how many disagreements to give texts for.
        seed: decides the resamples, and the order of equally bad disagreements.
        report: warned where the agreement does not carry the labels.

    Raises:
        UserError: a file cannot be read, the two share no pair, or the seed is below 0.
    """
    report = report or Reporter()
    if seed < 0:
        raise UserError(f"--seed {seed}: must be at least 0")
    manifest = read_manifest(labels, "labels")
    scores = {(query, item): score for _, query, item, score in read_qrels_file(human)}
    if not scores:
        raise UserError(f"{human}: holds no judgements")
    found = dict(_shared(labels / "judgements.parquet", scores))
    usable = [pair for pair, (verdict, _, _) in found.items() if verdict != UNKNOWN]
    if not usable:
        raise UserError(
            f"{human}: none of its {len(scores):,} pairs is judged in {labels}; label those pairs, with "
            f"`novelret label --from pairs:{human}`"
        )
    judged = np.array([found[pair][0] == RELEVANT for pair in usable])
    people = np.array([_is_relevant(scores[pair], threshold) for pair in usable])
    rows = np.unique([query for query, _ in usable], return_inverse=True)[1]
    counts = confusion_counts(judged, people, rows)
    total = counts.sum(axis=0)
    figures = agreement_figures(total[None])[0]
    low, high = bootstrap_by_query(counts, seed=seed)
    result = Agreement(
        judge=str(manifest.config["judge"]),
        pairs=len(usable),
        queries=len(counts),
        not_judged=len(scores) - len(found),
        unusable=len(found) - len(usable),
        confusion=dict(zip(("yes-yes", "yes-no", "no-yes", "no-no"), map(int, total), strict=True)),
        figures={name: _number(figures[n]) for n, name in enumerate(FIGURES)},
        intervals={
            name: None if np.isnan(low[n]) else (float(low[n]), float(high[n]))
            for n, name in enumerate(FIGURES)
        },
        disagreements=_worst(
            [pair for pair, differs in zip(usable, judged != people, strict=True) if differs],
            found,
            scores,
            data or str(manifest.config["data"]),
            threshold,
            show,
            seed,
        ),
    )
    _warn(result, report)
    return result


def confusion_counts(judged: np.ndarray, people: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """(Q, 4) int64 counts per query: both yes, the judge alone, the people alone, neither.

    Args:
        judged: (n,) bool, the judge's verdicts.
        people: (n,) bool, the people's.
        rows: (n,) query of each pair, 0 to Q − 1.
    """
    cell = np.where(judged, np.where(people, 0, 1), np.where(people, 2, 3))
    size = int(rows.max()) + 1
    return np.bincount(rows * 4 + cell, minlength=4 * size).reshape(size, 4)


def agreement_figures(counts: np.ndarray) -> np.ndarray:
    """(S, 4) accuracy, precision, recall and Cohen's kappa of (S, 4) confusion counts; NaN where undefined.

    Cohen's kappa (1960): (observed − chance) / (1 − chance), with the chance agreement of two judges who
    say yes as often as these two but independently of each other.
    """
    both, judge_alone, people_alone, neither = np.asarray(counts, dtype=np.float64).T
    with np.errstate(invalid="ignore", divide="ignore"):
        total = both + judge_alone + people_alone + neither
        accuracy = (both + neither) / total
        chance = _chance((both + judge_alone) / total, (both + people_alone) / total)
        kappa = np.where(chance < 1, (accuracy - chance) / (1 - chance), np.nan)
        precision, recall = both / (both + judge_alone), both / (both + people_alone)
    return np.stack([accuracy, precision, recall, kappa], axis=1)


def _chance(judge_yes: Any, people_yes: Any) -> Any:
    """How often two agree who say yes as often as that, independently of each other."""
    return judge_yes * people_yes + (1 - judge_yes) * (1 - people_yes)


def bootstrap_by_query(
    counts: np.ndarray, *, samples: int = 2_000, level: float = 0.95, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Percentile bootstrap intervals of the four figures; whole queries are drawn.

    Pairs of one query share its difficulty, so drawing single pairs would give intervals that are too
    narrow (cluster bootstrap, Davison and Hinkley, 1997). Where all pairs agree, or none does, resamples
    cannot differ: the interval is then the exact one of that many pairs (Clopper and Pearson, 1934), as
    surveys have it (Korn and Graubard, 1998), and kappa's what that accuracy gives at the same chance.

    Args:
        counts: (Q, 4) confusion counts per query.
        samples: number of resamples.
        level: nominal coverage.
        seed: decides the resamples.

    Returns:
        (4,) lower and (4,) upper ends; NaN for fewer than two queries and for undefined figures.
    """
    if len(counts) < 2:
        return np.full(4, np.nan), np.full(4, np.nan)
    rng = np.random.default_rng(seed)
    at_once = max(1, _CELLS_AT_ONCE // len(counts))
    even = np.full(len(counts), 1 / len(counts))
    drawn = []
    for start in range(0, samples, at_once):
        weights = rng.multinomial(len(counts), even, size=min(at_once, samples - start))
        drawn.append(agreement_figures(weights @ counts))
    figures = np.concatenate(drawn)
    tail = (1 - level) / 2
    ends = np.full((2, 4), np.nan)
    some = ~np.isnan(figures).all(axis=0)
    ends[:, some] = np.nanquantile(figures[:, some], [tail, 1 - tail], axis=0)
    return _opened(counts, ends, tail)


def _opened(counts: np.ndarray, ends: np.ndarray, tail: float) -> tuple[np.ndarray, np.ndarray]:
    """The ends, (2, 4), with the exact ones of figures that are 0 or 1, which no resample moves."""
    low, high = ends
    total = counts.sum(axis=0)
    both, judge_alone, people_alone, _ = total
    figures = agreement_figures(total[None])[0]
    pairs = (total.sum(), both + judge_alone, both + people_alone)
    for n, size in enumerate(pairs):
        if figures[n] == 1:
            low[n] = tail ** (1 / size)
        elif figures[n] == 0:
            high[n] = 1 - tail ** (1 / size)
    if figures[3] == 1:
        chance = _chance(pairs[1] / pairs[0], pairs[2] / pairs[0])
        low[3] = (low[0] - chance) / (1 - chance)
    return low, high


def _is_relevant(score: float, threshold: float | None) -> bool:
    return score > 0 if threshold is None else score >= threshold


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _shared(
    path: Path, scores: dict[tuple[str, str], float]
) -> Iterator[tuple[tuple[str, str], tuple[int, float | None, str | None]]]:
    """Pair → (verdict, grade, answer) of the judgements about pairs that people judged, a batch at a time."""
    wanted = pa.array(sorted({query for query, _ in scores}), pa.string())
    columns = ["query_id", "item_id", "verdict", "grade", "answer"]
    for batch in pq.ParquetFile(path).iter_batches(batch_size=1 << 16, columns=columns):
        kept = pc.is_in(batch["query_id"], value_set=wanted)
        for row in batch.filter(kept).to_pylist():
            pair = (row["query_id"], row["item_id"])
            if pair in scores:
                yield pair, (row["verdict"], row["grade"], row["answer"])


def _worst(
    pairs: list[tuple[str, str]],
    found: dict[tuple[str, str], tuple[int, float | None, str | None]],
    scores: dict[tuple[str, str], float],
    data: str,
    threshold: float | None,
    show: int,
    seed: int,
) -> list[Disagreement]:
    """The disagreements where people were surest, then those where the judge was, with their texts."""
    boundary = 0.5 if threshold is None else threshold - 0.5
    order = np.random.default_rng(seed).permutation(len(pairs))

    def sureness(number: int) -> tuple[float, float]:
        pair = pairs[number]
        verdict, grade, _ = found[pair]
        said = 0.0 if grade is None else grade if verdict == RELEVANT else -grade
        return abs(scores[pair] - boundary), said

    chosen = [pairs[n] for n in sorted(order, key=sureness, reverse=True)[:show]]
    if not chosen:
        return []
    queries = load_queries(data, {query for query, _ in chosen})
    items = _item_texts(data, {item for _, item in chosen})
    return [
        Disagreement(
            query,
            item,
            queries.get(query, ""),
            items.get(item, ""),
            found[query, item][0] == RELEVANT,
            scores[query, item],
            found[query, item][2],
        )
        for query, item in chosen
    ]


def _item_texts(data: str, wanted: set[str]) -> dict[str, str]:
    texts: dict[str, str] = {}
    for _, row in read_part(data, "corpus"):
        item_id = str(row.get("_id"))
        if item_id in wanted:
            texts[item_id] = f"{row.get('title') or ''} {row.get('text') or ''}".strip()
            if len(texts) == len(wanted):
                break
    return texts


def _warn(result: Agreement, report: Reporter) -> None:
    accuracy = result.figures["accuracy"] or 0.0
    interval = result.intervals["accuracy"]
    if accuracy < ENOUGH:
        report.warn(
            f"{result.judge} agrees with people on {accuracy:.1%} of {result.pairs:,} pairs, below the "
            f"{ENOUGH:.0%} that a prompt should reach before it is used; change the prompt or the judge"
        )
    elif interval is None or interval[0] < ENOUGH:
        report.warn(
            f"{result.pairs:,} pairs of {result.queries:,} queries do not yet show that the agreement is "
            f"above {ENOUGH:.0%}; have people judge more"
        )
    people_say_no = result.confusion["yes-no"] + result.confusion["no-no"]
    people_say_yes = result.confusion["yes-yes"] + result.confusion["no-yes"]
    if not people_say_no or not people_say_yes:
        report.warn(
            f"people call {'none' if people_say_no else 'all'} of the shared pairs relevant; the figures say "
            "little until the file holds both kinds"
        )
