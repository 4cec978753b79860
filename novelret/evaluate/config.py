"""Settings of an evaluation, and what is wrong with them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from novelret.artifacts import MANIFEST
from novelret.errors import UserError
from novelret.evaluate.metrics import RECALLS
from novelret.label.judge import Asking, check_asking, split_judge
from novelret.label.scores import check_threshold

BASE = "base"
"""The deployed model's name among those compared."""


@dataclass(frozen=True)
class EvalConfig(Asking):
    """Settings of `novelret eval`, beside those of `Asking`.

    Attributes:
        data: BEIR folder or Hugging Face data set.
        index: INDEX folder; or several of the same catalog, whose top-L lists are pooled into one T_L
            (Definition 1 for several deployed models). The first is the base and what models search.
        models: "NAME=MODEL" or "MODEL" for each query encoder to compare; a folder of MODEL folders gives
            each of them.
        runs: "NAME=FILE" for each TREC run of any other retriever.
        split: the held-out feedback.
        judge: "file:PATH", "openai:MODEL", "openai-batch:MODEL" or "cross-encoder:MODEL", for precision and
            relevance; better another than the labels'.
        retry_unusable: ask again where the stored answer cannot be read.
        wait: stay until batches are answered; otherwise leave once they are submitted.
        base_depth: L, the deployed list's length: items beyond it are novel.
        k: cuts of the lists.
        human: a few (query, item) pairs labelled by people, drawn at random from the lists.
        human_threshold: lowest of their scores that is relevant; by default anything above 0.
        human_sample: how many pairs to draw for people to label.
        max_recall_drop: how much of the base's recall the selected model may lose, relative.
        recall_of: what that recall counts: "feedback", or what is "known" to be relevant: feedback and what
            the judge calls relevant in any of the lists.
        weights: tab-separated query id and frequency; by default the queries' own `weight` field, if any.
        merge_budget: novel items that the merged list takes per query at most; by default the whole top k.
        device: "auto", "cpu" or a CUDA device.
        ignore_identical_ids: leave the item whose id is the query's own out.
    """

    data: str
    index: str | tuple[str, ...]
    models: tuple[str, ...] = ()
    runs: tuple[str, ...] = ()
    split: str = "test"
    judge: str | None = None
    retry_unusable: bool = False
    wait: bool = True
    base_depth: int = 50
    k: tuple[int, ...] = (10, 20, 50)
    human: str | None = None
    human_threshold: float | None = None
    human_sample: int | None = None
    max_recall_drop: float = 0.01
    recall_of: str = "feedback"
    weights: str | None = None
    merge_budget: int | None = None
    device: str = "auto"
    ignore_identical_ids: bool = True

    @property
    def indexes(self) -> tuple[str, ...]:
        """All INDEX folders; the first is the base."""
        return (self.index,) if isinstance(self.index, str) else tuple(self.index)

    @property
    def recall_metric(self) -> str:
        """The recall that the budget is about, at the deepest cut."""
        return f"{'KnownRecall' if self.recall_of == 'known' else 'Recall'}@{max(self.k)}"


def check_config(config: EvalConfig, catalog_size: int) -> tuple[dict[str, str], dict[str, str]]:
    """Names and paths of models and runs.

    Raises:
        UserError: one line naming the option.
    """
    _check_numbers(config, catalog_size)
    _check_judge(config)
    models = _expanded(_named("--model", [(given, *named_model(given)) for given in config.models]))
    runs = _named("--run", [(given, *_apart(given)) for given in config.runs])
    files = [("--run", path) for path in runs.values()] + [
        ("--human", config.human),
        ("--weights", config.weights),
    ]
    for option, given in files:
        if given is not None and not Path(given).is_file():
            raise UserError(f"{option} {given}: no such file")
    twice = (models.keys() & runs.keys()) | ({BASE} & (models.keys() | runs.keys()))
    if twice:
        raise UserError(
            f"the name {min(twice)!r} is used twice ({BASE!r} is the deployed model); choose another"
        )
    return models, runs


def _check_numbers(config: EvalConfig, catalog_size: int) -> None:
    if not config.k or min(config.k) < 1:
        raise UserError(f"--k {','.join(map(str, config.k))}: expected cuts of at least 1, like 10,20,50")
    if max(config.k) > catalog_size:
        raise UserError(f"--k {max(config.k)}: the catalog holds {catalog_size} items; lower it")
    if not 1 <= config.base_depth <= catalog_size:
        raise UserError(
            f"--base-depth {config.base_depth}: must be from 1 to the catalog's {catalog_size} items"
        )
    if not 0 <= config.max_recall_drop <= 1:
        raise UserError(f"--max-recall-drop {config.max_recall_drop}: expected a share from 0 to 1")
    if config.human_sample is not None and config.human_sample < 1:
        raise UserError(f"--human-sample {config.human_sample}: must be at least 1")
    if config.merge_budget is not None and config.merge_budget < 1:
        raise UserError(f"--merge-budget {config.merge_budget}: must be at least 1")


def _check_judge(config: EvalConfig) -> None:
    check_asking(config)
    if config.judge is not None:
        split_judge(config.judge)
    if config.human is not None and config.judge is None:
        raise UserError("--human: corrects a judge's figures; give the judge too, with --judge")
    if config.human_threshold is not None:
        if config.human is None:
            raise UserError("--human-threshold: is about people's scores; give these too, with --human")
        check_threshold(config.human_threshold, "--human-threshold")
    if config.recall_of not in RECALLS:
        raise UserError(f"--recall-of {config.recall_of}: unknown; choose from {', '.join(RECALLS)}")
    if config.recall_of == "known" and config.judge is None:
        raise UserError("--recall-of known counts what a judge calls relevant: it needs --judge")


def named_model(given: str) -> tuple[str, str]:
    """Name and path of "NAME=MODEL", or of a bare path, which is called as its folder is."""
    return _apart(given) if "=" in given and not Path(given).exists() else (Path(given).resolve().name, given)


def _apart(given: str) -> tuple[str, str]:
    name, _, path = given.partition("=")
    return name, path


_TWICE = "the name {!r} is given twice; give another, as NAME=PATH"


def _named(option: str, values: list[tuple[str, str, str]]) -> dict[str, str]:
    """Paths by name, from what was given with its name and its path."""
    named: dict[str, str] = {}
    for value, name, path in values:
        if not name or not path:
            raise UserError(f"{option} {value}: expected NAME=PATH")
        _check_name(f"{option} {value}", name)
        if name in named:
            raise UserError(f"{option} {value}: {_TWICE.format(name)}")
        named[name] = path
    return named


def _check_name(given: str, name: str) -> None:
    if "/" in name or name.startswith("."):
        raise UserError(f"{given}: the name {name!r} cannot be a file name; give another, as NAME=PATH")
    if any(letter.isspace() for letter in name):
        raise UserError(
            f"{given}: the name {name!r} holds a space, which run files cannot; give another, as NAME=PATH"
        )


def _expanded(models: dict[str, str]) -> dict[str, str]:
    """Models with each folder of several MODEL folders replaced by those, named NAME-FOLDER.

    Raises:
        UserError: two get the same name.
    """
    found: dict[str, str] = {}
    for name, path in models.items():
        folders = [part.parent for part in sorted(Path(path).glob("*/modules.json"))]
        # What a kill left is no model yet; an artifact is none of several models.
        folders = [f for f in folders if f.suffix != ".partial" and not f.name.startswith(".")]
        inside = {f"{name}-{folder.name}": str(folder) for folder in folders}
        if not inside or (Path(path) / "modules.json").is_file() or (Path(path) / MANIFEST).is_file():
            inside = {name: path}
        for inner, folder in inside.items():
            _check_name(f"--model {name}={folder}", inner)
        twice = inside.keys() & found.keys()
        if twice:
            raise UserError(f"--model {name}={path}: {_TWICE.format(min(twice))}")
        found |= inside
    return found
