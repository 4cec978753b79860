"""Base and model side by side: for one query that is typed, or for queries of a split."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from novelret import encode
from novelret.artifacts import MANIFEST, is_kind, read_manifest
from novelret.data.split import Split, load_split
from novelret.errors import UserError
from novelret.evaluate import metrics
from novelret.evaluate.config import BASE, named_model
from novelret.index import Index, base_lists, finetuned_query_embeddings, load_finetuned, open_index
from novelret.label.judges.file import check_missing, file_table
from novelret.label.labels import Labels, read_table
from novelret.label.table import UNKNOWN, LabelTable, empty_table
from novelret.progress import Reporter

MOST = ("gained", "lost")
_FIRST_NOVEL = 5


@dataclass(frozen=True)
class CompareConfig:
    """Settings of `novelret compare`.

    Attributes:
        data: BEIR folder or Hugging Face data set.
        index: INDEX folder.
        model: MODEL, or "NAME=MODEL".
        split: whose queries are shown.
        query_ids: the queries; where none are given, those that gained or lost most.
        most: "gained" (relevant novel items, or novel ones without judgements) or "lost" (recall).
        queries: how many of those.
        judgements: qrels, or a LABELS or REPORT folder (one with a judge), to mark what is relevant.
        missing: what a pair means that a qrels file does not list: "unknown" or "irrelevant".
        k: places of each list that are shown.
        base_depth: L, the deployed list's length; gains and losses are counted in lists of this length.
        device: "auto", "cpu" or a CUDA device.
        ignore_identical_ids: leave the item whose id is the query's own out.
    """

    data: str
    index: str
    model: str
    split: str = "test"
    query_ids: tuple[str, ...] = ()
    most: str = "gained"
    queries: int = 5
    judgements: str | None = None
    missing: str = "unknown"
    k: int = 10
    base_depth: int = 50
    device: str = "auto"
    ignore_identical_ids: bool = True


def compare_query(
    data: str,
    index_folder: Path,
    model: str | None,
    query: str,
    *,
    k: int,
    base_depth: int,
    device: str,
    report: Reporter | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Hits by name ("base", then the model's): id, text, score, rank in base (None beyond L), novel.

    Raises:
        UserError: bad index or model, or depths beyond the catalog.
    """
    index = open_index(index_folder, data)
    _check_depths(index, k, base_depth)
    device = encode.pick_device(device)
    encoders = {"base": index.query_encoder(device)}
    if model is not None:
        name, path = _named(model)
        encoders[name] = load_finetuned(path, index, device)
    results: dict[str, list[dict[str, Any]]] = {}
    base_rank: dict[int, int] = {}
    for name, encoder in encoders.items():
        depth = max(k, base_depth) if name == "base" else k
        embedding, what = encode.encode_queries(encoder, [query]), f"top list of {name}"
        rows, scores = index.search(embedding, depth, device=device, report=report, what=what)
        if name == "base":
            base_rank = {row: place + 1 for place, row in enumerate(rows[0, :base_depth].tolist())}
        places = np.flatnonzero(rows[0, :k] >= 0)
        results[name] = _hits(index, rows[0], scores[0], places, base_rank)
    return results


def compare_split(config: CompareConfig, report: Reporter | None = None) -> list[dict[str, Any]]:
    """Queries of a split: id, text, gain, recall_change, and hits by name as in `compare_query`.

    A query without feedback has no recall_change (None). Hits also say whether they are `relevant` (None
    where unknown) and `feedback`, and their `rank`. Below the shown places, a model's list goes on with its
    first novel items.

    Raises:
        UserError: bad settings, data, index, model or judgements, or an unknown query.
    """
    report = report or Reporter()
    if config.most not in MOST:
        raise UserError(f"--most {config.most}: unknown; choose from {', '.join(MOST)}")
    check_missing(config.missing)
    if config.queries < 1:
        raise UserError(f"--queries {config.queries}: must be at least 1")
    index = open_index(config.index, config.data)
    _check_depths(index, config.k, config.base_depth)
    split = load_split(
        config.data, config.split, index.catalog, ignore_identical_ids=config.ignore_identical_ids
    )
    rows_there = _rows_of(split, config.query_ids) if config.query_ids else np.arange(len(split))
    # Of the whole split: judgements may well be of other queries than those asked for.
    table = _judgements(config, split, index)
    split = split.subset(rows_there)
    device = encode.pick_device(config.device)
    name, path = _named(config.model)
    encoder = load_finetuned(path, index, device)
    depth = max(config.k, config.base_depth)
    base_rows, base_scores = base_lists(index, split, depth, device=device, report=report)
    embeddings = finetuned_query_embeddings(encoder, index, split, device=device, report=report)
    rows, scores = index.search(
        embeddings, depth, split.excluded, device=device, report=report, what=f"top lists of {name}"
    )
    after, before = (
        metrics.recall(
            *metrics.feedback_hits(of, split.feedback_queries, split.feedback_items), config.base_depth
        )
        for of in (rows, base_rows)
    )
    change = after - before
    verdicts = table.lookup(rows_there[:, None], rows)
    base_top = base_rows[:, : config.base_depth]
    new = metrics.novel(rows, base_top)
    gain = metrics.novelty(new, config.base_depth)
    if config.judgements is not None:
        gain = metrics.relevant_novelty(new, verdicts, config.base_depth)
    compared = []
    for q in _chosen(config, gain, change):
        base_rank = {row: place + 1 for place, row in enumerate(base_top[q].tolist())}
        deeper = np.flatnonzero(new[q])
        deeper = deeper[deeper >= config.k][:_FIRST_NOVEL]
        sides = {
            "base": (base_rows[q], base_scores[q], np.arange(config.k)),
            name: (rows[q], scores[q], np.concatenate([np.arange(config.k), deeper])),
        }
        liked = set(split.feedback_items[split.feedback_queries == q].tolist())
        results = {}
        for side, (of, its_scores, places) in sides.items():
            places = places[of[places] >= 0]
            results[side] = _hits(index, of, its_scores, places, base_rank)
            judged = table.lookup(np.full(len(places), rows_there[q]), of[places])
            for hit, place, verdict in zip(results[side], places.tolist(), judged.tolist(), strict=True):
                hit["rank"] = place + 1
                hit["relevant"] = None if verdict == UNKNOWN else bool(verdict)
                hit["feedback"] = int(of[place]) in liked
        compared.append(
            {
                "id": split.query_ids[q],
                "text": split.query_texts[q],
                "gain": int(gain[q]),
                "recall_change": None if np.isnan(change[q]) else float(change[q]),
                "results": results,
            }
        )
    return compared


def _named(model: str) -> tuple[str, str]:
    """Name and path of "NAME=MODEL" or of a bare path."""
    name, path = named_model(model)
    if name == BASE:
        raise UserError(f"--model {model}: {BASE!r} is the deployed model; give another name, as NAME=PATH")
    return name, path


def _check_depths(index: Index, k: int, base_depth: int) -> None:
    for option, depth in (("--k", k), ("--base-depth", base_depth)):
        if not 1 <= depth <= len(index):
            raise UserError(f"{option} {depth}: must be from 1 to the catalog's {len(index)} items")


def _rows_of(split: Split, query_ids: tuple[str, ...]) -> np.ndarray:
    row_of = {query_id: row for row, query_id in enumerate(split.query_ids)}
    for query_id in query_ids:
        if query_id not in row_of:
            raise UserError(f"--query-id {query_id}: is no query of split {split.name}")
    return np.unique([row_of[query_id] for query_id in query_ids])


def _judgements(config: CompareConfig, split: Split, index: Index) -> LabelTable:
    if config.judgements is None:
        return empty_table(len(index))
    path = Path(config.judgements)
    if not path.is_dir():
        return file_table(path, split.query_ids, index.catalog, config.missing)
    found, verdicts = path / "judgements.parquet", path / "qrels" / "judged.trec"
    if (path / MANIFEST).is_file() and found.is_file():
        if config.missing != "unknown":
            raise UserError(
                f"--missing {config.missing}: is of pairs that a qrels file does not list, and {path} holds "
                "verdicts of a judge that was asked; leave it out"
            )
        if is_kind(path, "labels"):  # which know what text each query had when it was judged
            table = Labels(path, read_manifest(path, "labels")).table(split, index.catalog)
        else:
            table = read_table(found, split.query_ids, index.catalog)
        if not len(table):
            raise UserError(
                f"--judgements {path}: judges no query of split {split.name}; give those of its queries, or "
                "another --split"
            )
        return table
    if (path / MANIFEST).is_file() and verdicts.is_file():  # a REPORT whose judge was a file
        return file_table(verdicts, split.query_ids, index.catalog, config.missing)
    raise UserError(
        f"--judgements {path}: holds no judgements; give LABELS, a REPORT made with --judge, or qrels"
    )


def _chosen(config: CompareConfig, gain: np.ndarray, change: np.ndarray) -> list[int]:
    """Rows of the queries to show, those asked for in the split's order."""
    if config.query_ids:
        return list(range(len(gain)))
    key, worth = (-gain, gain > 0) if config.most == "gained" else (change, change < 0)
    order = np.argsort(key, kind="stable")
    chosen: list[int] = order[worth[order]][: config.queries].tolist()
    return chosen


def _hits(
    index: Index, rows: np.ndarray, scores: np.ndarray, places: np.ndarray, base_rank: dict[int, int]
) -> list[dict[str, Any]]:
    """The items at some places of one list."""
    shown = rows[places]
    return [
        {
            "id": item_id,
            "text": text,
            "score": float(score),
            "base_rank": base_rank.get(row),
            "novel": row not in base_rank,
        }
        for item_id, text, score, row in zip(
            index.catalog.ids_at(shown),
            index.catalog.texts_at(shown),
            scores[places],
            shown.tolist(),
            strict=True,
        )
    ]
