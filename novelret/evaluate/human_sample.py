"""The sample that people label: drawn from the lists that are compared, written as a table, and read back.

query-id, corpus-id, score, query, item, tab-separated: BEIR's qrels with the texts behind them. People fill
in the score, 1 for relevant and 0 for not; what they leave empty was not looked at.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from novelret.data.catalog import Catalog
from novelret.data.source import quoted, read_qrels_file
from novelret.data.split import Split
from novelret.errors import UserError
from novelret.label.scores import are_relevant, warn_of_contradictions
from novelret.label.table import IRRELEVANT, RELEVANT, LabelTable, make_table
from novelret.membership import pairs_in, sorted_union
from novelret.progress import Reporter

_HEADER = "query-id\tcorpus-id\tscore\tquery\titem\n"


def write_sample(path: Path, lists: list[np.ndarray], size: int, split: Split, catalog: Catalog) -> None:
    """Draw (query, item) pairs from all lists, each as likely as any other, and write them in random order.

    Args:
        path: the file to write; it does not say which list a pair comes from, lest people favour one.
        lists: (Q, K) catalog rows of each model, −1 padded.
        size: how many pairs; all where there are fewer.
        split: the queries.
        catalog: the items.
    """
    pairs = np.empty(0, dtype=np.int64)
    for rows in lists:
        pairs = sorted_union(pairs, pairs_in(rows, len(catalog)))
    drawn = np.random.default_rng(0).permutation(pairs)[:size]
    queries, items = drawn // len(catalog), drawn % len(catalog)
    with path.open("w", encoding="utf-8") as file:
        file.write(_HEADER)
        for query, item_id, text in zip(
            queries.tolist(), catalog.ids_at(items), catalog.texts_at(items), strict=True
        ):
            shown = "\t".join(" ".join(words.split()) for words in (split.query_texts[query], text))
            file.write(f"{quoted(split.query_ids[query])}\t{quoted(item_id)}\t\t{shown}\n")


def read_sample(
    path: Path, query_ids: list[str], catalog: Catalog, threshold: float | None, report: Reporter
) -> LabelTable:
    """People's verdicts, from this table or from any qrels; the last line about a pair counts.

    Args:
        path: the file. Lines of other queries are passed over, since one file may serve several splits.
        query_ids: the queries, in row order.
        catalog: the indexed items.
        threshold: lowest score that is relevant; by default anything above 0.
        report: told how many lines contradict each other, and of scores that look like grades.

    Raises:
        UserError: a malformed line, an unknown item, or no labelled line about these queries.
    """
    row_of = {query_id: row for row, query_id in enumerate(query_ids)}
    labelled = [line for line in read_qrels_file(path) if line[1] in row_of]
    if not labelled:
        raise UserError(
            f"{path}: no labelled line is about the split's {len(query_ids)} queries; fill in the scores"
        )
    wheres, queries, items, scores = zip(*labelled, strict=True)
    rows = catalog.rows_of(items)
    unknown = np.flatnonzero(rows < 0)
    if len(unknown):
        first = int(unknown[0])
        raise UserError(f"{wheres[first]}: item id {items[first]!r} is not in the catalog")
    values = np.array(scores)
    if threshold is None and values.max() > 1:
        report.warn(
            f"{path}: holds scores up to {values.max():g}, and every one above 0 counts as relevant; say by "
            "--human-threshold which is the lowest that does"
        )
    relevant = are_relevant(values, threshold)
    query_rows = np.array([row_of[query_id] for query_id in queries], dtype=np.int64)
    warn_of_contradictions(path, query_rows * len(catalog) + rows, relevant, report)
    return make_table(query_rows, rows, np.where(relevant, RELEVANT, IRRELEVANT), len(catalog))
