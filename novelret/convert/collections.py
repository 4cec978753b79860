"""A collection, topics and qrels in separate files: the shape that MS MARCO and TREC share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from novelret.convert.writer import Hashes, Texts, Writer
from novelret.data.source import read_qrels_file
from novelret.errors import UserError
from novelret.progress import Reporter

Rows = Iterator[tuple[str, str, str, str]]
"""(where, id, title, text)"""


@dataclass(frozen=True)
class Part:
    """One split: its name, its queries and its judged pairs."""

    name: str
    queries: Path
    qrels: Path


def parse_parts(given: list[str]) -> list[Part]:
    """Splits from NAME=QUERIES,QRELS.

    Raises:
        UserError: another form.
    """
    parts: list[Part] = []
    for text in given:
        name, _, files = text.partition("=")
        queries, _, qrels = files.partition(",")
        if not (queries and qrels):
            raise UserError(f"--split {text}: expected NAME=QUERIES,QRELS")
        parts.append(Part(name, Path(queries), Path(qrels)))
    if not parts:
        raise UserError("--split: give at least one, as NAME=QUERIES,QRELS")
    return parts


def write_collection(
    items: Rows,
    parts: list[Part],
    read_queries: Callable[[Path], Rows],
    writer: Writer,
    report: Reporter,
    *,
    qrels_id: Callable[[str], str] = str,
) -> None:
    """Write all items, the queries that have pairs, and the pairs whose query and item exist.

    Args:
        items: the collection.
        parts: the splits.
        read_queries: reads a split's queries.
        writer: where to write.
        report: for bars.
        qrels_id: how qrels may write the id of a query that they do not hold as its file writes it.

    Raises:
        UserError: an item's id repeats, or a query's does with another text.
    """
    kept = writer.kept_items()
    if kept is None:
        kept = _write_items(items, writer, report), Hashes()
        writer.keep_items(*kept)
    documents, _ = kept
    written = Texts()
    for part in parts:
        _write_part(part, documents, written, read_queries, qrels_id, writer, report)


def _write_items(items: Rows, writer: Writer, report: Reporter) -> Hashes:
    """Write all items that have a text; give their ids."""
    seen, documents = Hashes(), Hashes()
    with report.bar("writing items") as advance:
        for where, item_id, title, text in items:
            if not seen.add(item_id):
                raise UserError(f"{where}: id {item_id!r} repeats; keep one")
            if title or text:
                documents.add(item_id)
                writer.item(where, item_id, title, text)
            else:
                writer.drop("items without a text")
            advance(1)
    return documents


def _write_part(
    part: Part,
    documents: Hashes,
    written: Texts,
    read_queries: Callable[[Path], Rows],
    qrels_id: Callable[[str], str],
    writer: Writer,
    report: Reporter,
) -> None:
    """Write a split's queries, unless another split had them, and its pairs."""
    wanted = Hashes()
    for _, query_id, item_id, _ in read_qrels_file(part.qrels):
        if item_id in documents:
            wanted.add(query_id)
    known = Hashes()
    with report.bar(f"writing queries of {part.name}") as advance:
        for where, own_id, _, text in read_queries(part.queries):
            query_id = own_id if own_id in wanted else qrels_id(own_id)
            if not text:
                writer.drop(f"{part.name}: queries without a text")
            elif query_id not in wanted:
                writer.drop(f"{part.name}: queries without pairs")
            else:
                known.add(query_id)
                if written.add(where, "query", query_id, text):
                    writer.query(where, query_id, text)
            advance(1)
    with report.bar(f"writing pairs of {part.name}") as advance:
        for _, query_id, item_id, score in read_qrels_file(part.qrels):
            if item_id not in documents:
                writer.drop(f"{part.name}: pairs whose item is not in the collection")
            elif query_id not in known:
                writer.drop(f"{part.name}: pairs whose query is not in the queries file")
            else:
                writer.pair(part.name, query_id, item_id, score)
            advance(1)
