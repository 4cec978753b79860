"""The commands behind a report, put together again from the settings that the artifacts keep."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from novelret.artifacts import Manifest, is_kind, read_manifest
from novelret.errors import UserError
from novelret.trained import model_of

if TYPE_CHECKING:
    from novelret.evaluate.evaluate import Evaluation

# Options whose flags differ from the settings' names.
_FLAGS = {"models": "--model", "runs": "--run", "sources": "--from"}


_FIXED_BY_APPEND = ("model", "query_model", "factory", "search_params", "dtype")


def commands(evaluation: Evaluation) -> list[str]:
    """Shell lines that make the indexes, labels, models and this report again, each behind what it needs."""
    config = evaluation.config
    indexes = [
        line
        for folder in config.indexes
        for line in _index_lines(read_manifest(Path(folder), "index"), folder)
    ]
    lines = dict.fromkeys(indexes)
    for path in dict.fromkeys(model_of(Path(path)) for path in evaluation.models.values()):
        _add_lines(path, lines, set())
    last = command_line("eval", asdict(config), _defaults(type(config)))
    return [*lines, f"{last} --out {shlex.quote(str(evaluation.out))}"]


def _add_lines(folder: Path, lines: dict[str, None], seen: set[Path]) -> None:
    """Add the line that makes a MODEL or LABELS that still lies there, behind those of what went into it."""
    verb = "train" if is_kind(folder, "model") else "label" if is_kind(folder, "labels") else None
    if verb is None or folder in seen:  # a folder that was made anew since may seem to be made of itself
        return
    seen.add(folder)
    settings = read_manifest(folder, "model" if verb == "train" else "labels").config
    labels = settings.get("labels") or []
    made_of = [labels] if isinstance(labels, str) else [*labels]
    sources = [source.partition(":") for source in settings.get("sources") or []]
    made_of += [name for kind, _, name in sources if kind in ("model", "yes")]
    made_of += [settings["init"]] if settings.get("init") else []
    for part in made_of:
        _add_lines(model_of(Path(part)), lines, seen)
    defaults = _train_defaults() if verb == "train" else _label_defaults()
    lines[f"{command_line(verb, settings, defaults)} --out {shlex.quote(str(folder))}"] = None


def _index_lines(manifest: Manifest, folder: str) -> list[str]:
    """The line that makes an index, behind those of the indexes it was appended to that still lie there."""
    made, before = dict(manifest.config), []
    if made.get("append"):
        made = {name: value for name, value in made.items() if name not in _FIXED_BY_APPEND}
        old = made["append"]
        with contextlib.suppress(UserError):  # it is gone, or cannot be read any more
            its = read_manifest(Path(old), "index")
            # Where an index was appended to in place, or made anew since, another one lies there.
            if its.fingerprint == manifest.inputs.get("appended_to"):
                before = _index_lines(its, old)
    return [*before, f"{command_line('index', made, _index_defaults())} --out {shlex.quote(folder)}"]


def command_line(verb: str, settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """One command as the shell takes it, with the options that differ from their defaults."""
    words = ["novelret", verb]
    for name, value in settings.items():
        if value is None or (name in defaults and _plain(value) == _plain(defaults[name])):
            continue
        flag = _FLAGS.get(name, "--" + name.replace("_", "-"))
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif name == "k" and isinstance(value, list | tuple):
            words += [flag, ",".join(map(str, value))]
        elif isinstance(value, list | tuple):
            words += [word for part in value for word in (flag, str(part))]
        else:
            words += [flag, str(value)]
    return shlex.join(words)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _defaults(config: type[Any]) -> dict[str, Any]:
    return {field.name: field.default for field in fields(config) if field.default is not MISSING}


def _index_defaults() -> dict[str, Any]:
    from novelret.build import IndexConfig

    return _defaults(IndexConfig)


def _label_defaults() -> dict[str, Any]:
    from novelret.label.label import LabelConfig

    return _defaults(LabelConfig)


def _train_defaults() -> dict[str, Any]:
    # Imported here: evaluation needs nothing else of training.
    from novelret.train.config import TrainConfig

    return _defaults(TrainConfig)
