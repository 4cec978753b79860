"""One step's loss: the batch's embeddings against the frozen items, by the chosen objective."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from novelret.train.config import TrainConfig
from novelret.train.objectives import pg_ret
from novelret.train.objectives.supervised import in_batch_infonce
from novelret.train.states import FEEDBACK, Batch, Material


@dataclass(frozen=True)
class StepLoss:
    """A step's loss, as a sum over examples that micro-batches add up to.

    Attributes:
        loss: scalar with gradient.
        feedback: the feedback pairs' part of it.
        states: the judged states' part of it.
    """

    loss: Tensor
    feedback: float
    states: float


def batch_loss(
    embeddings: Tensor, rows: slice, batch: Batch, material: Material, config: TrainConfig, gather: Gather
) -> StepLoss:
    """Loss of some of a batch's examples, weighted so that the parts of a batch add up to the whole.

    Items are frozen and known to everyone, so negatives come from the whole batch whichever part of its
    queries is encoded here.

    Args:
        embeddings: (b, d) query embeddings of `rows`, with gradient.
        rows: which examples of the batch these are.
        batch: the whole batch, every item drawn.
        material: lists and labels.
        config: objective, loss, temperature and so on.
        gather: rows → item embeddings, float32, on the embeddings' device.
    """
    infonce = np.ones(len(batch.queries), dtype=bool)
    if config.objective == "pg-ret":
        infonce = batch.sources == FEEDBACK
    weights = _weights(batch, infonce, config)
    here = np.arange(len(batch.queries))[rows]
    feedback = embeddings.new_zeros(())
    states = embeddings.new_zeros(())
    of_pairs, of_states = here[infonce[here]], here[~infonce[here] & (weights[here] > 0)]
    if len(of_pairs):
        losses = _pair_losses(
            embeddings[of_pairs - rows.start], of_pairs, batch, infonce, material, config, gather
        )
        feedback = (losses * losses.new_tensor(weights[of_pairs])).sum()
    if len(of_states):
        losses = _state_losses(embeddings[of_states - rows.start], of_states, batch, material, config, gather)
        states = (losses * losses.new_tensor(weights[of_states])).sum()
    return StepLoss(feedback + states, feedback.item(), states.item())


Gather = Callable[[np.ndarray], Tensor]


def _weights(batch: Batch, infonce: np.ndarray, config: TrainConfig) -> np.ndarray:
    """Each kind of example is averaged, then weighted by its share of the mixture; no reward, no weight."""
    if config.objective != "pg-ret":
        return np.full(len(batch.queries), 1 / len(batch.queries), dtype=np.float32)
    known = ~infonce & ~np.isnan(batch.rewards)
    weights = np.zeros(len(batch.queries), dtype=np.float32)
    weights[infonce] = config.gamma / max(1, infonce.sum())
    weights[known] = (1 - config.gamma) / max(1, known.sum())
    return weights


def _pair_losses(
    embeddings: Tensor,
    pairs: np.ndarray,
    batch: Batch,
    infonce: np.ndarray,
    material: Material,
    config: TrainConfig,
    gather: Gather,
) -> Tensor:
    columns = np.flatnonzero(infonce)
    items = batch.items[columns]
    known = material.known_relevant(batch.queries[pairs][:, None], items[None, :])
    known |= batch.items[pairs][:, None] == items[None, :]
    scores = embeddings @ gather(items).T
    positive = torch.from_numpy(np.searchsorted(columns, pairs)).to(scores.device)
    return in_batch_infonce(scores, positive, torch.from_numpy(known).to(scores.device), config.temperature)


def _state_losses(
    embeddings: Tensor,
    states: np.ndarray,
    batch: Batch,
    material: Material,
    config: TrainConfig,
    gather: Gather,
) -> Tensor:
    queries, items = batch.queries[states], batch.items[states]
    reward = torch.from_numpy(batch.rewards[states]).to(embeddings.device)
    first, last = negative_ranks(config)
    negatives = material.base_rows[queries, first:last]
    vectors = gather(np.concatenate([items[:, None], negatives], axis=1))
    scores = torch.einsum("sd,snd->sn", embeddings, vectors)
    score, negative_scores = scores[:, 0], scores[:, 1:]
    if config.loss == "conservative":
        return pg_ret.conservative(score, negative_scores, reward)
    mask = (negatives != items[:, None]) & (negatives >= 0)
    if config.loss == "boundary":
        # What is known to be relevant is no item to be displaced.
        mask &= ~material.known_relevant(queries[:, None], negatives)
    return pg_ret.contrastive(
        score, negative_scores, torch.from_numpy(mask).to(score.device), reward, config.temperature
    )


def negative_ranks(config: TrainConfig) -> tuple[int, int]:
    """Base ranks that a loss contrasts with, from the first to below the last (ranks count from 0)."""
    if config.loss == "conservative":
        return 0, 1
    if config.loss == "aggressive":
        return 0, config.negatives
    half = max(1, round(config.window * config.base_depth))
    return max(0, config.base_depth - half), min(config.base_depth + half, config.depth)
