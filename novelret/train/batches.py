"""The batches of a run: drawn from its material, with items of the policy as it is, and asked about ahead."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from novelret.train.config import LIST_OBJECTIVES, TrainConfig
from novelret.train.run import Run
from novelret.train.sampler import Key, draw_from_top
from novelret.train.states import POLICY, Batch, draw_batch


class Batches:
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

    def embedded(self, step: int) -> tuple[Batch, torch.Tensor]:
        """A batch and the embeddings of this process's share of its queries.

        One forward pass serves both to draw from the policy and to train it.
        """
        run = self.run
        batch = draw_batch(run.material, run.config, step)
        mine = run.processes.share(run.config.batch_size)
        embeddings = run.embed(batch.queries_of(mine), step)
        if _has_policy_states(batch, run.config):
            places = self._policy_places(batch)
            chosen = np.searchsorted(mine, batch.passes[places])
            drawn_by = embeddings.detach()[torch.from_numpy(chosen)]
            batch = _draw_from_policy(run, batch, drawn_by, places, step)
        return batch, embeddings

    def _draw(self, step: int) -> Batch:
        run = self.run
        batch = draw_batch(run.material, run.config, step)
        if not _has_policy_states(batch, run.config):
            return batch
        places = self._policy_places(batch)
        with torch.no_grad():
            batch = _draw_from_policy(run, batch, run.embed(batch.queries[places], step), places, step)
        if run.judging is not None:
            unknown = np.flatnonzero((batch.sources == POLICY) & np.isnan(batch.rewards))
            run.judging.ask(step, batch.queries[unknown], batch.items[unknown])
        return batch

    def _policy_places(self, batch: Batch) -> np.ndarray:
        """Where this process's policy states stand in the batch."""
        mine = batch.states_of(self.run.processes.share(self.run.config.batch_size))
        return mine[batch.sources[mine] == POLICY]


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
    queries = batch.queries[places]
    tau = config.sampling_temperature
    if config.support is None:
        left_out = run.material.split.excluded.tensor(queries, embeddings.device)
        draw = run.items.draw(embeddings, 1, key, tau, left_out, replacement=True)
    else:
        draw = draw_from_top(*top_items(run, embeddings, queries), 1, key, tau)
    drawn = np.stack([places, draw.rows[:, 0].cpu().numpy()], axis=1)
    order, rows = processes.concatenate(drawn).T
    items, rewards = batch.items.copy(), batch.rewards.copy()
    items[order] = rows
    rewards[order] = run.material.rewards(batch.queries[order], items[order])
    return replace(batch, items=items, rewards=rewards, trust=run.material.trust_of(batch.queries, items))


def top_items(run: Run, embeddings: torch.Tensor, queries: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """The (n, --support) catalog rows and scores that draws keep to, the best first, of n queries.

    By the index's own approximate search where it has one.
    """
    assert run.config.support is not None
    excluded = run.material.split.excluded
    support = min(run.config.support, len(run.index) - excluded.longest)
    if run.index.faiss_index is None:
        left_out = excluded.tensor(queries, embeddings.device)
        return run.items.top_k(embeddings, support, left_out)
    found = run.index.search(embeddings.cpu().numpy(), support, excluded.take(queries))
    rows, scores = (torch.from_numpy(array).to(embeddings.device) for array in found)
    return rows, scores.to(embeddings.dtype)
