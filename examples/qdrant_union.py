"""The deployed and the new query encoder in front of one Qdrant collection, indexed once.

    pip install qdrant-client
    python examples/qdrant_union.py --index runs/index --model runs/model "grey settee"

Item embeddings go into Qdrant as they lie in the INDEX and are never touched again. A query is embedded by
both encoders; what the new one brings beyond the deployed top L is appended to the deployed list, as a second
retriever beside the first would. `--url` takes a running server; without it Qdrant runs inside this process.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qdrant_client import QdrantClient, models

from novelret import encode
from novelret.index import Index, load_finetuned, open_index

BATCH = 1_000


def fill(client: QdrantClient, index: Index) -> str:
    """Copy ids, texts and embeddings of all items into the index's own collection, unless they are there.

    Returns:
        the collection's name.
    """
    # By the fingerprint, since another index on the same server, or this one once it grew, holds other items.
    collection = f"items-{index.manifest.fingerprint}"
    if not client.collection_exists(collection):
        distance = models.Distance.COSINE if index.normalized else models.Distance.DOT
        client.create_collection(
            collection, vectors_config=models.VectorParams(size=index.dimension, distance=distance)
        )
    elif client.count(collection, exact=True).count == len(index):
        return collection
    for start in range(0, len(index), BATCH):
        rows = range(start, min(start + BATCH, len(index)))
        payloads = [
            {"id": item, "text": text}
            for item, text in zip(index.catalog.ids_at(rows), index.catalog.texts_at(rows), strict=True)
        ]
        client.upsert(
            collection,
            models.Batch(
                ids=list(rows), vectors=index.embeddings[start : rows.stop].tolist(), payloads=payloads
            ),
        )
    return collection


def search(client: QdrantClient, collection: str, embedding, k: int) -> list[tuple[str, str]]:
    """(id, text) of the k nearest items."""
    points = client.query_points(collection, query=embedding.tolist(), limit=k).points
    return [(point.payload["id"], point.payload["text"]) for point in points]


def union(deployed: list[tuple[str, str]], new: list[tuple[str, str]]) -> list[tuple[str, str, bool]]:
    """The deployed list as it is, then what the new encoder adds: (id, text, whether it is novel)."""
    known = {item for item, _ in deployed}
    return [(*hit, False) for hit in deployed] + [(*hit, True) for hit in new if hit[0] not in known]


def main(arguments: list[str] | None = None) -> list[tuple[str, str, bool]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("query")
    parser.add_argument("--index", type=Path, required=True, help="INDEX folder")
    parser.add_argument("--model", required=True, help="MODEL folder")
    parser.add_argument("--base-depth", type=int, default=50, help="L, the deployed list's length")
    parser.add_argument("--k", type=int, default=10, help="length of the new encoder's list")
    parser.add_argument("--url", help="a running Qdrant server")
    given = parser.parse_args(arguments)
    index = open_index(given.index)
    client = QdrantClient(url=given.url) if given.url else QdrantClient(":memory:")
    collection = fill(client, index)
    lists = []
    for encoder, k in (
        (index.query_encoder(), given.base_depth),
        (load_finetuned(given.model, index), given.k),
    ):
        lists.append(search(client, collection, encode.encode_queries(encoder, [given.query])[0], k))
    merged = union(*lists)
    for item, text, novel in merged:
        print(f"{'+' if novel else ' '} {item}\t{text}")
    return merged


if __name__ == "__main__":
    main()
