"""The training loop: steps, log lines, validations, and a place to resume from after each validation.

A plain loop instead of a trainer framework: the batch of a step is a function of (seed, step), items are
never encoded, and what a checkpoint is worth is a ranking on held-back queries. Several processes hold equal
weights: each embeds its share of the batch, and gradients are summed, as losses are sums over the batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable

import torch

from novelret.errors import UserError
from novelret.train import checkpoint
from novelret.train.batches import Batches
from novelret.train.choice import say_budget
from novelret.train.log import Line, Log
from novelret.train.panel import Panel, training_panel
from novelret.train.points import add_point
from novelret.train.run import Run
from novelret.train.states import Batch, with_more_labels
from novelret.train.step import batch_loss
from novelret.train.step_figures import Labelled, log_line
from novelret.train.step_loss import StepLoss
from novelret.train.validation import Point, judged_top, left_for_good, steps_to_keep


def run_steps(run: Run, last: int | None = None, kept: Iterable[int] = ()) -> tuple[list[Point], int]:
    """Train; the validation points and the number of steps done, fewer than asked for on an early stop.

    Args:
        run: goes on from its last save, if there is one.
        last: the step after which to stop; by default the schedule's last one.
        kept: steps whose weights are kept whatever they are worth; they have to be ones that are saved.

    Raises:
        UserError: a loss that is no number before anything was validated.
        Diverged: one in a second training, which validates nothing.
    """
    config, processes = run.config, run.processes
    last = config.steps if last is None else last
    wanted = {0, *kept}  # blends start from step 0
    parameters = [p for p in run.tower.module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=config.peak_learning_rate,
        weight_decay=config.weight_decay,
        fused=True,  # one pass over weights and moments, of which a memory has millions
    )
    scaler = torch.amp.GradScaler(processes.device.split(":")[0], enabled=config.precision == "fp16")
    points, first = _start(run, optimizer, scaler, last, wanted)
    batches, labelled = Batches(run), Labelled()
    with training_panel(config, last, run.report) as panel, _Logs(run, first, panel) as logs:
        panel.advance(first)
        panel.show_points(points)
        for step in range(first, last):
            if left_for_good(points, config.max_recall_drop, config.patience):
                run.report.warn(
                    f"stopped at step {step}: recall left the budget {config.patience} validations ago and "
                    "still falls (--patience)"
                )
                return points, step
            began = time.perf_counter()
            try:
                batch, loss, norm = _step(run, batches, parameters, optimizer, scaler, step)
            except Diverged as diverged:
                return points, _last_sound(points, diverged, run)
            took = time.perf_counter() - began
            labelled.count(loss)
            is_validated = (step + 1) % config.steps_between_validations == 0 or step + 1 == last
            if step % config.log_every == 0 or is_validated:
                # Validation passes over the catalog anyway; for each line that would cost more than its step.
                line = log_line(run, batch, loss, norm, step, over_catalog=step == 0 or is_validated)
                logs.line(line | {"step_time": round(took, 5)})
            panel.advance(1)
            if is_validated:
                labelled.warn(run)
                if run.judging is not None and (fresh := run.judging.take_fresh()) is not None:
                    run.material = with_more_labels(run.material, fresh)
                if run.validation is not None:
                    add_point(run, points, step + 1)
                    logs.points(points)
                _save(run, optimizer, scaler, points, step + 1, wanted)
    return points, last


def _start(
    run: Run, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, last: int, wanted: set[int]
) -> tuple[list[Point], int]:
    """Take up the last save, or validate and save the start; the points so far and the steps done."""
    processes = run.processes
    if processes.is_first:
        (run.folder / "resume").mkdir(exist_ok=True)
    processes.wait()
    points, first = checkpoint.load(run.tower, optimizer, scaler, run.folder)
    scaler.scale(torch.zeros((), device=processes.device))  # it unscales only after it has scaled
    if run.judging is not None:
        run.material = with_more_labels(run.material, run.judging.forget_after(first))
    if first:
        run.report.note(f"going on at step {first} of {last}")
    elif not points:
        if run.validation is not None:
            add_point(run, points, 0)
        _save(run, optimizer, scaler, points, 0, wanted)
    if run.validation is not None:
        judged = processes.concatenate(judged_top(run.validation))
        say_budget(points[0], float(judged.mean()), run.config, run.report)
    return points, first


class _Logs:
    """Log files and panel; only the first process has any."""

    def __init__(self, run: Run, first: int, panel: Panel) -> None:
        self.panel = panel
        is_first = run.processes.is_first
        self.log = Log(run.folder, first, run.config.wandb, vars(run.config)) if is_first else None

    def line(self, line: Line) -> None:
        if self.log is not None:
            self.log(line)
        self.panel.show_line(line)

    def points(self, points: list[Point]) -> None:
        if self.log is not None:
            point = points[-1]
            figures = {
                "novelty": point.novelty,
                "relevant_novel": point.relevant_novel,
                "recall": point.recall,
            }
            self.log.also({"step": point.step} | {f"held-back/{name}": x for name, x in figures.items()})
        self.panel.show_points(points)

    def __enter__(self) -> _Logs:
        return self

    def __exit__(self, *error: object) -> None:
        if self.log is not None:
            self.log.__exit__(*error)  # type: ignore[arg-type]


def _step(
    run: Run,
    batches: Batches,
    parameters: list[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    step: int,
) -> tuple[Batch, StepLoss, float]:
    """One optimizer step; micro-batches and processes add up to the same loss and gradient."""
    config, processes = run.config, run.processes
    mine = processes.share(config.batch_size)
    most = -(-config.batch_size // processes.size)
    size = config.micro_batch or most
    total = StepLoss.nothing()
    embeddings = None
    if size >= most and run.judging is None:
        batch, embeddings = batches.embedded(step)
    else:
        batch = batches.at(step)
    for start in range(0, most, size):
        here = mine[start : start + size]
        if embeddings is None or start:
            embeddings = run.embed(batch.queries_of(here), step)
        part = batch_loss(embeddings, here, batch, run.material, config, run.items, step)
        if part.loss.requires_grad:
            scaler.scale(part.loss).backward()
        total = total + part.detached()
    total = StepLoss.from_tensor(processes.sum(total.as_tensor(processes.device)))
    if not math.isfinite(total.loss.item()):
        raise Diverged(f"step {step}: the loss is {total.loss.item()}")
    processes.sum_gradients(parameters)
    if all(parameter.grad is None for parameter in parameters):  # no state of the batch had a reward
        return batch, total, 0.0
    scaler.unscale_(optimizer)
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm))
    if not math.isfinite(norm) and not scaler.is_enabled():  # a scaler skips the step and lowers its scale
        raise Diverged(f"step {step}: the gradient is no number")
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate_at(step)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return batch, total, norm


class Diverged(Exception):
    """A loss or a gradient that is no number; in all processes at once, as they sum both."""


def _last_sound(points: list[Point], diverged: Diverged, run: Run) -> int:
    """The last validated step, from whose weights and those before a model can still be chosen.

    Raises:
        UserError: there is none.
        Diverged: in a second training.
    """
    remedy = "Lower --learning-rate or raise --temperature"
    if run.validation is None and run.config.validation_fraction > 0:
        raise diverged  # in a second training: what came of the first one is there
    if len(points) < 2:  # the first is of the start
        raise UserError(
            f"{diverged}, and nothing was validated before. {remedy}, with --force to drop this run"
        )
    last = points[-1].step
    run.report.warn(f"{diverged}; training stops there, the steps up to {last} are chosen from. {remedy}")
    return last


def _save(
    run: Run,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    points: list[Point],
    step: int,
    wanted: set[int],
) -> None:
    if run.processes.is_first:
        wanted = wanted | steps_to_keep(points, run.config.max_recall_drop, run.config.keep)
        checkpoint.save(run.tower, optimizer, scaler.state_dict(), run.folder, points, step, wanted)
    run.processes.wait()
