"""Which (query, item) pairs to have judged."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from novelret.data.catalog import rows_of_pairs
from novelret.data.source import read_qrels_blocks
from novelret.data.split import Split
from novelret.errors import UserError
from novelret.index import Index, base_lists, finetuned_query_embeddings, load_finetuned
from novelret.label.labels import open_labels
from novelret.label.table import RELEVANT
from novelret.progress import Reporter
from novelret.row_lists import RowLists

_QUERIES_AT_ONCE = 16_384

SOURCES = ("base-novel", "base-top", "feedback", "random", "model:PATH", "pairs:QRELS", "yes:LABELS")


@dataclass(frozen=True)
class Candidates:
    """Pairs without repeats, ordered by query.

    Attributes:
        query_rows: (C,) int64.
        item_rows: (C,) int64.
        source_numbers: (C,) int16, position in `sources` of the first source that gave the pair.
        sources: names, as given.
    """

    query_rows: np.ndarray
    item_rows: np.ndarray
    source_numbers: np.ndarray
    sources: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.query_rows)

    def counts(self) -> dict[str, int]:
        """Pairs by source; a pair counts for the first source that gave it."""
        counted = np.bincount(self.source_numbers, minlength=len(self.sources))
        return {name: int(n) for name, n in zip(self.sources, counted, strict=True)}


def gather_candidates(
    index: Index,
    split: Split,
    sources: tuple[str, ...],
    *,
    base_depth: int,
    depth: int,
    per_query: int | None,
    seed: int,
    device: str,
    report: Reporter,
) -> Candidates:
    """Pairs from the named sources, at most `per_query` of each source for a query.

    base-novel: the deployed ranks base_depth + 1 to depth. base-top: ranks 1 to base_depth. model:PATH:
    another model's top base_depth. feedback: the split's pairs. random: per_query items of the catalog.
    pairs:QRELS: the pairs a file names, whatever their scores; for holding a judge against people.
    yes:LABELS: the pairs that an earlier labelling calls relevant; for asking about these a second time.

    Raises:
        UserError: unknown source, depths that do not fit the catalog, or LABELS of another index.
    """
    if depth <= base_depth and "base-novel" in sources:
        raise UserError(f"--depth {depth}: must exceed --base-depth {base_depth}; novel items lie beyond it")
    rng = np.random.default_rng(seed)
    sources = tuple(dict.fromkeys(sources))
    parts = []
    for number, source in enumerate(sources):
        if source.endswith(":"):
            raise UserError(f"--from {source}: names no path; choose from {', '.join(SOURCES)}")
        blocks: Iterable[tuple[np.ndarray, np.ndarray]]
        if source == "feedback":
            blocks = [(split.feedback_queries, split.feedback_items)]
        elif source.startswith("pairs:"):
            blocks = [_named_pairs(Path(source.removeprefix("pairs:")), index, split, report)]
        elif source.startswith("yes:"):
            blocks = [_pairs_called_relevant(Path(source.removeprefix("yes:")), index, split, report)]
        else:
            blocks = _pairs(_lists(index, split, source, base_depth, depth, per_query, rng, device, report))
        # Of all lists at once, all pairs would be held before some of them are drawn.
        drawn = [_at_most(per_query, *block, rng) for block in blocks]
        queries, items = (np.concatenate(column) for column in zip(*drawn, strict=True))
        parts.append((queries, items, np.full(len(queries), number, dtype=np.int16)))
    if len(parts) == 1 and not sources[0].startswith(("pairs:", "yes:")):
        return Candidates(*parts[0], sources)  # in order, and without repeats
    queries, items, numbers = (np.concatenate(column) for column in zip(*parts, strict=True))
    _, first = np.unique(queries * np.int64(len(index)) + items, return_index=True)
    # By query, and within it in the order the sources gave: base ranks stay in order.
    kept = np.sort(first)
    kept = kept[np.argsort(queries[kept], kind="stable")]
    return Candidates(queries[kept], items[kept], numbers[kept], sources)


def _lists(
    index: Index,
    split: Split,
    source: str,
    base_depth: int,
    depth: int,
    per_query: int | None,
    rng: np.random.Generator,
    device: str,
    report: Reporter,
) -> np.ndarray:
    """A source's items as (Q, n) catalog rows, −1 padded."""
    if source == "base-novel":
        return base_lists(index, split, depth, device=device, report=report)[0][:, base_depth:]
    if source == "base-top":
        return base_lists(index, split, base_depth, device=device, report=report)[0]
    if source == "random":
        return _random_items(len(index), per_query or base_depth, split.excluded, rng)
    if source.startswith("model:"):
        model = load_finetuned(source.removeprefix("model:"), index, device)
        embeddings = finetuned_query_embeddings(model, index, split, device=device, report=report)
        return index.search(embeddings, base_depth, split.excluded, device=device, report=report)[0]
    raise UserError(f"--from {source}: unknown; choose from {', '.join(SOURCES)}")


def _random_items(size: int, count: int, excluded: RowLists, rng: np.random.Generator) -> np.ndarray:
    """(Q, count) catalog rows at random, none twice for a query or left out of its lists; −1 where none is.

    What is, is drawn anew: of a large catalog hardly anything. Much of a small one is drawn query by query.
    """
    n_queries = len(excluded)
    if count + excluded.longest > size // 4:
        lists = np.full((n_queries, count), -1, dtype=np.int64)
        for query in range(n_queries):
            left = np.setdiff1d(np.arange(size), excluded.padded(np.array([query])))
            drawn = rng.permutation(left)[:count]
            lists[query, : len(drawn)] = drawn
        return lists
    lists = rng.integers(size, size=(n_queries, count))
    left_out = excluded.pairs(size)
    while True:
        order = np.argsort(lists, axis=1, kind="stable")
        repeats = np.diff(np.take_along_axis(lists, order, axis=1), axis=1, prepend=-1) == 0
        unfit = np.isin(np.arange(n_queries)[:, None] * size + lists, left_out)
        np.put_along_axis(unfit, order, repeats | np.take_along_axis(unfit, order, axis=1), axis=1)
        if not unfit.any():
            return lists
        lists[unfit] = rng.integers(size, size=int(unfit.sum()))


def _named_pairs(path: Path, index: Index, split: Split, report: Reporter) -> tuple[np.ndarray, np.ndarray]:
    """(query rows, catalog rows) of a qrels file's pairs, as far as split and catalog hold them."""
    lines = 0

    def counted() -> Iterator[pa.RecordBatch]:
        nonlocal lines
        for block in read_qrels_blocks(path):
            lines += len(block)
            yield block

    parts = [(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))]
    for of_queries, of_items, _ in rows_of_pairs(counted(), split.query_ids, index.catalog):
        parts.append((of_queries[of_items >= 0], of_items[of_items >= 0]))
    queries, items = map(np.concatenate, zip(*parts, strict=True))
    if not len(queries):
        raise UserError(f"{path}: no pair is of the split's {len(split):,} queries and the catalog's items")
    if len(queries) < lines:
        report.warn(
            f"{path}: {lines - len(queries):,} pairs are not of this split's queries or name items that are "
            "not in the catalog; they are left out"
        )
    return queries, items


def _pairs_called_relevant(
    folder: Path, index: Index, split: Split, report: Reporter
) -> tuple[np.ndarray, np.ndarray]:
    """(query rows, catalog rows) of the pairs that a LABELS folder calls relevant, of the split's queries."""
    labels = open_labels(folder, index)
    table = labels.table(split, index.catalog)
    yes = table.verdicts == RELEVANT
    found, all_of_them = int(yes.sum()), int(labels.manifest.facts["verdicts"].get("relevant", 0))
    if found == 0:
        why = (
            f"it was labelled with --data {labels.manifest.config['data']} "
            f"--split {labels.manifest.config['split']}"
            if all_of_them
            else "there is no yes to ask about again"
        )
        raise UserError(
            f"--from yes:{folder}: calls no pair of the {len(split):,} queries of split {split.name} "
            f"relevant; {why}"
        )
    if found < all_of_them:
        report.warn(
            f"--from yes:{folder}: {all_of_them - found:,} pairs that it calls relevant are not of this "
            "split's queries; they are left out"
        )
    return table.query_rows[yes], table.item_rows[yes]


def _pairs(lists: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The pairs of (Q, n) lists, those of some thousand queries at a time."""
    for start in range(0, max(1, len(lists)), _QUERIES_AT_ONCE):
        block = lists[start : start + _QUERIES_AT_ONCE]
        queries, columns = np.nonzero(block >= 0)
        yield start + queries.astype(np.int64), block[queries, columns].astype(np.int64)


def _at_most(
    per_query: int | None, queries: np.ndarray, items: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """In their order, `per_query` pairs of each query at random, or all."""
    if per_query is None:
        return queries, items
    shuffled = rng.permutation(len(queries))
    by_query = shuffled[np.argsort(queries[shuffled], kind="stable")]
    ordered = queries[by_query]
    first_of_query = np.searchsorted(ordered, ordered, side="left")
    kept = np.sort(by_query[np.arange(len(ordered)) - first_of_query < per_query])
    return queries[kept], items[kept]
