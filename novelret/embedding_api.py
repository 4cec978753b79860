"""`openai:MODEL` as a query encoder: an embedding endpoint behind a sentence-transformers module.

Its weights are out of reach, so only an adapter or a memory behind it is trained. Every embedding that
was paid for lies in one SQLite file per user and is never asked for again.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import openai
import torch
from sentence_transformers.base.modules import InputModule

from novelret.database import open_database, select, transaction
from novelret.endpoint import PASSING, check_key, hide_secrets, refusal, shown_url
from novelret.errors import UserError

PREFIX = "openai:"
_OPENAI = "https://api.openai.com/v1"
_AT_ONCE = 128  # texts per request; endpoints take 2,048 texts but also limit a request's tokens
_CONCURRENCY = 8
_REFUSED = (400, 413, 422)  # statuses by which endpoints refuse a text, mostly for its length
_RETRIES = 12  # the client waits as long as the endpoint says, up to a minute, else a minute in all
_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS embeddings (key BLOB PRIMARY KEY, embedding BLOB NOT NULL) WITHOUT ROWID"
)


class ApiEmbedding(InputModule):
    """The first module of a SentenceTransformer whose embeddings come from an endpoint, without gradient.

    Attributes:
        model: the endpoint's name of the model.
        dimensions: what the endpoint is asked to shorten embeddings to; None for its own length.
        dimension: what it answered when the encoder was made; another length later is refused.
    """

    config_keys = ["model", "dimensions", "dimension"]  # noqa: RUF012 (the base class declares it so)

    def __init__(self, model: str, dimensions: int | None, dimension: int) -> None:
        super().__init__()
        self.model = model
        self.dimensions = dimensions
        self.dimension = dimension
        # A buffer gives the module a device, and makes the model's name part of the encoder's fingerprint.
        name = f"{model}@{dimensions}".encode()
        self.register_buffer("name", torch.tensor(list(name), dtype=torch.uint8))

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **_: Any) -> dict[str, Any]:
        """Texts as they will be sent."""
        return {"texts": [(prompt or "") + str(text) for text in inputs]}

    def count_unknown(self, texts: Sequence[str], prompt: str | None) -> int:
        """How many of the texts the endpoint would be asked for, and paid for."""
        asked = self.preprocess(texts, prompt)["texts"]
        keys = {_key(self.model, self.dimensions, text) for text in asked}
        with closing(_open_cache()) as cache:
            return len(keys) - sum(1 for _ in select(cache, "key FROM embeddings", keys))

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Adds `sentence_embedding`, (n, d) float32, from the cache or the endpoint."""
        found = embed_texts(features["texts"], self.model, self.dimensions, self.dimension)
        features["sentence_embedding"] = torch.from_numpy(found).to(self.name.device)
        return features

    def get_embedding_dimension(self) -> int:
        """Dimensions of an embedding."""
        return self.dimension

    def save(self, output_path: str, *_: Any, **__: Any) -> None:
        """Write the configuration; there are no weights."""
        self.save_config(output_path)


def make_module(name: str) -> ApiEmbedding:
    """The module for `openai:MODEL` or `openai:MODEL@DIMENSIONS`; asks for one embedding to learn its length.

    Raises:
        UserError: no key, or the endpoint refuses.
    """
    model, _, dimensions = name.removeprefix(PREFIX).rpartition("@")
    if not model or not dimensions.isdigit():
        model, dimensions = name.removeprefix(PREFIX), ""
    asked = int(dimensions) if dimensions else None
    dimension = embed_texts(["dimension"], model, asked, asked).shape[1]
    return ApiEmbedding(model, asked, dimension)


def embed_texts(texts: Sequence[str], model: str, dimensions: int | None, expected: int | None) -> np.ndarray:
    """Embeddings of texts, (n, d) float32: from the cache where they are, else asked for in batches.

    Every batch is stored when it comes, so an interruption loses none.

    Args:
        texts: what to embed.
        model: the endpoint's name of the model.
        dimensions: asked-for length, None for the model's own.
        expected: refuse embeddings of another length, where given.

    Raises:
        UserError: no key, the endpoint refuses or cannot be reached, or an answer is malformed.
    """
    keys = [_key(model, dimensions, text) for text in texts]
    cache = _open_cache()
    try:
        found = dict(_find(cache, keys))
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in found}
        for asked, embeddings in _ask(missing, model, dimensions, expected):
            _keep(cache, asked, embeddings)
            found.update(zip(asked, embeddings, strict=True))
    finally:
        cache.close()
    for embedding in found.values():
        _check_length(len(embedding), expected or len(found[keys[0]]), model)
    return np.stack([found[key] for key in keys]) if keys else np.empty((0, expected or 0), dtype=np.float32)


def _ask(
    missing: dict[bytes, str], model: str, dimensions: int | None, expected: int | None
) -> Iterator[tuple[list[bytes], np.ndarray]]:
    """Batches of keys and (n, d) embeddings as they come, a few requests under way at once."""
    if not missing:
        return
    keys = list(missing)
    batches = [keys[start : start + _AT_ONCE] for start in range(0, len(keys), _AT_ONCE)]
    client = openai.OpenAI(api_key=check_key(), max_retries=_RETRIES, timeout=60)
    with client, ThreadPoolExecutor(_CONCURRENCY) as pool:
        futures: dict[Future[np.ndarray], list[bytes]] = {
            pool.submit(_embed, client, {k: missing[k] for k in batch}, model, dimensions, expected): batch
            for batch in batches
        }
        given = set()
        try:
            for future in as_completed(futures):
                given.add(future)
                yield futures[future], future.result()
        except BaseException:
            for future in futures:
                future.cancel()
            for future in wait(futures).done - given:
                if not future.cancelled() and future.exception() is None:
                    _store_late(futures[future], future.result())
            raise


def _store_late(keys: list[bytes], embeddings: np.ndarray) -> None:
    """Keep what was under way when another request failed or Ctrl-C came: it was paid for."""
    cache = _open_cache()
    _keep(cache, keys, embeddings)
    cache.close()


def _embed(
    client: openai.OpenAI,
    missing: dict[bytes, str],
    model: str,
    dimensions: int | None,
    expected: int | None,
) -> np.ndarray:
    """Embeddings of some texts, (n, d) float32; what is refused is halved until it is known which text it is.

    Raises:
        UserError: as `_request`, or a text is refused.
    """
    try:
        return _request(client, list(missing.values()), model, dimensions, expected)
    except openai.APIStatusError as error:
        if len(missing) == 1:
            (text,) = missing.values()
            raise UserError(
                f"{PREFIX}{model}: refuses the text that begins {text[:60]!r}: {hide_secrets(str(error))}; "
                "shorten it, or leave it out"
            ) from None
    keys = list(missing)
    first, second = (
        {key: missing[key] for key in half} for half in (keys[: len(keys) // 2], keys[len(keys) // 2 :])
    )
    begun = _embed(client, first, model, dimensions, expected)
    try:
        rest = _embed(client, second, model, dimensions, expected)
    except BaseException:
        _store_late(list(first), begun)
        raise
    return np.concatenate([begun, rest])


def _request(
    client: openai.OpenAI, texts: list[str], model: str, dimensions: int | None, expected: int | None
) -> np.ndarray:
    """One request, (n, d) float32.

    Raises:
        UserError: one line, without the key.
        openai.APIStatusError: one of the texts is refused.
    """
    options: dict[str, Any] = {} if dimensions is None else {"dimensions": dimensions}
    try:
        answer = client.embeddings.create(model=model, input=texts, encoding_format="float", **options)
        ordered = sorted(answer.data, key=lambda entry: entry.index)
        rows = [entry.embedding for entry in ordered]
        embeddings = np.array(rows, dtype=np.float32)
    except openai.OpenAIError as error:
        status = getattr(error, "status_code", None)
        if status in _REFUSED:
            raise
        passes = isinstance(error, PASSING) or status == 408
        passes = passes and getattr(error, "code", None) != "insufficient_quota"
        again = "; run the same command again, what came so far is kept" if passes else ""
        raise UserError(f"{PREFIX}{model}: {refusal(error)}{again}") from None
    except (TypeError, AttributeError, ValueError) as error:
        where = shown_url(str(client.base_url))
        raise UserError(f"{PREFIX}{model}: {where}: malformed answer ({hide_secrets(str(error))})") from None
    if [entry.index for entry in ordered] != list(range(len(texts))) or embeddings.ndim != 2:
        raise UserError(f"{PREFIX}{model}: {len(texts)} texts were sent, {len(rows)} embeddings came back")
    if expected is not None:
        _check_length(embeddings.shape[1], expected, model)
    if not np.isfinite(embeddings).all():
        raise UserError(f"{PREFIX}{model}: an embedding holds values that are not finite")
    return embeddings


def _check_length(found: int, expected: int, model: str) -> None:
    if found != expected:
        raise UserError(
            f"{PREFIX}{model}: gives {found} dimensions, expected {expected}; the endpoint serves another "
            "model than the one the index was made with"
        )


def cache_path() -> Path:
    """NOVELRET_EMBEDDINGS, else a file in the user's cache folder."""
    if os.environ.get("NOVELRET_EMBEDDINGS"):
        return Path(os.environ["NOVELRET_EMBEDDINGS"])
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "novelret" / "embeddings.sqlite"


def _open_cache() -> sqlite3.Connection:
    path = cache_path()
    try:
        return open_database(path, _SCHEMA)
    except (sqlite3.Error, OSError) as error:
        raise UserError(
            f"{path}: cannot be used as a cache of embeddings ({error}); set NOVELRET_EMBEDDINGS"
        ) from None


def _find(cache: sqlite3.Connection, keys: list[bytes]) -> Iterator[tuple[bytes, np.ndarray]]:
    for key, blob in select(cache, "key, embedding FROM embeddings", keys):
        yield key, np.frombuffer(blob, dtype=np.float32)


def _keep(cache: sqlite3.Connection, keys: list[bytes], embeddings: np.ndarray) -> None:
    rows = [(key, row.tobytes()) for key, row in zip(keys, embeddings, strict=True)]
    with transaction(cache):
        cache.executemany("INSERT OR IGNORE INTO embeddings VALUES (?, ?)", rows)


def _without_user(url: str) -> str:
    """An endpoint whatever the credentials in its URL; OpenAI's own goes without saying."""
    head, mark, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    url = head + mark + host.rpartition("@")[2] + slash + path
    return "" if url == _OPENAI else url


def _key(model: str, dimensions: int | None, text: str) -> bytes:
    """Identity of an embedding: the endpoint, the model, the asked-for length and the text."""
    endpoint = _without_user(os.environ.get("OPENAI_BASE_URL", "").strip().rstrip("/"))
    identity = json.dumps([endpoint, model, dimensions, text], ensure_ascii=False)
    return hashlib.blake2b(identity.encode("utf-8", "surrogatepass"), digest_size=16).digest()
