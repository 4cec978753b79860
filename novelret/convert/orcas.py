"""ORCAS (Craswell et al., 2020): clicked documents, whose titles come from MS MARCO's documents.

`orcas.tsv`: query id, query, document id, url. `msmarco-docs.tsv`: document id, url, title, body. Neither has
a header. Splits as in PG-Ret, §5.1: most pairs trained the deployed model, a million are new, 8,500 are
held out; pairs are drawn at random, so a query may have pairs in several splits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from novelret.convert.draw import SPLITS, Draw, check_sizes
from novelret.convert.writer import Converted, Hashes, Writer, columns_of, converted, open_writer
from novelret.data.source import read_lines
from novelret.errors import UserError
from novelret.progress import Reporter

TRAIN, TEST = 1_000_000, 8_500
_ORCAS = ("query id", "query", "document id", "url")
_DOCUMENTS = ("document id", "url", "title", "body")
_TELL = 10_000


def convert_orcas(
    orcas: Path,
    documents: Path,
    out: Path,
    *,
    train: int = TRAIN,
    test: int = TEST,
    seed: int = 0,
    force: bool = False,
    report: Reporter | None = None,
) -> Converted:
    """Join clicks with titles and write base, train and test.

    Reads the clicks three times, the documents once; keeps 8 bytes per query, document and drawn pair. When
    it was killed after the documents, it goes on from there.

    Args:
        orcas: `orcas.tsv`, gzipped or not.
        documents: `msmarco-docs.tsv`, gzipped or not.
        out: the BEIR folder to make.
        train: pairs of the train split.
        test: pairs of the test split; all others are base.
        seed: decides the splits.
        force: replace an existing output.
        report: for bars and warnings.

    Raises:
        UserError: a size below 0, a missing, broken or malformed file, a document id that repeats, or an
            existing output.
    """
    report = report or Reporter()
    check_sizes(train, test)
    settings = {"train": train, "test": test, "seed": seed}
    with open_writer(out, "orcas", settings, [orcas, documents], SPLITS, force=force) as writer:
        kept = writer.kept_items()
        if kept is None:
            kept = _write_titles(documents, _linked(orcas, report), writer, report)
            writer.keep_items(*kept)
        titled, untitled = kept
        draw = Draw(train, test, seed)
        with report.bar("drawing splits") as advance:
            for _, (query_id, query, document, _) in _rows(orcas, _ORCAS, advance):
                if not query:
                    writer.drop("pairs with an empty query")
                elif document in untitled:
                    writer.drop("pairs whose document has an empty title")
                elif document not in titled:
                    writer.drop("pairs whose document is not in the documents file")
                else:
                    draw.offer(query_id, document)
        if draw.total == 0:
            raise UserError(
                f"{orcas}: no pair has a query and a title in {documents} ({dict(writer.dropped)})"
            )
        draw.close(report)
        seen = Hashes()
        with report.bar("writing pairs") as advance:
            for where, (query_id, query, document, _) in _rows(orcas, _ORCAS, advance):
                if not query or document not in titled:
                    continue
                if seen.add(query_id):
                    writer.query(where, query_id, query)
                writer.pair(draw.split_of(query_id, document), query_id, document)
    return converted(out, writer)


def _linked(orcas: Path, report: Reporter) -> Hashes:
    """Ids of the clicked documents."""
    linked = Hashes()
    with report.bar("reading clicks") as advance:
        for _, (_, _, document, _) in _rows(orcas, _ORCAS, advance):
            linked.add(document)
    return linked


def _write_titles(documents: Path, linked: Hashes, writer: Writer, report: Reporter) -> tuple[Hashes, Hashes]:
    """Write the clicked documents that have a title; give those, and those without one."""
    titled, untitled = Hashes(), Hashes()
    with report.bar("reading titles") as advance:
        for where, (document, _, title, _) in _rows(documents, _DOCUMENTS, advance, rest=True):
            if document not in linked:
                continue
            if document in titled or document in untitled:
                raise UserError(f"{where}: document id {document!r} repeats; keep one")
            if title:
                titled.add(document)
                writer.item(where, document, title, "")
            else:
                untitled.add(document)
                writer.drop("clicked documents with an empty title")
    return titled, untitled


def _rows(
    path: Path, names: tuple[str, ...], advance: Callable[[int], None], *, rest: bool = False
) -> Iterator[tuple[str, list[str]]]:
    for number, line in read_lines(path):
        if number % _TELL == 0:
            advance(_TELL)
        where = f"{path}:{number}"
        yield where, columns_of(where, line, names, rest=rest)
