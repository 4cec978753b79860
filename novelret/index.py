"""The INDEX artifact: the deployed system's items, embeddings and encoder, frozen.

items.arrow       item ids and texts
id_rank.npy       (N,) rank of each id, the tie rule's key
embeddings.npy    (N, d) float32 or float16
query_encoder/    the deployed query side: every finetuned model starts from it
item_encoder/     the deployed item side, where it is another model
items.faiss       the faiss index, where the factory is not Flat (Flat needs no second copy)
cache/            embeddings and top lists of queries met before, and the corpus file as it lay there when it
                  was hashed; may be deleted at any time
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from novelret import adapted, encode
from novelret.artifacts import MANIFEST, Manifest, fingerprint_of, is_kind, read_manifest
from novelret.blocks import Items
from novelret.cache import keep_lists, kept_lists, new_file
from novelret.data.catalog import Catalog, open_catalog
from novelret.data.source import fingerprint_part, is_folder, part_file
from novelret.data.split import Split
from novelret.errors import UserError
from novelret.membership import is_in
from novelret.progress import Reporter
from novelret.row_lists import RowLists
from novelret.search import compares_products, read_faiss, search_exact, search_faiss
from novelret.trained import training_of

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_SETTLED = 2.0  # seconds since a file's last change
_QUERIES = 32_768  # whose lists are held in memory at a time
_QUERIES_ON_CPU = 2_048  # a part of a large catalog's lists takes minutes there: the bar should move


@dataclass(frozen=True)
class Index:
    """An opened INDEX; everything in it is read-only."""

    folder: Path
    manifest: Manifest
    unwritten: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """What the cache could not take, as the folder is read-only or full: no run makes it twice."""

    def __len__(self) -> int:
        return int(self.manifest.facts["items"])

    @property
    def dimension(self) -> int:
        """Dimensions of an embedding."""
        return int(self.manifest.facts["dimension"])

    @property
    def normalized(self) -> bool:
        """Whether scores are cosines (else plain inner products)."""
        return bool(self.manifest.facts["normalized"])

    def descends_from(self, fingerprint: str) -> bool:
        """Whether this is the index with that fingerprint, or new items were appended to it to make this one.

        Appending moves no embedding and keeps the query encoder, so what was trained or labelled with an
        ancestor serves its descendants.
        """
        return fingerprint in (self.manifest.fingerprint, *self.manifest.facts.get("ancestors", ()))

    @cached_property
    def catalog(self) -> Catalog:
        """Item ids and texts, memory-mapped."""
        return open_catalog(self.folder / "items.arrow")

    @cached_property
    def embeddings(self) -> np.ndarray:
        """(N, d) item embeddings, memory-mapped, read-only."""
        return _mapped(self.folder / "embeddings.npy")

    @cached_property
    def id_rank(self) -> np.ndarray:
        """(N,) rank of each item's id in ascending order."""
        return _mapped(self.folder / "id_rank.npy")

    @cached_property
    def faiss_index(self) -> Any:
        """The faiss index, or None where search is exact over the embeddings."""
        path = self.folder / "items.faiss"
        if not path.is_file():
            return None
        index = read_faiss(path, self.manifest.config.get("search_params"))
        if not compares_products(index):  # of an older novelret, which let faiss build such
            raise UserError(
                f"{self.folder}: its faiss index ranks by Euclidean distances instead of inner products; run "
                "`novelret index` again with another --factory, for instance HNSW32_SQ8"
            )
        return index

    def query_encoder(self, device: str = "cpu") -> SentenceTransformer:
        """A fresh copy of the deployed query encoder."""
        return encode.load_encoder(self.folder / "query_encoder", device)

    def search(
        self,
        queries: np.ndarray,
        k: int,
        excluded: RowLists | None = None,
        *,
        device: str = "cpu",
        report: Reporter | None = None,
        what: str = "searching",
        items: Items | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Top-k rows and scores of query embeddings (see `search_exact`); by faiss where it was built.

        `items` are this index's embeddings where they are on the device already.
        """
        if self.faiss_index is not None:
            return search_faiss(self.faiss_index, queries, k, self.id_rank, excluded)
        with (report or Reporter()).bar(what, len(queries)) as advance:
            held = self.embeddings if items is None else items
            return search_exact(queries, held, k, self.id_rank, excluded, device=device, advance=advance)


def open_index(folder: str | Path, data: str | None = None) -> Index:
    """Open an INDEX and, where `data` is given, check that it still is the data it was made from.

    Raises:
        UserError: no index there, or the corpus has changed since.
    """
    folder = Path(folder)
    index = Index(folder, read_manifest(folder, "index"))
    if data is not None and _corpus_fingerprint(folder, data) != index.manifest.inputs["corpus"]:
        raise UserError(
            f"{data}: its corpus is not the one {folder} was made from "
            f"({index.manifest.config['data']}, {len(index)} items); run `novelret index` again, with "
            f"--append {folder} where the old items are all there: labels and models then still fit"
        )
    return index


def _corpus_fingerprint(folder: Path, data: str) -> str:
    """The corpus' fingerprint. Hashing 30 GB takes a minute: a file not touched since is not read again."""
    if not is_folder(data):
        return fingerprint_part(data, "corpus")
    path, kept = part_file(data, "corpus"), folder / "cache" / "corpus.json"
    began, stamp = time.time(), _stamp(path)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        before = json.loads(kept.read_text(encoding="utf-8"))
        if before["stamp"] == stamp:
            return str(before["fingerprint"])
    found = fingerprint_part(data, "corpus")
    # What changes again within a clock's tick keeps its times: a file that is so new is hashed the next time.
    if began - path.stat().st_ctime > _SETTLED and _stamp(path) == stamp:
        with contextlib.suppress(OSError), new_file(kept) as file:
            file.write(json.dumps({"stamp": stamp, "fingerprint": found}).encode())
    return found


def _stamp(path: Path) -> list[int]:
    """What changes whenever a file is written to or replaced, also by a program that sets its time back."""
    status = path.stat()
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def base_lists(
    index: Index, split: Split, depth: int, *, device: str = "cpu", report: Reporter | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The deployed model's top lists for a split, T_depth(q).

    Computed once for an index and a split's queries and kept in the index's cache, memory-mapped. Of an
    exact index a shorter depth reads a longer one; an approximate one may find other items when asked for
    more (where it ranks anew as many candidates as are asked for), so that lists of one depth are compared.

    Returns:
        (Q, depth) catalog rows, int32 or int64, and (Q, depth) float64 scores; neither to be written to.

    Raises:
        UserError: the depth exceeds the catalog.
    """
    report = report or Reporter()
    if depth > len(index):
        raise UserError(f"--depth {depth}: more than the catalog's {len(index)} items; lower it")
    cache = index.folder / "cache" / fingerprint_of(index.manifest.fingerprint, split.searched)
    is_exact = index.faiss_index is None
    name = f"lists {split.searched}"
    kept = kept_lists(cache, depth, cut=is_exact) or _unwritten_lists(index, name, depth)
    if kept is None:
        embeddings = base_query_embeddings(index, split, device=device, report=report)
        dtype = np.int32 if len(index) < 2**31 else np.int64
        step = _QUERIES_ON_CPU if device == "cpu" or index.faiss_index is not None else _QUERIES
        with report.bar("deployed top lists", len(split)) as advance:

            def search(first: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
                if first:
                    report.note(f"deployed top lists: going on at query {first:,} of {len(split):,}")
                advance(first)
                for start in range(first, len(split), step):
                    part = slice(start, start + step)
                    left_out = split.excluded.take(np.arange(len(split))[part])
                    found = index.search(embeddings[part], depth, left_out, device=device)
                    advance(len(found[0]))
                    yield found[0].astype(dtype), found[1]

            try:
                keep_lists(cache, search, (len(split), depth), dtype, report)
            except OSError:  # a read-only or full index folder costs the cache, not the run
                rows, scores = (np.concatenate(parts) for parts in zip(*search(0), strict=True))
                index.unwritten[name] = rows, scores
                return rows, scores
        kept = kept_lists(cache, depth, cut=is_exact)
        assert kept is not None
    return kept


def _unwritten_lists(index: Index, name: str, depth: int) -> tuple[np.ndarray, np.ndarray] | None:
    rows, scores = index.unwritten.get(name, (np.empty((0, 0)), np.empty((0, 0))))
    if rows.shape[1] == depth or (index.faiss_index is None and rows.shape[1] > depth):
        return rows[:, :depth], scores[:, :depth]
    return None


def open_deployed(folders: tuple[str, ...], data: str) -> list[Index]:
    """Open the indexes of several deployed models of one catalog.

    Raises:
        UserError: one cannot be opened, or was made from another corpus than that of `data`.
    """
    return [open_index(folder, data) for folder in folders]


def pooled_lists(
    indexes: list[Index], split: Split, depth: int, *, device: str = "cpu", report: Reporter | None = None
) -> np.ndarray:
    """T_L of several deployed models: the union of their top lists (PG-Ret, Definition 1).

    Returns:
        (Q, models × depth) catalog rows of the first index, int32 or int64, each at most once in a row, −1
        padded.
    """
    first = indexes[0]
    lists = []
    for index in indexes:
        same = index is first or index.catalog.ids.equals(first.catalog.ids)
        # Imported and appended indexes may hold the items in another order.
        there = split if same else split.with_items(_translated(first, index))
        rows = base_lists(index, there, depth, device=device, report=report)[0]
        lists.append(rows if same else _translated(index, first)(rows))
    pool = np.concatenate(lists, axis=1)
    for start in range(depth, pool.shape[1], depth):
        part = pool[:, start : start + depth]
        part[is_in(part, pool[:, :start])] = -1
    return pool


def _translated(of: Index, to: Index) -> Callable[[np.ndarray], np.ndarray]:
    """Rows of one index, −1 padded, as rows of the same items in another."""

    def translated(rows: np.ndarray) -> np.ndarray:
        unique, place = np.unique(rows, return_inverse=True)
        found = np.full(len(unique), -1, dtype=np.int64)
        is_item = unique >= 0
        found[is_item] = to.catalog.rows_of(of.catalog.ids_at(unique[is_item]))
        return found[place].reshape(rows.shape)

    return translated


def base_query_embeddings(
    index: Index, split: Split, *, device: str = "cpu", report: Reporter | None = None
) -> np.ndarray:
    """The deployed query embeddings of a split, (Q, d) float32, memory-mapped from the index's cache."""
    report = report or Reporter()
    cache = index.folder / "cache" / fingerprint_of(index.manifest.fingerprint, split.searched)
    path, name = cache / "queries.npy", f"queries {split.searched}"
    if name in index.unwritten:
        unwritten: np.ndarray = index.unwritten[name]
        return unwritten
    if not path.is_file():
        embeddings = embed_queries(index.query_encoder(device), split.query_texts, report)
        try:
            with new_file(path) as file:
                np.save(file, embeddings)
        except OSError:  # as above
            index.unwritten[name] = embeddings
            return embeddings
    return np.asarray(np.load(path, mmap_mode="r"))


def embed_queries(model: SentenceTransformer, texts: list[str], report: Reporter) -> np.ndarray:
    """Query embeddings with a progress bar, (Q, d) float32."""
    if unpaid := encode.count_unpaid(model, texts):
        report.note(f"{unpaid:,} queries will be embedded by an API, which bills them")
    parts = []
    with report.bar("encoding queries", len(texts)) as advance:
        for start in range(0, len(texts), 4096):
            parts.append(encode.encode_queries(model, texts[start : start + 4096]))
            advance(len(parts[-1]))
    embeddings = np.concatenate(parts)
    encode.check_finite(embeddings, "queries")
    return embeddings


def finetuned_query_embeddings(
    model: SentenceTransformer, index: Index, split: Split, *, device: str = "cpu", report: Reporter
) -> np.ndarray:
    """A finetuned encoder's embeddings of a split's queries, (Q, d) float32.

    An adapter behind the deployed encoder takes the deployed embeddings, which the index keeps.
    """
    behind = adapted.modules_behind(model, index.query_encoder(device))
    if behind is None:
        return embed_queries(model, split.query_texts, report)
    embeddings = base_query_embeddings(index, split, device=device, report=report)
    return adapted.embed_behind(behind, embeddings, normalized=encode.is_normalized(model), device=device)


def load_finetuned(path: str | Path, index: Index, device: str = "cpu") -> SentenceTransformer:
    """Load a query encoder to be used against an index.

    Raises:
        UserError: unreadable, of another dimension, or trained for another index.
    """
    folder = Path(path)
    if (folder / MANIFEST).is_file() and not is_kind(folder, "export"):
        read_manifest(folder, "model")  # refuses other artifacts
    training = training_of(folder)
    if training is not None and not index.descends_from(training.index):
        raise UserError(
            f"{path}: was trained for another index ({training.index_folder}) than {index.folder}; "
            "train it again, pass the index it belongs to, or one made from that by `novelret index --append`"
        )
    model = encode.load_encoder(path, device)
    dimension = model.get_embedding_dimension()
    if dimension != index.dimension:
        raise UserError(f"{path}: gives {dimension} dimensions, {index.folder} holds {index.dimension}")
    return model


def _mapped(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); copy the INDEX again or make it anew") from None
