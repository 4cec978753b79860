"""Recipes: YAML files with the options of every stage, from the papers' settings to our defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from novelret.errors import UserError
from novelret.yaml_file import read_yaml

FOLDER = Path(__file__).parent / "recipes"


def names() -> list[str]:
    """Names of all recipes."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def find(name: str) -> Path:
    """A recipe by name, or a file of one's own.

    Raises:
        UserError: neither.
    """
    if name in names():
        return FOLDER / f"{name}.yaml"
    path = Path(name)
    if path.is_file():
        if path.suffix not in (".yaml", ".yml"):
            raise UserError(f"{name}: a recipe's file ends in .yaml or .yml; rename it")
        return path
    raise UserError(f"{name}: no such recipe or file; choose from {', '.join(names())}")


def summary(path: Path) -> str:
    """The first line of the header."""
    return path.read_text(encoding="utf-8").splitlines()[0].removeprefix("#").strip()


def load(path: Path, overrides: list[str]) -> dict[str, dict[str, Any]]:
    """Stage → options, with overrides applied; names as flags spell them, `max_requests` too.

    Args:
        path: the recipe.
        overrides: STAGE.OPTION=VALUE, or OPTION=VALUE for every stage that names this option.

    Raises:
        UserError: not YAML, not stages with options, or an override that names neither.
    """
    stages = read_yaml(path)
    if not isinstance(stages, dict) or not all(isinstance(options, dict) for options in stages.values()):
        raise UserError(
            f"{path}: expected stages with their options, like `train:` and below it `steps: 400`"
        )
    stages = {stage: {_flag(name): value for name, value in of.items()} for stage, of in stages.items()}
    for text in overrides:
        _override(path, stages, text)
    return stages


def _flag(name: Any) -> str:
    return str(name).replace("_", "-")


def _override(path: Path, stages: dict[str, dict[str, Any]], text: str) -> None:
    key, separator, value = text.partition("=")
    stage, dot, option = key.rpartition(".")
    option = _flag(option)
    if not separator or not option:
        raise UserError(
            f"--set {text}: expected STAGE.OPTION=VALUE, or OPTION=VALUE for all stages that have it"
        )
    if dot and stage not in stages:
        raise UserError(f"--set {text}: {path.name} has no stage {stage!r} (it has: {', '.join(stages)})")
    chosen = [stages[stage]] if dot else [options for options in stages.values() if option in options]
    if not chosen:
        raise UserError(f"--set {text}: no stage of {path.name} names {option!r}; use STAGE.{option}=VALUE")
    try:
        read = yaml.safe_load(value)
    except yaml.YAMLError as error:
        said = " ".join(str(error).split())
        raise UserError(f"--set {text}: the value is not readable as YAML ({said}); quote it") from None
    for options in chosen:
        options[option] = read
