"""What is said of a step: its line in the log, and a warning where hardly any state has a label."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from novelret.train.batches import top_items
from novelret.train.config import LIST_OBJECTIVES
from novelret.train.log import Line
from novelret.train.panel import peak_memory
from novelret.train.run import Run
from novelret.train.states import FEEDBACK, SOURCES, Batch
from novelret.train.step_loss import StepLoss

_ENTROPY_QUERIES = 16
_LEAST_LABELLED = 0.01


@dataclass
class Labelled:
    """How many of the states drawn before the first validation have a label; they stand for the rest."""

    drawn: float = 0.0
    known: float = 0.0
    is_told: bool = False

    def count(self, loss: StepLoss) -> None:
        """Add the states of a step."""
        self.drawn += loss.drawn
        self.known += loss.known

    def warn(self, run: Run) -> None:
        """Say so, once, if hardly any has."""
        is_second = run.validation is None and run.config.validation_fraction > 0  # the first has said it
        if not (self.is_told or is_second) and self.known < _LEAST_LABELLED * self.drawn:
            others = ", draw what is labelled (--draw queries)" if run.config.draw == "plain" else ""
            if run.config.objective == "pg-ret":
                others += ", or pass --judge"
            run.report.warn(
                f"only {self.known / self.drawn:.2%} of the sampled states have a label; the others teach "
                f"nothing. Label more of what is drawn{others}"
            )
        self.is_told = True


def log_line(run: Run, batch: Batch, loss: StepLoss, norm: float, step: int, *, over_catalog: bool) -> Line:
    """What log.jsonl holds of a step; every process has to call it.

    Args:
        run: the run.
        batch: of the step.
        loss: of the step.
        norm: of its gradient.
        step: its number, from 0.
        over_catalog: whether with the figures that take a pass over the catalog.
    """
    config = run.config
    if config.objective in LIST_OBJECTIVES:  # each process knows the rewards of the lists it drew
        count, size = len(batch.queries), run.processes.size
        order = np.concatenate([np.arange(rank, count, size) for rank in range(size)])
        batch.rewards[order] = run.processes.concatenate(batch.rewards[run.processes.share(count)])
    line = _shares(batch)
    known = batch.rewards[(batch.sources != FEEDBACK) & ~np.isnan(batch.rewards)]  # pairs are not rewarded
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
        "learning_rate": config.learning_rate_at(step),
        **(_policy_figures(run, batch, step) if over_catalog else {}),
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
        embeddings = run.embed(mine, step)
        excluded = run.material.split.excluded.tensor(mine, embeddings.device)
        entropies = run.items.entropy(embeddings, run.config.temperature, excluded)
        values = run.processes.concatenate(entropies.double().cpu().numpy())
        figures: Line = {"entropy": round(float(values.mean()), 4)}
        if run.config.support is not None:
            tau = run.config.sampling_temperature
            log_z = run.items.log_partition(embeddings, tau, excluded)
            _, scores = top_items(run, embeddings, mine)
            covered = torch.exp(torch.logsumexp(scores / tau, dim=1) - log_z).clamp(max=1)
            shares = run.processes.concatenate(covered.double().cpu().numpy())
            figures["covered"] = round(float(shares.mean()), 4)
    return figures
