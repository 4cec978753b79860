"""`novelret index --append`: new catalog items into an INDEX, without encoding the old ones again.

The appended INDEX holds the old items in their old rows, bit for bit, and the new ones behind them, encoded
with the same deployed encoder. It names the index it came from, so that models trained and labels made before
are recognised as its own.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from novelret import encode
from novelret.artifacts import (
    Manifest,
    check_output,
    drop_partial,
    fingerprint_of,
    fsync_file,
    open_output,
    put_aside,
    write_config,
    write_json,
    write_manifest,
)
from novelret.build import add_to_faiss, encode_catalog, make_matrix, measure_recall
from novelret.data.catalog import SCHEMA, Catalog, id_ranks, open_catalog, take_rows, write_catalog
from novelret.data.source import fingerprint_part
from novelret.errors import UserError
from novelret.index import Index, open_index
from novelret.progress import Reporter

_CHUNK = 1 << 20  # items whose ids are looked up at once
_COPIED = 65_536


@dataclass(frozen=True)
class AppendConfig:
    """Settings of `novelret index --append`.

    Attributes:
        data: BEIR folder or Hugging Face data set with the whole catalog as it is now, old items and new.
        append: the INDEX that the new items are appended to.
        batch_size: texts per forward pass.
        device: "auto", "cpu" or a CUDA device.
    """

    data: str
    append: str
    batch_size: int = 64
    device: str = "auto"


def append_items(
    config: AppendConfig, out: Path, *, force: bool = False, report: Reporter | None = None
) -> Index:
    """Write the INDEX of a grown catalog; with `force`, `out` may be the old INDEX itself.

    May be killed at any moment; the same call goes on from the last finished chunk, and an INDEX that is
    replaced stays as it was until the new one is whole.

    Raises:
        UserError: bad data, an item of the INDEX that is gone or has another text, or an existing output.
    """
    report = report or Reporter()
    if config.batch_size < 1:
        raise UserError(f"--batch-size {config.batch_size}: must be at least 1")
    check_output(out, force=force, kind="index")
    folder = Path(config.append)
    if folder.resolve() == out.resolve() and not folder.exists() and put_aside(folder).is_dir():
        folder = put_aside(folder)  # a kill came while the appended INDEX took its place
    old = open_index(folder)
    if "imported" in old.manifest.facts:
        raise UserError(
            f"--append {config.append}: its embeddings were imported, so novelret does not know the item "
            "encoder; index the grown catalog from its own --embeddings or --faiss"
        )
    inputs = {**old.manifest.inputs, "corpus": fingerprint_part(config.data, "corpus")}
    inputs["appended_to"] = old.manifest.fingerprint
    identity = fingerprint_of(inputs)
    with open_output(out, identity, force=force, settings=inputs) as folder:
        if not (folder / "items.arrow").is_file():
            try:
                _write_items(config, old, folder, report)
            except UserError:
                drop_partial(folder)  # it must not stand in the way of the mended data
                raise
        (folder / "whole.arrow").unlink(missing_ok=True)
        catalog = open_catalog(folder / "items.arrow")
        np.save(folder / "id_rank.npy", id_ranks(catalog))
        _copy_embeddings(old, len(catalog), folder, report)
        # Where the deployed sides are two models, items have their own.
        own_side = old.folder / "item_encoder"
        device = encode.pick_device(config.device)
        model = encode.load_encoder(own_side if own_side.is_dir() else old.folder / "query_encoder", device)
        dtype = old.embeddings.dtype.name
        encode_catalog(model, catalog, folder, dtype, config.batch_size, report, len(old))
        for side in ("query_encoder", "item_encoder"):
            if (old.folder / side).is_dir():
                shutil.copytree(old.folder / side, folder / side, dirs_exist_ok=True)
        facts = {name: fact for name, fact in old.manifest.facts.items() if name != "recall"}
        if old.faiss_index is not None:
            index = faiss.read_index(str(old.folder / "items.faiss"))
            added = np.load(folder / "embeddings.npy", mmap_mode="r")[len(old) :]
            add_to_faiss(index, added, folder / "items.faiss", report)
            queries = old.query_encoder(device) if own_side.is_dir() else model
            what = str(old.manifest.config.get("factory", "faiss"))
            params = old.manifest.config.get("search_params")
            facts |= measure_recall(what, config.data, queries, catalog, folder, report, params)
        ancestors = [old.manifest.fingerprint, *old.manifest.facts.get("ancestors", ())]
        facts |= {"items": len(catalog), "ancestors": ancestors}
        write_config(folder, config)
        # The encoder's settings stay those of the first index: they still hold.
        settings = {**old.manifest.config, **asdict(config)}
        write_manifest(folder, Manifest("index", settings, inputs, identity, facts))
    (out / "progress.json").unlink(missing_ok=True)  # until here a kill leaves something to resume
    report.note(f"{len(catalog) - len(old):,} new items behind {len(old):,} old ones")
    return open_index(out)


def _write_items(config: AppendConfig, old: Index, folder: Path, report: Reporter) -> None:
    """items.arrow: the old items in their order, then those that the data has beyond them."""
    whole = folder / "whole.arrow"
    write_catalog(config.data, whole, report)
    now = open_catalog(whole)
    new = _new_rows(config, old, now)
    temporary = folder / "items.tmp"
    with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        for start in range(0, len(old), _COPIED):
            ids, texts = (column.slice(start, _COPIED) for column in (old.catalog.ids, old.catalog.texts))
            writer.write_table(pa.table([ids, texts], schema=SCHEMA))
        for start in range(0, len(new), _COPIED):
            rows = new[start : start + _COPIED]
            columns = [take_rows(now.ids, rows), take_rows(now.texts, rows)]
            writer.write_table(pa.table(columns, schema=SCHEMA))
    temporary.replace(folder / "items.arrow")


def _new_rows(config: AppendConfig, old: Index, now: Catalog) -> np.ndarray:
    """Rows of the data's corpus that the index does not hold.

    Raises:
        UserError: an item of the index is gone from the corpus, or its text is another one.
    """
    known = np.zeros(len(now), dtype=bool)
    for start in range(0, len(old), _CHUNK):
        ids = old.catalog.ids.slice(start, _CHUNK)
        rows = now.rows_of(ids.to_pylist())
        gone = np.flatnonzero(rows < 0)
        if len(gone):
            raise UserError(
                f"{config.data}: item {ids[int(gone[0])].as_py()!r} of {config.append} is not in its corpus "
                f"({len(gone)} such items); --append takes the whole corpus, old items and new, and drops "
                "none: add them, or index anew without --append"
            )
        same = pc.equal(take_rows(now.texts, rows), old.catalog.texts.slice(start, _CHUNK))
        other = np.flatnonzero(~same.to_numpy())
        if len(other):
            raise UserError(
                f"{config.data}: item {ids[int(other[0])].as_py()!r} has another text than in "
                f"{config.append} ({len(other)} such items); --append keeps old embeddings: give it "
                "a new id, or index anew without --append"
            )
        known[rows] = True
    return np.flatnonzero(~known)


def _copy_embeddings(old: Index, items: int, folder: Path, report: Reporter) -> None:
    """embeddings.npy with the old rows, and progress.json that says so."""
    path, progress = folder / "embeddings.npy", folder / "progress.json"
    if progress.is_file():
        return
    matrix = make_matrix(path, (items, old.dimension), old.embeddings.dtype.name)
    with report.bar("copying embeddings", len(old)) as advance:
        for start in range(0, len(old), _COPIED):
            block = old.embeddings[start : start + _COPIED]
            matrix[start : start + len(block)] = block
            advance(len(block))
    matrix.flush()
    fsync_file(path)
    write_json(progress, {"rows": len(old)})
