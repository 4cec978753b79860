"""One query, base and model side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from novelret import encode
from novelret.errors import UserError
from novelret.index import load_finetuned, open_index


def compare_query(
    data: str, index_folder: Path, model: str | None, query: str, *, k: int, base_depth: int, device: str
) -> dict[str, list[dict[str, Any]]]:
    """Hits by name ("base", then the model's): id, text, score, rank in base (None beyond L), novel.

    Raises:
        UserError: bad index or model, or depths beyond the catalog.
    """
    index = open_index(index_folder, data)
    for option, depth in (("--k", k), ("--base-depth", base_depth)):
        if not 1 <= depth <= len(index):
            raise UserError(f"{option} {depth}: must be from 1 to the catalog's {len(index)} items")
    device = encode.pick_device(device)
    encoders = {"base": index.query_encoder(device)}
    if model is not None:
        name, separator, path = model.partition("=")
        encoders[name if separator else Path(model).name] = load_finetuned(path or model, index, device)
    results: dict[str, list[dict[str, Any]]] = {}
    base_rank: dict[int, int] = {}
    for name, encoder in encoders.items():
        depth = max(k, base_depth) if name == "base" else k
        rows, scores = index.search(encode.encode_queries(encoder, [query]), depth, device=device)
        if name == "base":
            base_rank = {row: place + 1 for place, row in enumerate(rows[0, :base_depth].tolist())}
        shown = rows[0, :k]
        shown = shown[shown >= 0]
        ids, texts = index.catalog.ids_at(shown), index.catalog.texts_at(shown)
        results[name] = [
            {
                "id": item_id,
                "text": text,
                "score": float(score),
                "base_rank": base_rank.get(row),
                "novel": row not in base_rank,
            }
            for item_id, text, score, row in zip(ids, texts, scores[0], shown.tolist(), strict=False)
        ]
    return results
