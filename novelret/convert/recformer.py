"""RecFormer's Amazon files (Li et al., 2023): who reviewed which products, in the order of time.

`train.json`, `val.json`, `test.json`: user number → list of item numbers; `umap.json`, `smap.json`: own ids
of users and items → these numbers; `meta_data.json`: item id → attributes. As in PG-Ret, §5.1, the deployed
model is trained on the train histories ("base": the last of them is the next product), finetuning adds the
validation product ("train"), and the test product is held out ("test").
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from novelret.convert.writer import Converted, Writer, converted, open_writer
from novelret.data.source import mended
from novelret.errors import UserError
from novelret.progress import Reporter

SPLITS = ("base", "train", "test")
_FIRST = ("title", "category", "color")
_FILES = ("train.json", "val.json", "test.json", "umap.json", "smap.json", "meta_data.json")


def convert_recformer(
    source: Path, out: Path, *, force: bool = False, report: Reporter | None = None
) -> Converted:
    """Write histories as queries and next products as positives; products seen before are not ranked.

    A query's text names the products of the history, the latest first, since encoders cut off a text's end.

    Raises:
        UserError: a missing or malformed file, numbers that no map explains, or an existing output.
    """
    report = report or Reporter()
    files = {name: source / name for name in _FILES}
    with open_writer(out, "recformer", {}, list(files.values()), SPLITS, force=force) as writer:
        read = {name: _read_object(path) for name, path in files.items()}
        users = _numbers(files["umap.json"], read["umap.json"])
        items = _numbers(files["smap.json"], read["smap.json"])
        texts = _write_items(files, items, read["meta_data.json"], writer)
        histories = {
            name: _histories(files[name], read[name], users, items)
            for name in ("train.json", "val.json", "test.json")
        }
        with report.bar("writing users", len(users)) as advance:
            for number, user in users.items():
                before, validation, test = (histories[name].get(number, []) for name in histories)
                _write_query(writer, texts, items, "base", user, before[:-1], before[-1:])
                _write_query(writer, texts, items, "train", user, before, validation)
                _write_query(writer, texts, items, "test", user, before + validation, test)
                advance(1)
    return converted(out, writer)


def item_text(attributes: dict[str, Any]) -> str:
    """An item as text, "Title: … Category: … Color: …" and whatever else is known of it."""
    names = [name for name in _FIRST if name in attributes]
    names += [name for name in attributes if name not in _FIRST]
    parts = []
    for name in names:
        value = attributes[name]
        text = " ".join(map(str, value)) if isinstance(value, list) else str(value or "")
        text = " ".join(text.split())
        if text:
            parts.append(f"{str(name).capitalize()}: {text}")
    return str(mended(" ".join(parts)))  # titles are cut, and some in an emoji


def _write_items(
    files: dict[str, Path], items: dict[int, str], meta: dict[str, Any], writer: Writer
) -> dict[int, str]:
    """Write every mapped item that has a text; give the texts by number."""
    texts = {}
    for number, item in items.items():
        attributes = meta.get(item)
        if attributes is not None and not isinstance(attributes, dict):
            raise UserError(f"{files['meta_data.json']}: item {item!r} is no object of attributes")
        text = item_text(attributes or {})
        if text:
            writer.item(str(files["smap.json"]), item, "", text)
            texts[number] = text
        else:
            writer.drop("items without attributes")
    return texts


def _write_query(
    writer: Writer,
    texts: dict[int, str],
    items: dict[int, str],
    split: str,
    user: str,
    history: list[int],
    following: list[int],
) -> None:
    seen = [number for number in history if number in texts]
    wanted = [number for number in dict.fromkeys(following) if number in texts]
    if not following:
        writer.drop(f"{split}: users without a next product")
    elif not wanted:
        writer.drop(f"{split}: users whose next product has no attributes")
    elif not seen:
        writer.drop(f"{split}: users without a history")
    else:
        query_id = f"{user}-{split}"
        writer.query(user, query_id, "\n".join(texts[number] for number in reversed(seen)))
        for number in wanted:
            writer.pair(split, query_id, items[number])
        # What is bought again stays a positive, so it must stay in the ranking.
        for number in dict.fromkeys(seen):
            if number not in wanted:
                writer.exclude(split, query_id, items[number])


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes().decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start}); convert the file with iconv") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}:{error.lineno}: malformed JSON ({error.msg} at column {error.colno})"
        ) from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _numbers(path: Path, mapping: dict[str, Any]) -> dict[int, str]:
    """Number → own id, in the order of numbers."""
    numbers: dict[int, str] = {}
    for name, number in mapping.items():
        if not isinstance(number, int):
            raise UserError(f"{path}: {name!r} maps to {number!r}, expected a number")
        if number in numbers:
            raise UserError(f"{path}: number {number} repeats ({numbers[number]!r} and {name!r})")
        numbers[number] = name
    return dict(sorted(numbers.items()))


def _histories(
    path: Path, given: dict[str, Any], users: dict[int, str], items: dict[int, str]
) -> dict[int, list[int]]:
    histories = {}
    for user, history in given.items():
        if not user.isdigit() or int(user) not in users:
            raise UserError(f"{path}: user {user!r} is not in umap.json")
        if not isinstance(history, list):
            raise UserError(f"{path}: user {user!r} has {history!r}, expected a list of item numbers")
        unknown = [item for item in history if not isinstance(item, int) or item not in items]
        if unknown:
            raise UserError(f"{path}: user {user!r} has item {unknown[0]!r}, which is not in smap.json")
        histories[int(user)] = history
    return histories
