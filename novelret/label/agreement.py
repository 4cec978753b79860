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
from scipy import stats

from novelret.artifacts import read_manifest
from novelret.data.source import read_part, read_qrels_file
from novelret.data.split import load_queries
from novelret.errors import UserError
from novelret.label.scores import are_relevant, check_threshold, warn_of_contradictions
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
        report: warned where the agreement does not carry the labels, or people contradict each other.

    Raises:
        UserError: a file cannot be read, the two share no pair, the seed is below 0, or the threshold is no
            number.
    """
    report = report or Reporter()
    if seed < 0:
        raise UserError(f"--seed {seed}: must be at least 0")
    manifest = read_manifest(labels, "labels")
    if show < 0:
        raise UserError(f"--show {show}: must be at least 0")
    check_threshold(threshold)
    scores = _scores(human, threshold, report)
    found = dict(_shared(labels / "judgements.parquet", scores))
    usable = [pair for pair, (verdict, _, _) in found.items() if verdict != UNKNOWN]
    if not usable:
        raise UserError(
            f"{human}: none of its {len(scores):,} pairs is judged in {labels}; label those pairs, with "
            f"`novelret label --from pairs:{human}`"
        )
    judged = np.array([found[pair][0] == RELEVANT for pair in usable])
    people = are_relevant(np.array([scores[pair] for pair in usable]), threshold)
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


def _scores(path: Path, threshold: float | None, report: Reporter) -> dict[tuple[str, str], float]:
    """People's score of each pair; the last line counts."""
    lines = [(query, item, score) for _, query, item, score in read_qrels_file(path)]
    if not lines:
        raise UserError(f"{path}: holds no judgements")
    scores = {(query, item): score for query, item, score in lines}
    number = {pair: n for n, pair in enumerate(scores)}
    pairs = np.array([number[query, item] for query, item, _ in lines])
    relevant = are_relevant(np.array([score for _, _, score in lines]), threshold)
    warn_of_contradictions(path, pairs, relevant, report)
    return scores


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
    narrow (cluster bootstrap, Davison and Hinkley, 1997). Of few queries resamples differ too little: the
    ends are moved away from the figure as Student's t does (Hesterberg, 2015). No interval is narrower than
    the exact one of as many pairs that have nothing to do with each other (Clopper and Pearson, 1934), as
    surveys have it (Korn and Graubard, 1998), and kappa's than what accuracy's gives at the same chance.

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
    """The ends, (2, 4), moved outwards: as few queries need it, and as far as those of independent pairs."""
    total, queries = counts.sum(axis=0), len(counts)
    figures = agreement_figures(total[None])[0]
    few = stats.t.ppf(1 - tail, queries - 1) / stats.norm.ppf(1 - tail) * (queries / (queries - 1)) ** 0.5
    low, high = figures + few * (ends - figures)
    both, judge_alone, people_alone, neither = total
    sizes = np.array([total.sum(), both + judge_alone, both + people_alone])
    hits = np.array([both + neither, both, both])
    with np.errstate(invalid="ignore"):
        exact_low = np.where(hits > 0, stats.beta.ppf(tail, hits, sizes - hits + 1), 0.0)
        exact_high = np.where(hits < sizes, stats.beta.ppf(1 - tail, hits + 1, sizes - hits), 1.0)
    chance = _chance(sizes[1] / sizes[0], sizes[2] / sizes[0])
    if chance < 1:
        exact_low, exact_high = (
            np.append(x, (x[0] - chance) / (1 - chance)) for x in (exact_low, exact_high)
        )
    else:  # both always say the same word
        exact_low, exact_high = np.append(exact_low, np.nan), np.append(exact_high, np.nan)
    least = np.array([0.0, 0.0, 0.0, -1.0])
    low, high = np.maximum(np.minimum(low, exact_low), least), np.minimum(np.maximum(high, exact_high), 1.0)
    undefined = np.isnan(figures)
    low[undefined] = high[undefined] = np.nan
    return low, high


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
