"""Any Hugging Face data set of pairs with named columns, streamed: a hub id or a local folder of files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from novelret.convert.pairs import PairWriter, item_id_of, query_id_of
from novelret.convert.writer import Converted, Writer, check_splits, converted, open_writer
from novelret.data.catalog import plain_text
from novelret.data.hub import quiet_datasets
from novelret.errors import UserError, first_line
from novelret.progress import Reporter


@dataclass(frozen=True)
class Columns:
    """Which column holds what; ids and scores are optional, texts without an id are known by their hash.

    Attributes:
        query: the query's text.
        item: the item's text, or a list of texts.
        title: the item's title.
        query_id: the query's id.
        item_id: the item's id.
        score: the pair's score; 1 without it.
    """

    query: str = "query"
    item: str = "document"
    title: str | None = None
    query_id: str | None = None
    item_id: str | None = None
    score: str | None = None

    def named(self) -> list[str]:
        """The columns that must exist."""
        return [name for name in vars(self).values() if name is not None]


def convert_hf(
    dataset: str,
    out: Path,
    columns: Columns,
    *,
    config: str | None = None,
    splits: list[str] | None = None,
    force: bool = False,
    report: Reporter | None = None,
) -> Converted:
    """Write every row of the chosen splits as a pair.

    Args:
        dataset: hub id, or a local folder that `datasets` reads.
        out: the BEIR folder to make.
        columns: which column holds what.
        config: configuration of the data set.
        splits: its splits, or OURS=THEIRS to rename one; all by default.
        force: replace an existing output.
        report: for bars.

    Raises:
        UserError: a split's name is unusable, the data set cannot be loaded, has other splits or columns, one
            id comes with two texts, or an existing output.
    """
    report = report or Reporter()
    check_splits([text.partition("=")[0] for text in splits or []])
    streams = _load(dataset, config)
    chosen = _choose(dataset, splits, list(streams))
    for theirs in chosen.values():
        _check_columns(dataset, theirs, streams[theirs], columns)
    settings = {"dataset": dataset, "config": config, "splits": chosen, "columns": vars(columns)}
    with open_writer(out, "hf", settings, [], tuple(chosen), force=force) as writer:
        texts = PairWriter(writer)
        for ours, theirs in chosen.items():
            with report.bar(f"writing {ours}") as advance:
                for where, row in _rows(dataset, theirs, streams[theirs]):
                    _write_row(where, row, ours, columns, texts, writer)
                    advance(1)
    return converted(out, writer)


def _write_row(
    where: str, row: dict[str, Any], split: str, columns: Columns, texts: PairWriter, writer: Writer
) -> None:
    def text_in(column: str | None) -> str:
        return plain_text(where, column, row[column]).strip() if column else ""

    query, title = text_in(columns.query), text_in(columns.title)
    query_id, item_id = text_in(columns.query_id), text_in(columns.item_id)
    given = row[columns.item]
    given = given if isinstance(given, list) else [given]
    items = [plain_text(where, columns.item, text).strip() for text in given]
    if not query:
        writer.drop(f"{split}: rows with an empty query")
        return
    if len(items) != 1 and columns.item_id:
        raise UserError(f"{where}: {columns.item!r} is a list, so {columns.item_id!r} cannot name each item")
    if columns.query_id and not query_id:
        writer.drop(f"{split}: rows without a query id")
        return
    if columns.item_id and not item_id:
        writer.drop(f"{split}: rows without an item id")
        return
    query_id = query_id or query_id_of(query)
    score = _score(where, row[columns.score]) if columns.score else 1.0
    for text in items:
        if not text and not title:
            writer.drop(f"{split}: rows with an empty item")
            continue
        of_text = item_id or item_id_of(f"{title}\t{text}")
        texts.query(where, query_id, query)
        texts.item(where, of_text, title, text)
        writer.pair(split, query_id, of_text, score)


def _score(where: str, value: Any) -> float:
    try:
        score = float(value)
    except (TypeError, ValueError):
        raise UserError(f"{where}: the score {value!r} is not a number") from None
    if not math.isfinite(score):
        raise UserError(f"{where}: the score {value!r} is not finite; correct the row or leave it out")
    return score


def _load(dataset: str, config: str | None) -> Any:
    try:
        return quiet_datasets().load_dataset(dataset, config, streaming=True)
    except Exception as error:  # whatever the library raises, the user needs one line
        raise UserError(
            f"{dataset}: cannot be loaded as a Hugging Face data set ({first_line(error)})"
        ) from None


def _rows(dataset: str, split: str, stream: Iterable[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of a split, whose files are read while it is gone through."""
    rows = iter(stream)
    for number in count(1):
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:
            raise UserError(
                f"{dataset} ({split}): cannot be read behind row {number - 1} ({first_line(error)})"
            ) from None
        yield f"{dataset} ({split}): row {number}", row


def _choose(dataset: str, splits: list[str] | None, present: list[str]) -> dict[str, str]:
    """Our name of each split → the data set's."""
    chosen = {}
    for text in splits or present:
        ours, _, theirs = text.partition("=")
        chosen[ours] = theirs or ours
        if chosen[ours] not in present:
            raise UserError(f"{dataset}: has no split {chosen[ours]!r} (it has: {', '.join(present)})")
    return chosen


def _check_columns(dataset: str, split: str, stream: Iterable[dict[str, Any]], columns: Columns) -> None:
    _, first = next(_rows(dataset, split, stream), ("", None))
    missing = [] if first is None else [name for name in columns.named() if name not in first]
    if missing and first is not None:
        raise UserError(
            f"{dataset} ({split}): has no column {missing[0]!r} (it has: {', '.join(map(str, first))})"
        )
