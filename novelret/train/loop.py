"""The training loop: steps, log lines, validations, and a place to resume from after each validation.

A plain loop instead of a trainer framework: the batch of a step is a function of (seed, step), items are
never encoded, and what a checkpoint is worth is a ranking on held-back queries. Several processes hold equal
weights: each embeds its share of the batch, and gradients are summed, as losses are sums over the batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from novelret.errors import UserError
from novelret.index import Index
from novelret.progress import Reporter
from novelret.train import checkpoint
from novelret.train.choice import say_budget
from novelret.train.config import LIST_OBJECTIVES, TrainConfig
from novelret.train.judging import Judging
from novelret.train.log import Line, Log
from novelret.train.matrix import ItemMatrix
from novelret.train.panel import Panel, peak_memory, training_panel
from novelret.train.processes import Processes
from novelret.train.sampler import Key, draw_from_top
from novelret.train.states import POLICY, SOURCES, Batch, Material, draw_batch, with_more_labels
from novelret.train.step import StepLoss, batch_loss
from novelret.train.tower import Tower
from novelret.train.validation import (
    Point,
    Validation,
    best_first,
    judged_top,
    left_for_good,
    make_point,
    measure,
)

_ENTROPY_QUERIES = 16
_LEAST_LABELLED = 0.01
_MEMORY_SHARES = (0.5, 0.25, 0.1)


@dataclass
class Run:
    """What a training run works with.

    Attributes:
        config: the settings.
        tower: the part that is trained.
        material: what states are drawn from; grows where a judge is asked.
        validation: this process's share of the held-back queries; None where none are.
        index: the deployed index that is finetuned against.
        items: its item matrix.
        folder: the MODEL folder in the making.
        processes: who trains.
        judging: asks about unlabelled states; None without a judge.
        report: told of what matters.
    """

    config: TrainConfig
    tower: Tower
    material: Material
    validation: Validation | None
    index: Index
    items: ItemMatrix
    folder: Path
    processes: Processes
    judging: Judging | None
    report: Reporter


def run_steps(run: Run, last: int | None = None, kept: Iterable[int] = ()) -> tuple[list[Point], int]:
    """Train; the validation points and the number of steps done, fewer than asked for on an early stop.

    Args:
        run: goes on from its last save, if there is one.
        last: the step after which to stop; by default the schedule's last one.
        kept: steps whose weights are kept whatever they are worth; they have to be ones that are saved.

    Raises:
        UserError: a loss that is no number; no state has a reward.
    """
    config, processes = run.config, run.processes
    last = config.steps if last is None else last
    wanted = {0, *kept}  # blends start from step 0
    parameters = [p for p in run.tower.module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.peak_learning_rate, weight_decay=config.weight_decay)
    scaler = torch.amp.GradScaler(processes.device.split(":")[0], enabled=config.precision == "fp16")
    points, first = _start(run, optimizer, scaler, last, wanted)
    states, labelled = _States(run), _Labelled()
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
            batch, loss, norm = _step(run, states, parameters, optimizer, scaler, step)
            labelled.count(loss)
            is_last = step + 1 == last
            if step % config.log_every == 0 or is_last:
                line = _log_line(run, batch, loss, norm, step)
                logs.line(line | {"step_time": round(time.perf_counter() - began, 5)})
            panel.advance(1)
            if (step + 1) % config.steps_between_validations == 0 or is_last:
                labelled.warn(run)
                if run.judging is not None and (fresh := run.judging.take_fresh()) is not None:
                    run.material = with_more_labels(run.material, fresh)
                if run.validation is not None:
                    _validate(run, points, step + 1)
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
            _validate(run, points, 0)
        _save(run, optimizer, scaler, points, 0, wanted)
    if run.validation is not None:
        say_budget(points[0], judged_top(run.validation), run.config, run.report)
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


class _States:
    """The batches of steps; with a judge, the next one is drawn ahead and asked about meanwhile."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.ahead: dict[int, Batch] = {}

    def at(self, step: int) -> Batch:
        """A batch that is drawn before it is embedded, with the rewards that are known by then."""
        run = self.run
        batch = self.ahead.pop(step) if step in self.ahead else self._draw(step)
        if run.judging is None:
            return batch
        every = run.config.steps_between_validations
        # Never beyond a validation: a run resumes there, with the weights of that moment.
        if (step + 1) % every and step + 1 < run.config.steps:
            self.ahead[step + 1] = self._draw(step + 1)
        answers = run.judging.answers(step)
        unknown = np.flatnonzero(np.isnan(batch.rewards) & (batch.items >= 0))
        rewards = batch.rewards.copy()
        rewards[unknown] = run.material.rewards(batch.queries[unknown], batch.items[unknown], answers)
        return replace(batch, rewards=rewards)

    def _draw(self, step: int) -> Batch:
        run = self.run
        batch = draw_batch(run.material, run.config, step)
        if not _has_policy_states(batch, run.config):
            return batch
        mine = batch.states_of(run.processes.share(run.config.batch_size))
        places = mine[batch.sources[mine] == POLICY]
        with torch.no_grad():
            batch = _draw_from_policy(run, batch, _embed(run, batch.queries[places], step), places, step)
        if run.judging is not None:
            unknown = np.flatnonzero((batch.sources == POLICY) & np.isnan(batch.rewards))
            run.judging.ask(step, batch.queries[unknown], batch.items[unknown])
        return batch


def _has_policy_states(batch: Batch, config: TrainConfig) -> bool:
    return config.objective not in LIST_OBJECTIVES and bool((batch.sources == POLICY).any())


@torch.no_grad()
def _draw_from_policy(
    run: Run, batch: Batch, embeddings: torch.Tensor, places: np.ndarray, step: int
) -> Batch:
    """Give the α share its items, drawn from the policy as it is now, and their rewards.

    Args:
        run: the run.
        batch: with policy states that have no item.
        embeddings: (p, d) of this process's policy states.
        places: (p,) int64, where these stand in the batch.
        step: part of the key of the draws.
    """
    config, processes = run.config, run.processes
    key = Key(config.seed, step, torch.from_numpy(places).to(embeddings.device))
    excluded = run.material.split.excluded[batch.queries[places]]
    tau = config.sampling_temperature
    if config.support is None:
        left_out = torch.from_numpy(excluded).to(embeddings.device)
        draw = run.items.draw(embeddings, 1, key, tau, left_out, replacement=True)
    else:
        draw, _ = draw_from_top(*_top(run, embeddings, excluded), 1, key, tau)
    drawn = np.stack([places, draw.rows[:, 0].cpu().numpy()], axis=1)
    order, rows = processes.concatenate(drawn).T
    items, rewards = batch.items.copy(), batch.rewards.copy()
    items[order] = rows
    rewards[order] = run.material.rewards(batch.queries[order], items[order])
    return replace(batch, items=items, rewards=rewards, trust=run.material.trust_of(batch.queries, items))


def _embed(run: Run, queries: np.ndarray, step: int) -> torch.Tensor:
    if len(queries) == 0:
        return torch.zeros((0, run.index.dimension), device=run.processes.device)
    return run.tower.embed(queries, step)


def _top(run: Run, embeddings: torch.Tensor, excluded: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    assert run.config.support is not None
    found = run.index.search(
        embeddings.cpu().numpy(), run.config.support, excluded, device=run.processes.device
    )
    rows, scores = (torch.from_numpy(array).to(embeddings.device) for array in found)
    return rows, scores.to(embeddings.dtype)


def _step(
    run: Run,
    states: _States,
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
        # One forward pass serves both to draw from the policy and to train it.
        batch = draw_batch(run.material, config, step)
        embeddings = _embed(run, batch.queries_of(mine), step)
        if _has_policy_states(batch, config):
            states_here = batch.states_of(mine)
            places = states_here[batch.sources[states_here] == POLICY]
            chosen = np.searchsorted(mine, batch.passes[places])
            detached = embeddings.detach()[torch.from_numpy(chosen)]
            batch = _draw_from_policy(run, batch, detached, places, step)
    else:
        batch = states.at(step)
    for start in range(0, most, size):
        here = mine[start : start + size]
        if embeddings is None or start:
            embeddings = _embed(run, batch.queries_of(here), step)
        part = batch_loss(embeddings, here, batch, run.material, config, run.items, step)
        if part.loss.requires_grad:
            scaler.scale(part.loss).backward()
        total = total + part.detached()
    total = StepLoss.from_tensor(processes.sum(total.as_tensor(processes.device)))
    if not math.isfinite(total.loss.item()):
        raise UserError(
            f"step {step}: the loss is {total.loss.item()}; the last validated checkpoint is kept. "
            "Lower --learning-rate or raise --temperature"
        )
    processes.sum_gradients(parameters)
    if all(parameter.grad is None for parameter in parameters):  # no state of the batch had a reward
        return batch, total, 0.0
    scaler.unscale_(optimizer)
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm))
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return batch, total, norm


def steps_to_keep(points: list[Point], config: TrainConfig) -> set[int]:
    """The steps whose weights the chosen point and those of `keep` are made of; none without points."""
    best = best_first(points, config.max_recall_drop)[: max(1, config.keep)]
    return {point.step for point in best}


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear rise over the warm-up steps, then the schedule's fall: a function of the step alone."""
    rise = max(1, round(config.warmup * config.steps))
    if step < rise:
        return config.peak_learning_rate * (step + 1) / rise
    done = (step - rise) / max(1, config.steps - rise)
    scale = {"linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "constant": 1.0}
    return config.peak_learning_rate * scale[config.schedule]


def _validate(run: Run, points: list[Point], step: int, share: float = 1.0, memory: float = 1.0) -> None:
    assert run.validation is not None
    figures = measure(run.validation, run.tower.embed_validation(), run.index, run.processes.device)
    points.append(make_point(step, run.processes.concatenate(figures), share, memory))


def validate_blends(run: Run, points: list[Point], step: int) -> None:
    """Add points on the line from the starting weights to those of the last step.

    Weights between two models are often better than either at what both can do (Wortsman et al., 2022):
    here they trade recall for novelty far better than stopping earlier does. Where they hold a memory, the
    line is followed with less of it as well: how far a query is to be moved by queries like it differs
    between data sets, and a memory that was trained at every share needs no second training for that.
    """
    if run.validation is None or step == 0:
        return
    line = [part / run.config.blends for part in range(1, run.config.blends)]
    blends = [(share, 1.0) for share in line]
    if line and run.tower.memory is not None:
        blends += [(share, memory) for memory in _MEMORY_SHARES for share in (*line, 1.0)]
    with run.report.bar("validating blends", len(blends)) as advance:
        for share, memory in blends:
            checkpoint.load_weights(run.tower, run.folder, step, share, memory)
            _validate(run, points, step, share, memory)
            advance(1)


def _save(
    run: Run,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    points: list[Point],
    step: int,
    wanted: set[int],
) -> None:
    if run.processes.is_first:
        wanted = wanted | steps_to_keep(points, run.config)
        checkpoint.save(run.tower, optimizer, scaler.state_dict(), run.folder, points, step, wanted)
    run.processes.wait()


@dataclass
class _Labelled:
    """How many of the states drawn before the first validation have a label; they stand for the rest."""

    drawn: float = 0.0
    known: float = 0.0
    is_told: bool = False

    def count(self, loss: StepLoss) -> None:
        self.drawn += loss.drawn
        self.known += loss.known

    def warn(self, run: Run) -> None:
        """Say so, once, if hardly any has."""
        if not self.is_told and self.known < _LEAST_LABELLED * self.drawn:
            run.report.warn(
                f"only {self.known / self.drawn:.2%} of the sampled states have a label; the others teach "
                "nothing. Label more of what is drawn, draw what is labelled (--draw queries), or pass "
                "--judge"
            )
        self.is_told = True


def _log_line(run: Run, batch: Batch, loss: StepLoss, norm: float, step: int) -> Line:
    config = run.config
    if config.objective in LIST_OBJECTIVES:  # each process knows the rewards of the lists it drew
        count, size = len(batch.queries), run.processes.size
        order = np.concatenate([np.arange(rank, count, size) for rank in range(size)])
        batch.rewards[order] = run.processes.concatenate(batch.rewards[run.processes.share(count)])
    line = _shares(batch)
    known = batch.rewards[~np.isnan(batch.rewards)]
    result: Line = {
        "step": step + 1,
        "loss": round(loss.loss.item(), 6),
        "loss/feedback": round(loss.feedback, 6),
        "loss/states": round(loss.states, 6),
        "reward": round(float(known.mean()), 4) if len(known) else None,
        "reward_std": round(float(known.std()), 4) if len(known) else None,
        **line,
        "labelled": round(loss.known / loss.drawn, 4) if loss.drawn else None,
        "grad_norm": round(norm, 6) if math.isfinite(norm) else None,  # fp16 overflow: the step is skipped
        "learning_rate": learning_rate(config, step),
        **_policy_figures(run, batch, step),
        "memory_gb": round(peak_memory(), 3),
    }
    if run.judging is not None:
        result["judgements"] = run.judging.spent["requests"]
    return result


def _shares(batch: Batch) -> Line:
    """Of each source's states, the share with a reward that is not 0 and the share without a label."""
    shares = {}
    known = ~np.isnan(batch.rewards)
    for source, name in enumerate(SOURCES):
        of_source = batch.sources == source
        if of_source.any():
            rewarded = known & of_source & (np.nan_to_num(batch.rewards) != 0)
            shares[f"rewarded/{name}"] = round(float(rewarded.sum() / of_source.sum()), 4)
            shares[f"unknown/{name}"] = round(float((~known & of_source).sum() / of_source.sum()), 4)
    return shares


def _policy_figures(run: Run, batch: Batch, step: int) -> Line:
    """Mean entropy of the policy over the whole catalog, in nats, on a few of the batch's queries.

    Where draws keep to the top items, also the mean share of the policy's mass that these cover.
    """
    some = batch.queries[:: max(1, len(batch.queries) // _ENTROPY_QUERIES)][:_ENTROPY_QUERIES]
    mine = some[run.processes.share(len(some))]
    with torch.no_grad():
        embeddings = _embed(run, mine, step)
        left_out = run.material.split.excluded[mine]
        excluded = torch.from_numpy(left_out).to(embeddings.device)
        entropies = run.items.entropy(embeddings, run.config.temperature, excluded)
        values = run.processes.concatenate(entropies.double().cpu().numpy())
        figures: Line = {"entropy": round(float(values.mean()), 4)}
        if run.config.support is not None:
            tau = run.config.sampling_temperature
            log_z = run.items.log_partition(embeddings, tau, excluded)
            _, scores = _top(run, embeddings, left_out)
            covered = torch.exp(torch.logsumexp(scores / tau, dim=1) - log_z).clamp(max=1)
            shares = run.processes.concatenate(covered.double().cpu().numpy())
            figures["covered"] = round(float(shares.mean()), 4)
    return figures
