"""The LABELS artifact: one row per judgement, and the table that training and evaluation look it up in."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from novelret.artifacts import Manifest, hash_texts, read_manifest
from novelret.data.catalog import Catalog, rows_of_pairs, take_rows
from novelret.data.split import Split
from novelret.errors import UserError
from novelret.index import Index
from novelret.label.table import IRRELEVANT, RELEVANT, UNKNOWN, LabelTable, join_tables, sort_table

if TYPE_CHECKING:
    from novelret.label.candidates import Candidates

SCHEMA = pa.schema(
    [
        ("query_id", pa.string()),
        ("item_id", pa.string()),
        ("source", pa.dictionary(pa.int8(), pa.string())),
        ("verdict", pa.int8()),  # 1 relevant, 0 not, -1 no usable answer
        ("grade", pa.float32()),
        ("answer", pa.string()),
        ("prompt_tokens", pa.int32()),
        ("completion_tokens", pa.int32()),
        ("cost", pa.float64()),  # dollars
        ("time", pa.string()),
    ]
)
"""Columns of judgements.parquet. The judge and the prompt are one per artifact: see its manifest."""

READ = ["query_id", "item_id", "verdict", "grade"]
"""The columns that a table is made from."""

VERDICTS = {RELEVANT: "relevant", IRRELEVANT: "not relevant", UNKNOWN: "unusable"}
"""Verdicts as people read them."""


@dataclass(frozen=True)
class Labels:
    """An opened LABELS folder."""

    folder: Path
    manifest: Manifest

    @property
    def judge(self) -> str:
        """Who gave the answers, as given to --judge."""
        return str(self.manifest.config["judge"])

    def table(self, split: Split, catalog: Catalog) -> LabelTable:
        """The usable verdicts of a split's queries (see `read_table`).

        Raises:
            UserError: one of these queries had another text when it was judged, or see `read_table`.
        """
        path = self.folder / "queries.parquet"
        if path.is_file():  # LABELS of before have none
            before = pq.read_table(path)
            place = pc.index_in(pa.array(split.query_ids, pa.string()), value_set=before["query_id"])
            known = np.flatnonzero(place.is_valid())
            then = before["text"].take(place.drop_null()).to_numpy()
            now = hash_texts([split.query_texts[row] for row in known])
            changed = [split.query_ids[row] for row in known[then != now]]
            if changed:
                raise UserError(
                    f"{self.folder}: {len(changed):,} of its queries had another text when they were judged, "
                    f"{changed[0]!r} for one; label again (what is asked in the same words costs nothing)"
                )
        return read_table(self.folder / "judgements.parquet", split.query_ids, catalog)


def write_queries(folder: Path, split: Split) -> None:
    """Keep which text each query had when it was judged, as a hash."""
    columns = {"query_id": split.query_ids, "text": hash_texts(split.query_texts)}
    pq.write_table(pa.table(columns), folder / "queries.parquet")


def read_table(path: Path, query_ids: list[str], catalog: Catalog) -> LabelTable:
    """Usable verdicts of judgements.parquet by (row in `query_ids`, catalog row).

    Reads a row group at a time: 10 million judgements need their 13 bytes each and one group's strings.

    Raises:
        UserError: it names items that the catalog does not hold.
    """
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not readable as parquet ({str(error).splitlines()[0]})") from None
    return table_of(file.iter_batches(batch_size=1 << 20, columns=READ), query_ids, catalog, path)


def table_of(
    judgements: Iterable[pa.RecordBatch], query_ids: list[str], catalog: Catalog, where: Path
) -> LabelTable:
    """As `read_table`, of batches with the columns `READ`; several share a pass over the catalog's ids."""
    keys = [np.empty(0, dtype=np.int64)]
    verdicts = [np.empty(0, dtype=np.int8)]
    grades = [np.empty(0, dtype=np.float32)]
    for query_rows, item_rows, lines in rows_of_pairs(judgements, query_ids, catalog):
        if (item_rows < 0).any():
            raise UserError(f"{where}: names items that the catalog does not hold; label again")
        keys.append(query_rows * len(catalog) + item_rows)
        verdicts.append(lines["verdict"].to_numpy())
        grades.append(lines["grade"].to_numpy())
    return sort_table(_joined(keys), _joined(verdicts), len(catalog), grades=_joined(grades))


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    """The parts in one piece; the list is emptied, so that they are not held twice for long."""
    whole = np.concatenate(parts)
    parts.clear()
    return whole


def open_labels(folder: Path, *indexes: Index) -> Labels:
    """Open a LABELS folder that was made with one of these indexes, or before items were appended to it.

    Raises:
        UserError: no labels there, or they belong to another index.
    """
    manifest = read_manifest(folder, "labels")
    if not any(index.descends_from(manifest.inputs["index"]) for index in indexes):
        raise UserError(
            f"{folder}: was labelled with another index ({manifest.config['index']}) than "
            f"{indexes[0].folder}; pass the index it belongs to, or label again"
        )
    return Labels(folder, manifest)


def join_labels(several: list[Labels], split: Split, catalog: Catalog) -> LabelTable:
    """The usable verdicts of several LABELS together; the last one's count where more hold a pair.

    Raises:
        UserError: one of them asked again about the yeses of one that comes later, which would undo it.
    """
    for place, labels in enumerate(several):
        for later in several[place + 1 :]:
            if later.manifest.fingerprint in confirmed_by(labels.manifest).values():
                raise UserError(
                    f"--labels {labels.folder} asked again about the yeses of {later.folder}, but comes "
                    f"before it, so that the first answers would count; give --labels {labels.folder} last"
                )
    table = several[0].table(split, catalog)
    for labels in several[1:]:
        table = join_tables(table, labels.table(split, catalog))
    return table


def confirmed_by(manifest: Manifest) -> dict[str, str]:
    """The LABELS whose yeses were asked about again, as given to --from → their fingerprints."""
    return {name: value for name, value in manifest.inputs.items() if name.startswith("yes:")}


def judgement_rows(
    index: Index, split: Split, candidates: Candidates, rows: np.ndarray, columns: dict[str, Any]
) -> pa.Table:
    """Some candidates as rows of judgements.parquet.

    Args:
        index: for the items' ids.
        split: for the queries' ids.
        candidates: the pairs.
        rows: (n,) which of them.
        columns: what the judge gave, n values each; columns that are left out are empty.
    """
    sources = pa.DictionaryArray.from_arrays(
        pa.array(candidates.source_numbers[rows].astype(np.int8)), pa.array(candidates.sources, pa.string())
    )
    filled = {
        "query_id": [split.query_ids[row] for row in candidates.query_rows[rows]],
        "item_id": take_rows(index.catalog.ids, candidates.item_rows[rows]).cast(pa.string()),
        "source": sources,
    } | columns
    empty = [None] * len(rows)
    arrays = [
        value if isinstance(value, pa.Array) else pa.array(value, field.type)
        for field in SCHEMA
        for value in [filled.get(field.name, empty)]
    ]
    return pa.Table.from_arrays(arrays, schema=SCHEMA)
