"""Hugging Face data sets in BEIR's and MTEB's column names, through `datasets`.

Configurations `corpus` and `queries` hold the texts; the qrels lie in `default` (MTEB), in `qrels`, or
in a sister data set `NAME-qrels` (BEIR on the hub).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from novelret.artifacts import fingerprint_of
from novelret.data.source import Row, _qrels_columns
from novelret.errors import UserError, first_line


def read_hub_part(data: str, part: str) -> Iterator[Row]:
    """Rows of the configuration "corpus" or "queries", of all its splits; what several hold is given once."""
    splits = _load(data, part)
    seen: set[int] = set()
    for name, rows in splits.items():
        where = part if len(splits) == 1 else f"{part}, {name}"
        for number, row in enumerate(rows, 1):
            row = dict(row)
            if "_id" not in row and "id" in row:
                row["_id"] = row["id"]
            if len(splits) > 1:
                key = hash(str([row.get(name) for name in ("_id", "title", "text")]))
                if key in seen:
                    continue
                seen.add(key)
            yield f"{data} ({where}): row {number}", row


def read_hub_qrels(data: str, split: str) -> Iterator[tuple[str, str, str, float]]:
    """Rows (where, query id, item id, score) of one split's qrels."""
    for number, row in enumerate(_qrels(data, split), 1):
        where = f"{data} (qrels, {split}): row {number}"
        yield where, *_qrels_columns(where, row)


def fingerprint_hub_part(data: str, part: str) -> str:
    """The fingerprint that `datasets` keeps of the part's files and transformations."""
    if part.startswith("qrels/"):
        return str(_qrels(data, part.removeprefix("qrels/"))._fingerprint)
    found = [str(rows._fingerprint) for rows in _load(data, part).values()]
    return found[0] if len(found) == 1 else fingerprint_of(found)


def _load(data: str, part: str) -> dict[str, Any]:
    """The splits of a configuration by name: the one that is called as it is, or all of them."""
    datasets = quiet_datasets()
    try:
        names = datasets.get_dataset_config_names(data)
        if part not in names:
            raise UserError(f"{data}: has no configuration {part!r} (it has: {', '.join(names)})")
        splits = datasets.load_dataset(data, part)
    except UserError:
        raise
    except Exception as error:
        raise UserError(_cannot_load(data, error)) from None
    return {part: splits[part]} if part in splits else dict(splits)


def _qrels(data: str, split: str) -> Any:
    datasets = quiet_datasets()
    sister = f"{data}-qrels"
    try:
        names = datasets.get_dataset_config_names(data)
        configs = [name for name in ("qrels", "default") if name in names]
        present: list[str] = []
        places: list[tuple[str, str | None]] = [(data, name) for name in configs]
        for place in places or [(sister, None)]:
            splits = datasets.load_dataset(*place)
            if split in splits:
                return splits[split]
            present += splits
    except Exception as error:
        raise UserError(_cannot_load(data, error)) from None
    raise UserError(f"{data}: has no qrels split {split!r} (it has: {', '.join(dict.fromkeys(present))})")


def quiet_datasets() -> Any:
    """The library, without its own bars and log lines."""
    import datasets

    datasets.disable_progress_bars()
    logging.getLogger("datasets").setLevel(logging.CRITICAL)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    return datasets


def _cannot_load(data: str, error: Exception) -> str:
    if not Path(data).exists() and "/" not in data:
        return f"{data}: no such folder, and no Hugging Face data set could be loaded under this name"
    return f"{data}: cannot be loaded as a Hugging Face data set ({first_line(error)})"
