"""`file:PATH`: judgements that exist already, as qrels."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from novelret.data.catalog import Catalog, rows_of_pairs
from novelret.data.source import read_qrels_blocks
from novelret.errors import UserError
from novelret.label.scores import are_relevant, warn_of_contradictions
from novelret.label.table import IRRELEVANT, RELEVANT, UNKNOWN, LabelTable, make_table
from novelret.progress import Reporter

MISSING = {"unknown": UNKNOWN, "irrelevant": IRRELEVANT}


def check_missing(missing: str) -> None:
    """Refuse what `missing` cannot be.

    Raises:
        UserError: one line that names what it can be.
    """
    if missing not in MISSING:
        raise UserError(f"--missing {missing}: unknown; choose from {', '.join(MISSING)}")


def file_table(
    path: Path,
    query_ids: list[str],
    catalog: Catalog,
    missing: str = "unknown",
    report: Reporter | None = None,
    *,
    threshold: float | None = None,
) -> LabelTable:
    """The verdicts of a qrels file for some queries; scores are the grades.

    Args:
        path: qrels, tab-separated or TREC. Lines of other queries are passed over, since one file may
            serve several splits.
        query_ids: the queries, in row order.
        catalog: the indexed items.
        missing: "unknown", or "irrelevant" where the file lists everything relevant.
        report: told how many lines name items that are not in the catalog, or contradict each other.
        threshold: lowest score that is relevant; by default anything above 0.

    Raises:
        UserError: the file cannot be read, a line is malformed, or no line is about these queries.
    """
    check_missing(missing)
    parts = [(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64), np.empty(0))]
    for query_rows, item_rows, lines in rows_of_pairs(read_qrels_blocks(path), query_ids, catalog):
        parts.append((query_rows, item_rows, lines["score"].to_numpy()))
    queries, rows, scores = map(np.concatenate, zip(*parts, strict=True))
    if not len(queries):
        raise UserError(
            f"{path}: no line is about the split's {len(query_ids)} queries; is it the right file?"
        )
    if report is not None and missing == "irrelevant":
        without = int((np.bincount(queries, minlength=len(query_ids)) == 0).sum())
        if without:
            report.warn(
                f"{path}: has no line for {without:,} of {len(query_ids):,} queries; by --missing irrelevant "
                "nothing is relevant to these"
            )
    known = rows >= 0
    unknown = int((~known).sum())
    if report is not None and unknown:
        lines = "1 line names an item that is" if unknown == 1 else f"{unknown} lines name items that are"
        report.warn(f"{path}: {lines} not in the catalog")
    queries, rows, scores = queries[known], rows[known], scores[known]
    relevant = are_relevant(scores, threshold)
    if report is not None:
        warn_of_contradictions(path, queries * len(catalog) + rows, relevant, report)
    return make_table(
        queries,
        rows,
        np.where(relevant, RELEVANT, IRRELEVANT),
        len(catalog),
        MISSING[missing],
        scores.astype(np.float32),
    )
