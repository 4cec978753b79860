"""`novelret index`: make an INDEX by encoding the catalog, or from embeddings that exist already."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import faiss
import numpy as np

from novelret import encode
from novelret.artifacts import (
    Manifest,
    check_output,
    drop_partial,
    fingerprint_file,
    fingerprint_of,
    fsync_file,
    open_output,
    read_json,
    write_config,
    write_json,
    write_manifest,
)
from novelret.blocks import read_rows
from novelret.data.catalog import Catalog, id_ranks, open_catalog, reorder_catalog, write_catalog
from novelret.data.source import fingerprint_part, read_part
from novelret.deployed import Source, ids_of, open_embeddings, open_faiss, rows_in_order
from novelret.errors import UserError
from novelret.index import Index, open_index
from novelret.progress import Reporter
from novelret.search import (
    compares_products,
    faiss_reason,
    read_faiss,
    search_exact,
    search_faiss,
    set_search_params,
)

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_TRAIN_ROWS_PER_CENTROID = 64
_TRAIN_ROWS_FOR_CODES = 65_536  # 256 for each of the 256 words of a codebook
_PROBED, _NEIGHBOURS = 256, 16  # imported items whose texts are encoded, and how many of them are consecutive
_STRANGE = 0.1  # share of these nearest to their own text below which it is told
_COPY_ROWS = 65_536  # at a time
_RECALL_QUERIES, _RECALL_DEPTH = 256, 50  # an approximate index is measured on, and in their top
_ZEROS = 1 << 24  # bytes at a time
_PROGRESS = "progress.json"
_LOW_RECALL = 0.9  # below it, of the exact top items, the index is warned of


@dataclass(frozen=True)
class IndexConfig:
    """Settings of `novelret index`.

    Attributes:
        data: BEIR folder or Hugging Face data set with the catalog.
        model: the deployed encoder: folder, hub id, or `openai:MODEL` for an embedding API. With embeddings
            that exist already, the query side alone.
        query_model: the deployed query side, where it is another model.
        factory: faiss factory string; "Flat" searches the embeddings exactly.
        dtype: "float32" or "float16", how embeddings are stored.
        batch_size: texts per forward pass.
        device: "auto", "cpu" or a CUDA device.
        embeddings: .npy or .fbin file, or folder of such shards, with item embeddings that exist already.
        ids: file with the item id of each of their rows, one per line.
        faiss: faiss index file that holds the item embeddings and is what is searched.
        search_params: faiss search parameters kept in the index, like "nprobe=16" or "efSearch=64".
    """

    data: str
    model: str
    query_model: str | None = None
    factory: str = "Flat"
    dtype: str = "float32"
    batch_size: int = 64
    device: str = "auto"
    embeddings: str | None = None
    ids: str | None = None
    faiss: str | None = None
    search_params: str | None = None


def build_index(
    config: IndexConfig, out: Path, *, force: bool = False, report: Reporter | None = None
) -> Index:
    """Encode a catalog with the deployed encoder and write the INDEX artifact.

    May be killed at any moment; the same call goes on from the last finished chunk.

    Raises:
        UserError: bad data, unreadable model, mismatched dimensions, or an existing output.
    """
    report = report or Reporter()
    _check_options(config)
    read = (config.model, config.query_model, config.embeddings, config.faiss, config.ids)
    check_output(out, force=force, kind="index", inputs=[path for path in read if path])
    corpus = fingerprint_part(config.data, "corpus")
    device = encode.pick_device(config.device)
    if config.ids and not Path(config.ids).is_file():
        raise UserError(f"{config.ids}: no such file")
    source = _open_source(config)
    query_model = encode.load_encoder(config.query_model or config.model, device)
    items_model = encode.load_encoder(config.model, device) if config.query_model else query_model
    _check_same_space(config, items_model, query_model, source)
    if source and source.scaled and not encode.is_normalized(query_model):
        source = replace(source, lossy="gives its vectors unit length")
    inputs = {
        "corpus": corpus,
        "item_encoder": source.fingerprint() if source else encode.fingerprint_encoder(items_model),
        "query_encoder": encode.fingerprint_encoder(query_model),
    }
    encoding = {**inputs, "dtype": config.dtype}
    if config.ids:
        encoding["ids"] = fingerprint_file(Path(config.ids))
    searching = {"factory": config.factory}
    if config.search_params:
        searching["search_params"] = config.search_params
    identity = fingerprint_of(encoding | searching)
    if not config.faiss:
        _empty_faiss(
            config, int(query_model.get_embedding_dimension() or 0)
        )  # refuses what faiss does not know
    # Hours of encoding are not dropped without being asked; a copy is simply begun anew.
    dear = None if source else encoding
    with open_output(out, fingerprint_of(encoding), force=force, settings=dear) as folder:
        (folder / "items.faiss").unlink(missing_ok=True)  # of a killed run, perhaps with another factory
        _prepare_catalog(config, source, folder, report)
        catalog = open_catalog(folder / "items.arrow")
        if source:
            _copy_embeddings(source, config, folder, encode.is_normalized(query_model), report)
            _warn_of_strangers(source, query_model, catalog, folder, config.batch_size, report)
        else:
            encode_catalog(items_model, catalog, folder, config.dtype, config.batch_size, report)
        query_model.save(str(folder / "query_encoder"), create_model_card=False)
        if config.query_model:
            items_model.save(str(folder / "item_encoder"), create_model_card=False)
        facts = {
            "items": len(catalog),
            "dimension": query_model.get_embedding_dimension(),
            "normalized": encode.is_normalized(query_model),
            "max_length": query_model.max_seq_length,
            "prompts": query_model.prompts,
        }
        if config.factory != "Flat":
            _build_faiss(config, folder, report)
        elif source and source.faiss is not None:
            _copy_faiss(source, folder)
        if (folder / "items.faiss").is_file():
            what = config.faiss or config.factory
            params = config.search_params
            facts |= measure_recall(what, config.data, query_model, catalog, folder, report, params)
        if source:
            facts["imported"] = {"from": source.name, "lossy": source.lossy}
        write_config(folder, config)
        write_manifest(folder, Manifest("index", asdict(config), inputs, identity, facts))
    (out / _PROGRESS).unlink(missing_ok=True)  # until here a kill leaves something to resume
    return open_index(out)


def _check_options(config: IndexConfig) -> None:
    if config.dtype not in ("float32", "float16"):
        raise UserError(f"--dtype {config.dtype}: expected float32 or float16")
    if config.batch_size < 1:
        raise UserError(f"--batch-size {config.batch_size}: must be at least 1")
    imported = config.embeddings or config.faiss
    if config.embeddings and config.faiss:
        raise UserError("--embeddings and --faiss: give one; a faiss file holds its own embeddings")
    if imported and config.query_model:
        raise UserError(
            "--query-model: with --embeddings or --faiss, --model is the query side; leave it out"
        )
    if config.ids and not imported:
        raise UserError("--ids: names the rows of --embeddings or --faiss, and neither is given")
    if config.faiss and config.factory != "Flat":
        raise UserError("--factory: a --faiss file is searched as it is; leave one of them out")
    if config.search_params and config.factory == "Flat" and not config.faiss:
        raise UserError("--search-params: belong to a --factory that is not Flat, or to --faiss")


def _open_source(config: IndexConfig) -> Source | None:
    if config.faiss:
        source = open_faiss(Path(config.faiss))
        if config.search_params and source.faiss is None:
            raise UserError(f"--search-params: {config.faiss} is a flat index, which takes none")
        _check_search_params(source.faiss, config.search_params, config.faiss)
        return source
    return open_embeddings(Path(config.embeddings)) if config.embeddings else None


def _prepare_catalog(config: IndexConfig, source: Source | None, folder: Path, report: Reporter) -> None:
    """Write items.arrow and id_rank.npy, in the order of imported embeddings where there are any."""
    if (folder / "id_rank.npy").is_file():
        return
    try:
        write_catalog(config.data, folder / "items.arrow", report)
        catalog = open_catalog(folder / "items.arrow")
        if source:
            ids, named_in = ids_of(source, Path(config.ids) if config.ids else None)
            rows = rows_in_order(catalog, ids, named_in, config.data)
            if rows is not None:
                reorder_catalog(folder / "items.arrow", rows)
                catalog = open_catalog(folder / "items.arrow")
    except UserError:
        drop_partial(folder)  # it must not stand in the way of the mended data
        raise
    temporary = folder / "id_rank.tmp.npy"
    np.save(temporary, id_ranks(catalog))
    temporary.replace(folder / "id_rank.npy")


def _check_same_space(
    config: IndexConfig, items: SentenceTransformer, queries: SentenceTransformer, source: Source | None
) -> None:
    if source and source.dimension != queries.get_embedding_dimension():
        raise UserError(
            f"{source.name}: {source.dimension} dimensions, but --model {config.model} gives "
            f"{queries.get_embedding_dimension()}; they must be one deployed pair"
        )
    if items.get_embedding_dimension() != queries.get_embedding_dimension():
        raise UserError(
            f"--query-model {config.query_model} gives {queries.get_embedding_dimension()} dimensions, "
            f"--model {config.model} gives {items.get_embedding_dimension()}; they must be one deployed pair"
        )
    if encode.is_normalized(items) != encode.is_normalized(queries):
        raise UserError(
            f"--query-model {config.query_model} and --model {config.model} differ in their similarity"
        )


def encode_catalog(
    model: SentenceTransformer,
    catalog: Catalog,
    folder: Path,
    dtype: str,
    batch_size: int,
    report: Reporter,
    first: int = 0,
) -> None:
    """Write embeddings.npy from the row on that progress.json in the folder names, or from the first.

    `first`: so many rows were copied from another index; to begin behind them is no resumption to tell of.
    """
    if encode.is_api(model):
        left = len(catalog) - max(first, _rows_done(folder))
        report.note(
            f"{left:,} items will be embedded by an API, which bills them; "
            "--embeddings takes vectors that exist already"
        )

    def encoded(start: int, stop: int) -> np.ndarray:
        texts = catalog.texts_at(range(start, stop))
        with np.errstate(over="ignore"):  # what is too large for float16 is refused in the next line
            embeddings = encode.encode_items(model, texts, batch_size).astype(dtype, copy=False)
        encode.check_finite(embeddings, f"items {start} to {stop - 1}")
        return embeddings

    shape = (len(catalog), model.get_embedding_dimension())
    _fill_matrix(encoded, shape, dtype, 32 * batch_size, folder, report, "encoding items", first)


def _copy_embeddings(
    source: Source, config: IndexConfig, folder: Path, normalized: bool, report: Reporter
) -> None:
    """Copy imported embeddings into the index, checked row by row."""
    if source.lossy:
        report.warn(
            f"{source.name}: {source.lossy}, so item embeddings are reconstructions: training and exact "
            "scores work on approximations of what was indexed. Pass the original vectors by --embeddings if "
            "you have them"
        )

    def copied(start: int, stop: int) -> np.ndarray:
        block = source.read(start, stop)
        with np.errstate(over="ignore"):  # what overflows is refused below, by its row
            block = block.astype(config.dtype, copy=False)
        lengths = np.linalg.norm(block.astype(np.float32, copy=False), axis=1)
        bad = np.flatnonzero(~np.isfinite(lengths))
        if len(bad):
            raise UserError(
                f"{source.name}: row {start + int(bad[0])} holds values that are not finite in {config.dtype}"
            )
        # 0 is a length, too: an encoder may know none of an item's words.
        bad = np.flatnonzero((np.abs(lengths - 1) > (0.01 if source.lossy is None else 0.5)) & (lengths > 0))
        if normalized and len(bad):
            raise UserError(
                f"{source.name}: row {start + int(bad[0])} has length {lengths[bad[0]]:.4f}, not 1, though "
                f"--model {config.model} compares by cosine; normalise the rows, or set the model's "
                "similarity_fn_name to dot"
            )
        if normalized and source.lossy is not None:
            block = (block / np.where(lengths > 0, lengths, 1)[:, None]).astype(config.dtype)
        return block

    shape = (source.rows, source.dimension)
    _fill_matrix(copied, shape, config.dtype, _COPY_ROWS, folder, report, "copying embeddings")


def _warn_of_strangers(
    source: Source,
    model: SentenceTransformer,
    catalog: Catalog,
    folder: Path,
    batch_size: int,
    report: Reporter,
) -> None:
    """Say where imported embeddings seem to belong to other items: rows shifted by one, ids of another file.

    Each of some items' texts should be nearest to its own embedding among theirs, also for a query encoder.
    They are neighbours in groups, so that a shift is seen where neighbours are alike.
    """
    if encode.is_api(model) or len(catalog) < _PROBED:
        return
    firsts = np.linspace(0, len(catalog) - _NEIGHBOURS, _PROBED // _NEIGHBOURS).astype(np.int64)
    rows = np.unique(firsts[:, None] + np.arange(_NEIGHBOURS))
    texts = encode.encode_items(model, list(catalog.texts_at(rows)), batch_size)
    own = read_rows(np.load(folder / "embeddings.npy", mmap_mode="r"), rows)
    lengths = np.linalg.norm(own, axis=1, keepdims=True)
    scores = texts @ (own / np.where(lengths > 0, lengths, 1)).T
    nearest = float((np.diag(scores) >= scores.max(axis=1) - 1e-6).mean())
    if nearest < _STRANGE:
        report.warn(
            f"{source.name}: of {len(rows)} items only {nearest:.0%} are nearest to their own text as "
            "--model encodes it; do these rows, --ids and --model belong together?"
        )


def _fill_matrix(
    make: Callable[[int, int], np.ndarray],
    shape: tuple[int, int],
    dtype: str,
    chunk: int,
    folder: Path,
    report: Reporter,
    what: str,
    first: int = 0,
) -> None:
    """Write embeddings.npy chunk by chunk; goes on after the last chunk that is on disk."""
    path, progress = folder / "embeddings.npy", folder / _PROGRESS
    done = _rows_done(folder)
    if done == 0:
        make_matrix(path, shape, dtype)
    if first < done < shape[0]:
        report.note(f"going on at item {done:,} of {shape[0]:,}")
    with report.bar(what, shape[0]) as advance:
        advance(done)
        for start in range(done, shape[0], chunk):
            stop = min(start + chunk, shape[0])
            # Mapped anew each time, so that pages written before do not count as the process's memory.
            matrix = np.lib.format.open_memmap(path, "r+")
            matrix[start:stop] = make(start, stop)
            matrix.flush()
            del matrix
            fsync_file(path)
            write_json(progress, {"rows": stop})
            advance(stop - start)


def _rows_done(folder: Path) -> int:
    """How many rows of embeddings.npy a run that was killed has written."""
    progress = folder / _PROGRESS
    is_begun = progress.is_file() and (folder / "embeddings.npy").is_file()
    return int(read_json(progress)["rows"]) if is_begun else 0


def make_matrix(path: Path, shape: tuple[int, int], dtype: str) -> np.memmap:
    """An .npy file of zeros as a writable memory map, its place on the disk reserved."""
    matrix = np.lib.format.open_memmap(path, "w+", np.dtype(dtype), shape)
    # Writing to a mapped page of a full disk kills the process without a word; reserving says so.
    with path.open("r+b") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        else:  # macOS
            file.seek(matrix.offset)
            for start in range(0, matrix.nbytes, _ZEROS):
                file.write(bytes(min(_ZEROS, matrix.nbytes - start)))
    return matrix


def _empty_faiss(config: IndexConfig, dimension: int) -> Any:
    """A faiss index without items, not trained yet.

    Raises:
        UserError: faiss does not know the factory or the search parameters, or items could not be added.
    """
    if re.search(r"(?<!\d)0(?!\d)", config.factory):  # of some, faiss would end the process later
        raise UserError(f"--factory {config.factory}: holds a 0; for instance Flat, IVF1024,Flat or HNSW32")
    try:
        index = faiss.index_factory(dimension, config.factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise UserError(
            f"--factory {config.factory}: faiss does not take it ({faiss_reason(error)}); for instance Flat, "
            "IVF1024,Flat or HNSW32"
        ) from None
    if not compares_products(index):
        raise UserError(
            f"--factory {config.factory}: faiss builds it for Euclidean distances alone, and lists are "
            "ranked by inner products; for instance HNSW32_SQ8 or IVF1024,PQ64"
        )
    if isinstance(index, faiss.IndexIDMap):
        raise UserError(
            f"--factory {config.factory}: items are known by their rows, an IDMap wants ids of its own; "
            "leave it out"
        )
    _check_search_params(index, config.search_params, config.factory)
    return index


def _check_search_params(index: Any, params: str | None, what: str) -> None:
    """Refuse search parameters that faiss does not take for an index, or with which it would find nothing."""
    if params is None:
        return
    try:
        if re.search(r"(nprobe|efSearch)=(0|-)", params):
            raise RuntimeError("too few to find anything")
        set_search_params(index, params)
    except RuntimeError as error:
        raise UserError(
            f"--search-params {params}: faiss does not take them for {what} ({faiss_reason(error)}); for "
            "instance nprobe=16 or efSearch=64"
        ) from None


def _build_faiss(config: IndexConfig, folder: Path, report: Reporter) -> None:
    embeddings = np.load(folder / "embeddings.npy", mmap_mode="r")
    index = _empty_faiss(config, embeddings.shape[1])
    if not index.is_trained:
        centroids = getattr(faiss.try_extract_index_ivf(index), "nlist", 256)
        wanted = min(len(embeddings), max(centroids * _TRAIN_ROWS_PER_CENTROID, _TRAIN_ROWS_FOR_CODES))
        sample = np.sort(np.random.default_rng(0).choice(len(embeddings), wanted, replace=False))
        try:
            index.train(np.ascontiguousarray(embeddings[sample], dtype=np.float32))
        except RuntimeError:
            raise UserError(
                f"--factory {config.factory}: {len(embeddings)} items are too few to train it; give another, "
                "the embeddings are kept"
            ) from None
    add_to_faiss(index, embeddings, folder / "items.faiss", report)


def add_to_faiss(index: Any, embeddings: np.ndarray, path: Path, report: Reporter) -> None:
    """Add embeddings to a trained faiss index and write it.

    Raises:
        UserError: it does not take them.
    """
    with report.bar("building the faiss index", len(embeddings)) as advance:
        for start in range(0, len(embeddings), 65_536):
            block = np.ascontiguousarray(embeddings[start : start + 65_536], dtype=np.float32)
            try:
                index.add(block)
            except RuntimeError as error:
                raise UserError(
                    f"the faiss index takes no items ({faiss_reason(error)}); give another --factory, the "
                    "embeddings are kept"
                ) from None
            advance(len(block))
    faiss.write_index(index, str(path))


def _copy_faiss(source: Source, folder: Path) -> None:
    """Keep the deployed index as it is; of an IDMap, whose ids the catalog now has, the inner one."""
    if source.ids is None:
        shutil.copyfile(source.files[0], folder / "items.faiss")
        return
    # Read anew without a memory map: what is mapped would be written as a reference to the file.
    whole: Any = faiss.read_index(str(source.files[0]))
    faiss.write_index(whole.index, str(folder / "items.faiss"))


def measure_recall(
    what: str,
    data: str,
    model: SentenceTransformer,
    catalog: Catalog,
    folder: Path,
    report: Reporter,
    params: str | None,
) -> dict[str, Any]:
    """How much of the exact top lists the faiss index finds, for the first queries.

    Args:
        what: the faiss index's name, for messages.
        data: where the queries are.
        model: the deployed query encoder.
        catalog: the items.
        folder: holds embeddings.npy, id_rank.npy and items.faiss.
        report: told the figure, and warned where it is low.
        params: search parameters of the index.

    Returns:
        {"recall": its depth, the share found and the number of queries}; nothing where there are no queries.
    """
    try:
        rows = islice(read_part(data, "queries"), _RECALL_QUERIES)
        texts = [text for text in (str(row.get("text") or "").strip() for _, row in rows) if text]
    except UserError as error:  # a catalog can be indexed before there are queries
        report.note(f"{what}: what it misses of the exact top lists is not measured ({error})")
        return {}
    if not texts:
        report.note(f"{what}: what it misses of the exact top lists is not measured, there are no queries")
        return {}
    queries = encode.encode_queries(model, texts)
    embeddings = np.load(folder / "embeddings.npy", mmap_mode="r")
    ranks = np.load(folder / "id_rank.npy", mmap_mode="r")
    k = min(_RECALL_DEPTH, len(catalog))
    exact, _ = search_exact(queries, embeddings, k, ranks)
    index = read_faiss(folder / "items.faiss", params)
    found, _ = search_faiss(index, queries, k, ranks)
    hits = [len(np.intersect1d(a, b[b >= 0])) for a, b in zip(exact, found, strict=True)]
    recall = round(float(np.mean(hits)) / k, 4)
    said = f"{what}: finds {recall:.1%} of the exact top {k} ({len(queries)} queries)"
    if recall < _LOW_RECALL:
        report.warn(
            f"{said}; novelty will count what the deployed lists miss. Raise nprobe or efSearch by "
            "--search-params"
        )
    else:
        report.note(said)
    return {"recall": {"k": k, "recall": recall, "queries": len(queries)}}
