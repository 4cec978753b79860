"""The MODEL artifact, from the weights that a run has kept."""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from novelret import encode
from novelret.artifacts import Manifest, read_json, write_config, write_json, write_manifest
from novelret.data.split import Split
from novelret.evaluate.chart import Mark, scatter
from novelret.memory import memory_modules
from novelret.train import checkpoint
from novelret.train.card import model_card
from novelret.train.config import TrainConfig
from novelret.train.curves import curves
from novelret.train.log import read_log
from novelret.train.prepare import Inputs
from novelret.train.run import Run
from novelret.train.states import items_as_queries
from novelret.train.validation import (
    Point,
    best_first,
    held_back_hashes,
    keeps_budget,
    pareto,
    pareto_set,
    worth_showing,
)
from novelret.trained import HELD_BACK, MIRRORED, QUERIES, Training, hash_queries, training_of

REFIT = "refit"
_POINTS = "validation.json"


def write_model(
    config: TrainConfig,
    run: Run,
    folder: Path,
    inputs: Inputs,
    points: list[Point],
    steps: int,
    spent: dict[str, Any] | None,
) -> None:
    """Fill the MODEL folder, which holds logs and validation points already.

    Args:
        config: the settings.
        run: that holds the weights to be saved; in a folder of its own, where it is a second one on all
            queries.
        folder: the MODEL folder, in which the run lies that was validated.
        inputs: what went in.
        points: every validation point.
        steps: how many were done before the choice.
        spent: on a judge.
    """
    judges = inputs.judges
    order = best_first(points, config.max_recall_drop)
    chosen = order[0] if order else None
    _save_checkpoints(run, folder, order[: config.keep])
    if chosen is not None:
        checkpoint.load_weights(run.tower, run.folder, chosen.step, chosen.share, chosen.memory)
    finished = run.tower.finished()
    finished.save(str(folder), create_model_card=False)
    write_config(folder, config)
    start = training_of(Path(config.init)) if config.init else None
    # Held-back queries, too: they chose the weights, which look better on them than on others.
    _save_hashes(folder, QUERIES, inputs.split.query_texts, start)
    _save_held_back(folder, inputs.split, config, start)
    texts = run.material.split.query_texts
    _save_hashes(folder, MIRRORED, [texts[row] for row in items_as_queries(run.material, config)], start)
    is_refit = run.folder != folder and chosen is not None and chosen.step > 0  # the start is no training
    mirrored = inputs.mirror.more if inputs.mirror is not None else 0
    card = model_card(
        config,
        run.index,
        judges,
        points,
        chosen,
        version("novelret"),
        own_modules=encode.has_own_modules(folder),
        has_memory=bool(memory_modules([*finished])),
        is_refit=is_refit,
        mirrored=mirrored,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    picture = curves(read_log(folder), points, config.max_recall_drop)
    (folder / "curves.svg").write_text(picture, encoding="utf-8")
    if chosen is not None:
        _write_frontier(folder, points, chosen, config)
    judged_by = [
        *judges,
        *([config.judge] if config.judge else []),
        *(start.judges if start is not None else []),
    ]
    facts = {
        "steps": steps,
        "chosen": None if chosen is None else asdict(chosen),
        "refit": is_refit,
        "deployed": run.index.manifest.inputs["query_encoder"],
        "checkpoints_refit": run.folder != folder,  # also where the chosen one is the start
        "judges": list(dict.fromkeys(judged_by)),
        "asked": spent,
        "items_as_queries": mirrored,
        "false_positive_rate": run.material.floor,
        "mean_trust": float(run.material.trust.mean()) if len(run.material.trust) else None,
    }
    fingerprint = encode.fingerprint_encoder(finished)
    write_manifest(folder, Manifest("model", asdict(config), inputs.fingerprints, fingerprint, facts))


def _save_hashes(folder: Path, name: str, texts: list[str], start: Training | None) -> None:
    """Write the hashes of texts that went into its training, and of those that went into its start's."""
    parts = [hash_queries(texts), *([] if start is None else [start.hashes(name)])]
    np.save(folder / name, np.unique(np.concatenate(parts)))


def _save_held_back(folder: Path, split: Split, config: TrainConfig, start: Training | None) -> None:
    """Write the hashes of the queries that were held back, and that its start was not trained on either."""
    hashes = held_back_hashes(split, config.validation_fraction, config.seed)
    known = hashes[:0] if start is None else start.trained_on()
    np.save(folder / HELD_BACK, np.setdiff1d(hashes, known))


def drop_resumables(folder: Path) -> None:
    """Delete what a killed run goes on from; with its manifest written it has nothing to go on to."""
    for path in (folder / "resume", folder / REFIT / "resume", folder / "judgements"):
        shutil.rmtree(path, ignore_errors=True)


def write_points(folder: Path, points: list[Point]) -> None:
    """Keep the validation points."""
    write_json(folder / _POINTS, [asdict(point) for point in points])


def read_points(folder: Path) -> list[Point]:
    """The validation points that `write_points` kept."""
    return [Point(**point) for point in read_json(folder / _POINTS)]


def _save_checkpoints(run: Run, folder: Path, points: list[Point]) -> None:
    """Whole encoders of some points; an adapter's frozen files lie once on disk, linked into each."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # of a run that was killed here
    tower = run.tower
    first: Path | None = None
    for point in points:
        checkpoint.load_weights(tower, run.folder, point.step, point.share, point.memory)
        path = folder / "checkpoints" / point.name
        finished = tower.finished()
        if first is None or not tower.frozen:
            finished.save(str(path), create_model_card=False)
            first = path
            continue
        folders = [module["path"] for module in read_json(first / "modules.json")]
        own = dict(list(zip(folders, finished, strict=True))[tower.frozen :])
        shutil.copytree(first, path, copy_function=_link, ignore=shutil.ignore_patterns(*own))
        for place, module in own.items():
            (path / place).mkdir()
            module.save(str(path / place))


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # not every file system can
        shutil.copy2(source, target)


def _write_frontier(folder: Path, points: list[Point], chosen: Point, config: TrainConfig) -> None:
    """Every validated point; drawn are the checkpoints and the best blends, the deployed recall dashed."""
    columns: dict[str, list[Any]] = {
        name: [getattr(point, name) for point in points] for name in Point.__dataclass_fields__
    }
    columns["within_budget"] = [keeps_budget(point, config.max_recall_drop) for point in points]
    columns["pareto"] = pareto(points)
    columns["chosen"] = [point is chosen for point in points]
    pq.write_table(pa.table(columns), folder / "frontier.parquet")
    best = pareto_set(points)
    marks = [
        Mark(point.name, point.recall, point.likely, point in best) for point in worth_showing(points, chosen)
    ]
    length = config.base_depth
    titles = (f"Recall@{length}", f"RelevantNovel@{length}, likely")
    picture = scatter(marks, *titles, line_at=chosen.base_recall)
    (folder / "frontier.svg").write_text(picture, encoding="utf-8")
