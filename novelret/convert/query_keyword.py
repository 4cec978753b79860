"""Query-keyword logs: query, keyword and count, tab-separated; a first line without a count is a header."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

from novelret.convert.draw import SPLITS, Draw, check_sizes
from novelret.convert.pairs import item_id_of, query_id_of
from novelret.convert.writer import Converted, Hashes, columns_of, converted, open_writer
from novelret.data.source import is_header, read_lines
from novelret.errors import UserError
from novelret.progress import Reporter

_COLUMNS = ("query", "keyword", "count")
_TELL = 10_000


def convert_query_keyword(
    pairs: Path,
    out: Path,
    *,
    keywords: Path | None = None,
    min_count: float = 1,
    train: int = 1_230_000,
    test: int = 6_200,
    seed: int = 0,
    force: bool = False,
    report: Reporter | None = None,
) -> Converted:
    """Write distinct queries and keywords, and the pairs with their counts as scores.

    Args:
        pairs: the log, gzipped or not.
        out: the BEIR folder to make.
        keywords: further keywords, one per line: the pool that is searched is larger than what was clicked.
        min_count: pairs seen less often are dropped.
        train: pairs of the train split.
        test: pairs of the test split; all others are base.
        seed: decides the splits.
        force: replace an existing output.
        report: for bars and warnings.

    Raises:
        UserError: a size below 0, a least count that is no number, a missing, broken or malformed file, or an
            existing output.
    """
    report = report or Reporter()
    check_sizes(train, test)
    _check_count(min_count)
    settings = {"min_count": min_count, "train": train, "test": test, "seed": seed}
    files = [pairs, *([keywords] if keywords else [])]
    with open_writer(out, "query-keyword", settings, files, SPLITS, force=force) as writer:
        draw = Draw(train, test, seed)
        with report.bar("reading pairs") as advance:
            for _, query, keyword, count in _rows(pairs, advance):
                if not query or not keyword:
                    writer.drop("pairs with an empty query or keyword")
                elif count < min_count:
                    writer.drop(f"pairs seen less than {min_count:g} times")
                else:
                    draw.offer(query, keyword)
        if draw.total == 0:
            raise UserError(f"{pairs}: no pair is left ({dict(writer.dropped) or 'the file is empty'})")
        draw.close(report)
        queries, items = Hashes(), Hashes()  # an id is its text's hash here: none has two texts
        with report.bar("writing pairs") as advance:
            for where, query, keyword, count in _rows(pairs, advance):
                if query and keyword and count >= min_count:
                    query_id, item_id = query_id_of(query), item_id_of(keyword)
                    if queries.add(query_id):
                        writer.query(where, query_id, query)
                    if items.add(item_id):
                        writer.item(where, item_id, "", keyword)
                    writer.pair(draw.split_of(query, keyword), query_id, item_id, count)
        if keywords:
            for number, line in read_lines(keywords):
                keyword = line.strip()
                if items.add(item_id_of(keyword)):
                    writer.item(f"{keywords}:{number}", item_id_of(keyword), "", keyword)
    return converted(out, writer)


def _check_count(least: float) -> None:
    if math.isnan(least):
        raise UserError(f"--min-count {least}: must be a number")


def _rows(path: Path, advance: Callable[[int], None]) -> Iterator[tuple[str, str, str, float]]:
    for number, line in read_lines(path):
        if number % _TELL == 0:
            advance(_TELL)
        where = f"{path}:{number}"
        query, keyword, count = columns_of(where, line, _COLUMNS)
        if number == 1 and is_header(count):
            continue
        try:
            value = float(count)
        except ValueError:
            raise UserError(f"{where}: the count {count!r} is not a number") from None
        if not math.isfinite(value):
            raise UserError(f"{where}: the count {count!r} is not finite; correct the line or leave it out")
        yield where, query, keyword, value
