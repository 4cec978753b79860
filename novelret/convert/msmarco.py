"""MS MARCO passages: `collection.tsv` (passage id, passage), `queries.SPLIT.tsv` (query id, query) and
`qrels.SPLIT.tsv` (query id, 0, passage id, 1), none with a header.
"""  # noqa: D205

from __future__ import annotations

from pathlib import Path

from novelret.convert.collections import Part, Rows, write_collection
from novelret.convert.writer import Converted, columns_of, converted, open_writer
from novelret.data.source import read_lines
from novelret.progress import Reporter


def convert_msmarco(
    collection: Path, parts: list[Part], out: Path, *, force: bool = False, report: Reporter | None = None
) -> Converted:
    """Write passages, queries and qrels.

    Raises:
        UserError: a split's name is unusable, a missing, broken or malformed file, a passage id that repeats,
            a query id with two texts, or an existing output.
    """
    files = [collection, *(file for part in parts for file in (part.queries, part.qrels))]
    names = tuple(part.name for part in parts)
    with open_writer(out, "msmarco", {"splits": names}, files, names, force=force) as writer:
        rows = read_two_columns(collection)
        write_collection(rows, parts, read_two_columns, writer, report or Reporter())
    return converted(out, writer)


def read_two_columns(path: Path) -> Rows:
    """Rows of a file with an id and a text, tab-separated."""
    for number, line in read_lines(path):
        where = f"{path}:{number}"
        identity, text = columns_of(where, line, ("id", "text"), rest=True)
        yield where, identity, "", text
