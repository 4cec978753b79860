"""`novelret train`: finetune the query encoder of a deployed retriever against its frozen items.

MODEL/
  modules.json, …       the finetuned query encoder, a sentence-transformers folder
  README.md             model card
  manifest.json         what it was made from, and what was chosen
  config.yaml           the settings, as `--config` takes them
  log.jsonl             one line every so many steps; tensorboard/ holds the same
  refit/                the same of the second training, on all queries
  validation.json       every validated point
  frontier.parquet      the same as a table; frontier.svg and curves.svg show the best
  checkpoints/step-N/   the best checkpoints (--keep)
  judgements.parquet    what was asked during training (--judge)
  queries.npy           hashes of the queries that were trained on or held back to choose by, here or in what
                        --init names, so that eval can tell; held_back.npy of those that only chose,
                        mirrored.npy of items that served as queries
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from novelret import encode
from novelret.artifacts import MANIFEST, check_output, fingerprint_of, open_output, partial_of
from novelret.errors import UserError
from novelret.label.judge import make_judge, split_judge
from novelret.progress import Reporter
from novelret.train.choice import say_choice
from novelret.train.config import TrainConfig
from novelret.train.judging import Judging
from novelret.train.log import check_wandb
from novelret.train.loop import Diverged, run_steps
from novelret.train.matrix import ItemMatrix, open_matrix
from novelret.train.points import validate_blends
from novelret.train.prepare import Inputs, Prepared, open_inputs, prepare
from novelret.train.processes import Processes, join
from novelret.train.run import Run
from novelret.train.validation import Point, best_first, steps_to_keep
from novelret.train.write import REFIT, drop_resumables, read_points, write_model, write_points

_NOT_IDENTITY = ("data", "index", "labels", "init", "store", "device", "log_every", "micro_batch", "wandb")
_NOT_IDENTITY_OF_JUDGE = ("concurrency", "timeout", "rpm", "tpm", "max_requests", "max_cost", "price")
_LEAST_SHARE = 0.05  # of all queries; fewer teach too little for a second training


@dataclass(frozen=True)
class Trained:
    """What a run gave.

    Attributes:
        folder: the MODEL folder.
        chosen: the validation point of the saved weights; None without validation queries.
        points: every validation point, step 0 (the start) first.
    """

    folder: Path
    chosen: Point | None
    points: list[Point]


def train_model(
    config: TrainConfig, out: Path, *, force: bool = False, report: Reporter | None = None
) -> Trained:
    """Run a training and write the MODEL artifact; goes on from the last validation when it was killed.

    Under `torchrun`, all processes train together and the first one writes.

    Raises:
        UserError: unusable settings, data, labels or output; a loss that is no number before anything was
            validated; a device that is too small.
    """
    read = (*config.indexes, *config.label_folders, config.init or "", config.judge or "")
    check_output(out, force=force, kind="model", inputs=read)
    check_wandb(config.wandb)
    if config.judge is not None:
        _check_judge(config)
    with join(encode.pick_device(config.device)) as processes:
        report = (report if processes.is_first else None) or Reporter()
        try:
            points = _train(config, out, processes, force=force, report=report)
        except torch.OutOfMemoryError as error:
            raise UserError(_too_small(config, processes)) from error
    order = best_first(points, config.max_recall_drop)
    return Trained(out, order[0] if order else None, points)


def _train(
    config: TrainConfig, out: Path, processes: Processes, *, force: bool, report: Reporter
) -> list[Point]:
    """Train, choose, train anew on all queries where that is wanted, and write what came of it."""
    inputs = open_inputs(config, processes, report)
    # Before there is any output: what is found wrong here leaves nothing behind.
    prepared = prepare(config, inputs, config.validation_fraction, processes, report)
    items = open_matrix(inputs.indexes[0].embeddings, processes.device, report)
    output: AbstractContextManager[Path] = nullcontext(partial_of(out))
    if processes.is_first:
        settings = _identity(config, inputs.fingerprints)
        output = open_output(out, fingerprint_of(settings), force=force, settings=settings)
    with output as folder:
        processes.wait()
        # A run that was killed may have chosen already, or even have written all there is.
        is_written = (folder / MANIFEST).is_file()
        if is_written or (folder / REFIT).is_dir():
            points = read_points(folder)
        else:
            points = _search(config, inputs, prepared, items, folder, processes, report)
        share = prepared.held_back / len(inputs.split)
        del prepared  # a whole encoder, perhaps
        if not is_written and _is_worth_refitting(config, points, share):
            _refit(config, inputs, items, points, folder, processes, report)
        processes.wait()  # until all have seen what there is
        if processes.is_first:
            drop_resumables(folder)
    processes.wait()
    return points


def _search(
    config: TrainConfig,
    inputs: Inputs,
    prepared: Prepared,
    items: ItemMatrix,
    folder: Path,
    processes: Processes,
    report: Reporter,
) -> list[Point]:
    """Train while some queries are held back, and see on these which weights are best; writes them.

    Of weights that will be trained anew only the points are written.
    """
    judging = None
    if config.judge is not None:
        # Items that serve as queries have the ids of others, and nothing is asked of them.
        material = prepared.material
        asked = material.split.subset(np.arange(material.real))
        judging = Judging(config, inputs.indexes[0], asked, folder, processes, report)
    run = Run(
        config, prepared.tower, prepared.material, prepared.validation, inputs.indexes[0], items, folder,
        processes, judging, report,
    )  # fmt: skip
    try:
        points, steps = run_steps(run)
        validate_blends(run, points, steps)
        spent = judging.finish() if judging is not None else None
    finally:
        if judging is not None:
            judging.close()  # while the folder is locked: a step asked ahead still writes there
    if processes.is_first:
        write_points(folder, points)
        if points:
            say_choice(
                best_first(points, config.max_recall_drop)[0], points, prepared.held_back, config, report
            )
        if _is_worth_refitting(config, points, prepared.held_back / len(inputs.split)):
            (folder / REFIT).mkdir()
        else:
            write_model(config, run, folder, inputs, points, steps, spent)
    return points


def _refit(
    config: TrainConfig,
    inputs: Inputs,
    items: ItemMatrix,
    points: list[Point],
    folder: Path,
    processes: Processes,
    report: Reporter,
) -> None:
    """Train the chosen weights anew on all queries, the held-back ones too, and write them.

    What was held back has done its work once the weights are chosen: which step, how far from the start and
    how much of a memory. The same settings, with those queries and their labels, give a better model.
    """
    processes.wait()  # for its folder
    kept = steps_to_keep(points, config.max_recall_drop, config.keep)
    report.note(f"training anew on all {len(inputs.split):,} queries, for {max(kept)} steps")
    prepared = prepare(config, inputs, 0.0, processes, Reporter())  # what it has to say was said before
    run = Run(
        replace(config, wandb=None), prepared.tower, prepared.material, None, inputs.indexes[0], items,
        folder / REFIT, processes, None, report,
    )  # fmt: skip
    try:
        run_steps(run, max(kept), kept)
    except Diverged as diverged:
        report.warn(
            f"{diverged}, in the training on all queries; the model is the one that was chosen, which saw "
            "none of the held-back queries"
        )
        run = _run_before(config, inputs, items, folder, processes)
    if processes.is_first:
        steps = max(point.step for point in points)
        write_model(config, run, folder, inputs, points, steps, None)


def _run_before(
    config: TrainConfig, inputs: Inputs, items: ItemMatrix, folder: Path, processes: Processes
) -> Run:
    """The run whose weights were chosen, which lie in the folder still."""
    report = Reporter()
    prepared = prepare(config, inputs, config.validation_fraction, processes, report)
    return Run(
        config, prepared.tower, prepared.material, prepared.validation, inputs.indexes[0], items, folder,
        processes, None, report,
    )  # fmt: skip


def _is_worth_refitting(config: TrainConfig, points: list[Point], share: float) -> bool:
    """Whether some weights were chosen on queries, a notable `share`, that can be trained on as well."""
    if not config.refit or config.judge is not None or share < _LEAST_SHARE:
        return False
    return any(steps_to_keep(points, config.max_recall_drop, config.keep))  # step 0 is the start


def _too_small(config: TrainConfig, processes: Processes) -> str:
    part = config.micro_batch or -(-config.batch_size // processes.size)
    less = [f"--micro-batch {max(1, part // 4)} (the same run goes on with it)"]
    if config.tune in ("full", "lora"):
        less += [f"{flag} (a new run)" for flag in ("--precision bf16", "--gradient-checkpointing")]
    return f"{processes.device}: its memory is too small; pass {', '.join(less)}, or use torchrun"


def _check_judge(config: TrainConfig) -> None:
    """Refuse, before any work, a judge that cannot answer during training."""
    kind, _ = split_judge(str(config.judge))
    if kind == "openai-batch":
        raise UserError(
            f"--judge {config.judge}: batches are answered too late for training; use openai:MODEL"
        )
    if kind == "openai":
        make_judge(str(config.judge), config)  # a missing key, a bad prompt or price


def _identity(config: TrainConfig, inputs: dict[str, str]) -> dict[str, Any]:
    """What decides the result; a run is resumed only with the same."""
    left_out = _NOT_IDENTITY + _NOT_IDENTITY_OF_JUDGE
    return {name: value for name, value in asdict(config).items() if name not in left_out} | inputs
