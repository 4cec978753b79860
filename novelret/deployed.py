"""Item embeddings that exist already: .npy and .fbin files, folders of them, and faiss indexes.

All of them become a `Source`, which is read block by block; nothing is held in memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from novelret.artifacts import fingerprint_file, fingerprint_of
from novelret.data.catalog import Catalog, take_rows
from novelret.data.source import read_lines
from novelret.errors import UserError
from novelret.search import compares_products, faiss_reason

_IDS_AT_ONCE = 65_536
_ROUNDING = 1e-4  # of a transform of single precision and its reverse; one dimension less is far more


@dataclass(frozen=True)
class Source:
    """Embeddings of a deployed system's items.

    Attributes:
        name: what to call it in messages.
        files: what it is read from.
        rows: N.
        dimension: d.
        read: (start, stop) → (stop − start, d) embeddings.
        labelled: rows have labels of their own, 0 … N − 1 or `ids` (a faiss index).
        lossy: why the embeddings only approximate what was indexed; None where they do not.
        ids: ids that the source itself carries (a faiss IDMap), in row order.
        faiss: the index that is searched, labels 0 … N − 1; None where search is exact over the embeddings.
        scaled: the source has made their length 1, which may not have been it.
    """

    name: str
    files: tuple[Path, ...]
    rows: int
    dimension: int
    read: Callable[[int, int], np.ndarray]
    labelled: bool = False
    lossy: str | None = None
    ids: np.ndarray | None = None
    faiss: Any = None
    scaled: bool = False

    def fingerprint(self) -> str:
        """Hash of all files' bytes."""
        return fingerprint_of([fingerprint_file(path) for path in self.files])


def open_embeddings(path: Path) -> Source:
    """Open one .npy or .fbin file, or a folder of them, read in the order of their names (2 before 10).

    Raises:
        UserError: missing, not a matrix of floats, cut off, or shards of different dimensions.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if path.is_file():
        matrix = _open_matrix(path)
        return Source(str(path), (path,), matrix.rows, matrix.dimension, matrix.read)
    shards = sorted((p for p in path.iterdir() if p.suffix in (".npy", ".fbin")), key=_natural)
    if not shards:
        raise UserError(f"{path}: holds no .npy or .fbin files")
    matrices = [_open_matrix(shard) for shard in shards]
    for shard, matrix in zip(shards, matrices, strict=True):
        if matrix.dimension != matrices[0].dimension:
            raise UserError(
                f"{shard}: {matrix.dimension} dimensions, but {shards[0]} has {matrices[0].dimension}"
            )
    ends = np.cumsum([matrix.rows for matrix in matrices])

    def read(start: int, stop: int) -> np.ndarray:
        parts = []
        for number in range(int(np.searchsorted(ends, start, side="right")), len(matrices)):
            first = int(ends[number]) - matrices[number].rows
            if first >= stop:
                break
            parts.append(
                matrices[number].read(max(start - first, 0), min(stop - first, matrices[number].rows))
            )
        return np.concatenate(parts)

    return Source(str(path), tuple(shards), int(ends[-1]), matrices[0].dimension, read)


@dataclass(frozen=True)
class _Matrix:
    """Where a file's matrix lies; mapped anew for each read, so that pages read before are given back."""

    path: Path
    dtype: np.dtype
    offset: int
    rows: int
    dimension: int

    def read(self, start: int, stop: int) -> np.ndarray:
        row = self.dimension * self.dtype.itemsize
        shape = (stop - start, self.dimension)
        return np.array(np.memmap(self.path, self.dtype, "r", self.offset + start * row, shape))


def _open_matrix(path: Path) -> _Matrix:
    if path.suffix == ".fbin":
        return _open_fbin(path)
    if path.suffix != ".npy":
        raise UserError(f"{path}: expected .npy, .fbin, or a folder of such files")
    try:
        matrix: np.memmap = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise UserError(
            f"{path}: not readable as .npy ({' '.join(str(error).split())}); write it again"
        ) from None
    if matrix.ndim != 2 or matrix.dtype.kind != "f" or 0 in matrix.shape:
        raise UserError(
            f"{path}: holds {matrix.dtype} of shape {matrix.shape}, expected floats, one row per item"
        )
    if not matrix.flags.c_contiguous:
        raise UserError(f"{path}: is stored column by column; save it again with np.ascontiguousarray")
    return _Matrix(path, matrix.dtype, matrix.offset, *matrix.shape)


def _open_fbin(path: Path) -> _Matrix:
    """Two little-endian int32, rows and dimensions, then float32."""
    size = path.stat().st_size
    header = np.fromfile(path, dtype="<i4", count=2)
    if len(header) < 2 or header.min() < 1:
        raise UserError(f"{path}: no .fbin header (rows and dimensions as int32)")
    rows, dimension = (int(value) for value in header)
    if size != 8 + 4 * rows * dimension:
        raise UserError(
            f"{path}: its header says {rows} x {dimension} float32, {8 + 4 * rows * dimension} bytes, but "
            f" the file has {size}; it is cut off or holds other numbers"
        )
    return _Matrix(path, np.dtype("<f4"), 8, rows, dimension)


def _natural(path: Path) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def open_faiss(path: Path) -> Source:
    """Open a faiss index and make its vectors readable by label.

    Flat and IVFFlat, HNSW over Flat, codes refined by Flat, and what stands behind a transform that can be
    undone, give back what was indexed; compressed ones give reconstructions.

    Raises:
        UserError: unreadable, not an inner-product index, cannot give vectors back, or labels that are not
            0 … N − 1.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        index: Any = faiss.read_index(str(path), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
    except RuntimeError as error:
        raise UserError(f"{path}: not readable as a faiss index ({faiss_reason(error)})") from None
    ids, whole = None, index
    if isinstance(index, faiss.IndexIDMap):
        ids = faiss.vector_to_array(index.id_map)
        index = faiss.downcast_index(index.index)
    if not compares_products(index):
        raise UserError(
            f"{path}: is a faiss index of {_metric(index.metric_type)}, novelret compares inner products; "
            "build it with METRIC_INNER_PRODUCT over normalised vectors, or pass the vectors by --embeddings"
        )
    if index.ntotal == 0:
        raise UserError(f"{path}: the faiss index is empty")
    _make_direct(index, path)
    _check_reconstructs(index, path)

    def read(start: int, stop: int, _owner: Any = whole) -> np.ndarray:  # the inner index lives in the outer
        vectors: np.ndarray = index.reconstruct_batch(np.arange(start, stop))
        return vectors

    lossy = None if _is_exact(index, 1.0) else f"{_name(index)} stores codes"
    scaled = lossy is None and not _is_exact(index, 2.0)
    searched = None if isinstance(index, faiss.IndexFlat) else index
    return Source(str(path), (path,), index.ntotal, index.d, read, True, lossy, ids, searched, scaled)


def _make_direct(index: Any, path: Path) -> None:
    """Give an IVF index the map from labels to its lists that reading by label needs."""
    try:
        ivf = faiss.extract_index_ivf(index)
    except RuntimeError:
        return
    lists: Any = faiss.downcast_InvertedLists(ivf.invlists)  # type: ignore[arg-type]
    elsewhere = getattr(lists, "filename", "")  # "" where faiss maps the lists of this very file
    if elsewhere:
        raise UserError(
            f"{path}: its lists lie in another file, {elsewhere}, which an INDEX would depend on; write "
            "it with lists in memory (faiss.read_index without IO_FLAG_MMAP, then replace_invlists), or pass "
            "the vectors by --embeddings"
        )
    direct: Any = faiss.DirectMap  # type: ignore[attr-defined]
    if ivf.direct_map.type != direct.Array:  # the labels of an array are its places
        _check_labels(ivf, path)
    if ivf.direct_map.no():
        ivf.make_direct_map()


def _check_labels(ivf: Any, path: Path) -> None:
    seen = np.zeros(ivf.ntotal, dtype=bool)
    lists = ivf.invlists
    for number in range(ivf.nlist):
        size = lists.list_size(number)
        if size == 0:
            continue
        pointer = lists.get_ids(number)
        labels = faiss.rev_swig_ptr(pointer, size).copy()
        lists.release_ids(number, pointer)
        if labels.min() < 0 or labels.max() >= len(seen):
            raise UserError(
                f"{path}: its labels are not 0 to {len(seen) - 1} (found {int(labels.max())}); "
                "build it without add_with_ids, or inside an IndexIDMap"
            )
        seen[labels] = True
    if not seen.all():
        missing = int(np.flatnonzero(~seen)[0])
        raise UserError(f"{path}: no vector has the label {missing}; labels must be 0 to {len(seen) - 1}")


def _check_reconstructs(index: Any, path: Path) -> None:
    ivf = faiss.try_extract_index_ivf(index)
    try:
        if ivf is not None and isinstance(faiss.downcast_index(ivf), faiss.IndexIVFFastScan):
            raise RuntimeError  # faiss itself would crash
        index.reconstruct(0)
    except RuntimeError:
        raise UserError(
            f"{path}: {_name(index)} cannot give its vectors back; pass them by --embeddings"
        ) from None


def _is_exact(index: Any, length: float) -> bool:
    """Whether vectors of that length come back as they were indexed."""
    if isinstance(index, faiss.IndexHNSW):
        return isinstance(faiss.downcast_index(index.storage), faiss.IndexFlat)
    if isinstance(index, faiss.IndexRefine):
        return isinstance(faiss.downcast_index(index.refine_index), faiss.IndexFlat)
    if isinstance(index, faiss.IndexPreTransform):
        return _is_undone(index, length) and _is_exact(faiss.downcast_index(index.index), length)
    return isinstance(index, faiss.IndexFlat | faiss.IndexIVFFlat)


def _is_undone(index: Any, length: float) -> bool:
    """Whether an index's transforms and their reverses give back vectors of that length, up to rounding.

    A rotation or padding does, fewer dimensions do not, and what normalises does where the length is 1.
    """
    chain = [faiss.downcast_VectorTransform(index.chain.at(place)) for place in range(index.chain.size())]
    vectors = np.random.default_rng(0).normal(size=(8, index.d)).astype(np.float32)
    vectors *= length / np.linalg.norm(vectors, axis=1, keepdims=True)
    back = vectors
    for transform in chain:
        back = transform.apply(back)
    for transform in reversed(chain):
        back = transform.reverse_transform(back)
    return bool(np.linalg.norm(back - vectors, axis=1).max() < _ROUNDING * length)


def _name(index: Any) -> str:
    return type(index).__name__


def _metric(metric: int) -> str:
    return "L2 distances" if metric == faiss.METRIC_L2 else f"metric {metric}"


def read_ids(path: Path) -> pa.ChunkedArray:
    """Item ids, one per line, in the order of the embeddings; null where a line before the last id is blank.

    Raises:
        UserError: missing or not UTF-8.
    """

    def names() -> Iterator[str | None]:
        expected = 1
        for number, line in read_lines(path):
            yield from repeat(None, number - expected)  # blank lines, which are passed over
            yield line.rstrip("\r\n")
            expected = number + 1

    chunks, ids = [], names()
    while part := list(islice(ids, _IDS_AT_ONCE)):
        chunks.append(pa.array(part, pa.large_string()))
    return pa.chunked_array(chunks, pa.large_string())


def ids_of(source: Source, path: Path | None) -> tuple[pa.ChunkedArray, str]:
    """The source's ids in row order, and the name of what they come from.

    Line n + 1 of the ids file is the item that the source calls n; without one, a faiss index's own labels
    are the ids.

    Raises:
        UserError: the file's length does not fit, a line that has to name an item is blank, or there are no
            ids at all.
    """
    if path is None:
        if not source.labelled:
            raise UserError(f"{source.name}: --ids says which item each row is; give one id per line")
        labels = np.arange(source.rows) if source.ids is None else source.ids
        strings = pc.cast(pa.array(labels), pa.large_string())
        return pa.chunked_array([strings]), f"the labels of {source.name} (no --ids given)"
    lines = read_ids(path)
    if source.ids is None:
        _check_named(lines.slice(0, source.rows), np.arange(source.rows), source, path)
        if len(lines) != source.rows:
            named = len(lines) - lines.null_count
            raise UserError(f"{path}: {named} ids, but {source.name} holds {source.rows} embeddings")
        return lines, str(path)
    if source.ids.min() < 0 or source.ids.max() >= len(lines):
        raise UserError(
            f"{path}: its last id is in line {len(lines)}, but {source.name} has labels from "
            f"{int(source.ids.min())} to {int(source.ids.max())}; line n + 1 names the item with label n"
        )
    ids = pa.chunked_array([take_rows(lines, source.ids)])
    _check_named(ids, source.ids, source, path)
    return ids, str(path)


def _check_named(ids: pa.ChunkedArray, labels: np.ndarray, source: Source, path: Path) -> None:
    """Refuse a blank line whose number is that of an item; `labels` are the ids' row numbers or labels."""
    if ids.null_count:
        label = int(labels[int(pc.index(pc.is_null(ids), True).as_py())])
        raise UserError(
            f"{path}:{label + 1}: is blank, but has to name vector {label} of {source.name}; write its id "
            "there, or remove the line if it is one too many"
        )


def rows_in_order(catalog: Catalog, ids: pa.ChunkedArray, named_in: str, data: str) -> np.ndarray | None:
    """Catalog row of each id, (N,) int64; None where the catalog is in this order already.

    Compares both in sorted order, so that nothing is hashed and every id must occur exactly once in each.

    Raises:
        UserError: an id repeats, is not in the corpus, or an item of the corpus has no embedding.
    """
    if _same_order(catalog.ids, ids):
        return None
    ours, theirs = pc.sort_indices(catalog.ids).to_numpy(), pc.sort_indices(ids).to_numpy()
    _check_distinct(ids, theirs, named_in)
    for start in range(0, max(len(ours), len(theirs)), _IDS_AT_ONCE):
        stretch = slice(start, start + _IDS_AT_ONCE)
        mine = take_rows(catalog.ids, ours[stretch]).to_pylist()
        given = take_rows(ids, theirs[stretch]).to_pylist()
        if mine != given:
            _raise_first_difference(mine, given, named_in, data)
    rows = np.empty(len(ids), dtype=np.int64)
    rows[theirs] = ours
    return rows


def _same_order(ours: pa.ChunkedArray, theirs: pa.ChunkedArray) -> bool:
    return len(ours) == len(theirs) and bool(ours.equals(theirs))


def _check_distinct(ids: pa.ChunkedArray, order: np.ndarray, named_in: str) -> None:
    for start in range(0, len(order), _IDS_AT_ONCE):
        # One id of overlap, so that a repeated id is seen beside its first occurrence.
        found = take_rows(ids, order[start : start + _IDS_AT_ONCE + 1])
        repeats = pc.filter(found[1:], pc.equal(found[1:], found[:-1]))
        if len(repeats):
            raise UserError(
                f"{named_in}: the id {repeats[0].as_py()!r} repeats; every item has one embedding"
            )


def _raise_first_difference(ours: list[str], theirs: list[str], named_in: str, data: str) -> None:
    """Name the first id on which two sorted stretches of distinct ids differ."""
    place = next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    if place is None:
        place = min(len(ours), len(theirs))
    our_id = ours[place] if place < len(ours) else None
    their_id = theirs[place] if place < len(theirs) else None
    if their_id is None or (our_id is not None and our_id < their_id):
        raise UserError(
            f"{data}: item {our_id!r} has no embedding in {named_in}; drop it from the corpus or embed it"
        )
    raise UserError(f"{named_in}: id {their_id!r} is not in the corpus of {data}; add it or drop its row")
