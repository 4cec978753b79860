"""One step's loss: the batch's embeddings against the frozen items, by the chosen objective."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from novelret.train.config import LIST_OBJECTIVES, TrainConfig, window_multiples
from novelret.train.example_weights import example_weights, is_pair
from novelret.train.list_step import list_losses
from novelret.train.matrix import ItemMatrix
from novelret.train.objectives import pg_ret
from novelret.train.objectives.supervised import infonce as infonce_loss
from novelret.train.sampler import Key
from novelret.train.states import Batch, Material
from novelret.train.step_loss import StepLoss


def batch_loss(
    embeddings: Tensor,
    passes: np.ndarray,
    batch: Batch,
    material: Material,
    config: TrainConfig,
    items: ItemMatrix,
    step: int,
) -> StepLoss:
    """Loss of some of a batch's examples, weighted so that the parts of a batch add up to the whole.

    Items are frozen and known to everyone, so negatives come from the whole batch whichever part of its
    queries is encoded here.

    Args:
        embeddings: (b, d) query embeddings of `passes`, with gradient.
        passes: (b,) int64, ascending, which forward passes of the batch these are. Where processes share the
            catalog, all have to make the same number of calls, if need be with none.
        batch: the whole batch. A list objective writes the mean known reward of each list it draws into
            `batch.rewards`.
        material: lists and labels.
        config: objective, loss, temperature and so on.
        items: the frozen catalog.
        step: the optimizer step, part of the key of draws made here.
    """
    infonce = is_pair(batch, config)
    weights = example_weights(batch, infonce, config)
    here = batch.states_of(passes)
    place = np.searchsorted(passes, batch.passes[here])
    feedback = embeddings.new_zeros(())
    states = embeddings.new_zeros(())
    rewards = batch.rewards[here[~infonce[here]]]
    paired, rewarded = infonce[here], ~infonce[here] & (weights[here] > 0)
    of_pairs, of_states = here[paired], here[rewarded]
    if len(of_pairs):
        chosen = embeddings[torch.from_numpy(place[paired])]
        losses = _pair_losses(chosen, of_pairs, batch, infonce, material, config, items)
        feedback = (losses * losses.new_tensor(weights[of_pairs])).sum()
    # Losses that pass over the catalog are computed by all processes together.
    together = config.objective in LIST_OBJECTIVES or config.loss == "inclusion"
    if len(of_states) or (items.shard is not None and together and not infonce.all()):
        chosen = embeddings[torch.from_numpy(place[rewarded])]
        if config.objective in LIST_OBJECTIVES:
            key = Key(config.seed, step, torch.from_numpy(of_states).to(embeddings.device))
            losses, rewards = list_losses(chosen, batch.queries[of_states], material, items, config, key)
            batch.rewards[of_states] = _known_mean(rewards)
        else:
            losses = _state_losses(chosen, of_states, batch, material, config, items)
        if len(of_states):  # else a gradient of zeros would move the weights by their momentum
            states = (losses * losses.new_tensor(weights[of_states])).sum()
    known = int((~np.isnan(rewards)).sum())
    return StepLoss(feedback + states, feedback.item(), states.item(), rewards.size, known)


def _known_mean(rewards: np.ndarray) -> np.ndarray:
    """Mean of the known rewards of each list, NaN where none is known."""
    known = ~np.isnan(rewards)
    total = np.where(known, rewards, 0).sum(axis=1)
    return np.divide(total, known.sum(axis=1), out=np.full(len(rewards), np.nan), where=known.any(axis=1))


def _pair_losses(
    embeddings: Tensor,
    pairs: np.ndarray,
    batch: Batch,
    infonce: np.ndarray,
    material: Material,
    config: TrainConfig,
    items: ItemMatrix,
) -> Tensor:
    _, leader, group = np.unique(batch.passes[pairs], return_index=True, return_inverse=True)
    queries = batch.queries[pairs[leader]]
    own = batch.items[pairs]
    is_sample = len(batch.sampled) > 0
    others = batch.sampled if is_sample else batch.items[infonce]
    of_leader = embeddings[torch.from_numpy(leader)]
    scores = (of_leader @ items.rows(torch.from_numpy(others), embeddings).T)[torch.from_numpy(group)]
    if is_sample:
        # The pair's own item, then the sample, each item of which stands for N / n of the catalog.
        stands_for = config.temperature * math.log(len(items) / len(others))
        score = (embeddings * items.rows(torch.from_numpy(own), embeddings)).sum(dim=1)
        scores = torch.cat([score[:, None], scores + stands_for], dim=1)
        known = np.pad(material.no_negatives(queries, others)[group], ((0, 0), (1, 0)))
        positive = np.zeros(len(pairs), dtype=np.int64)
    else:
        distinct, place = np.unique(others, return_inverse=True)
        known = material.no_negatives(queries, distinct)[:, place][group]
        known |= own[:, None] == others[None, :]
        positive = np.searchsorted(np.flatnonzero(infonce), pairs)
    if config.objective == "supervised-judged" and config.hard_negatives:
        hard = material.base_rows[batch.queries[pairs], : config.hard_negatives].astype(np.int64)
        vectors = items.rows(torch.from_numpy(np.maximum(hard, 0)), embeddings)
        scores = torch.cat([scores, torch.einsum("sd,snd->sn", embeddings, vectors)], dim=1)
        relevant = material.known_relevant(batch.queries[pairs][:, None], hard) | (hard < 0)
        known = np.concatenate([known, relevant], axis=1)
    column = torch.from_numpy(positive).to(scores.device)
    return infonce_loss(scores, column, torch.from_numpy(known).to(scores.device), config.temperature)


def _state_losses(
    embeddings: Tensor,
    states: np.ndarray,
    batch: Batch,
    material: Material,
    config: TrainConfig,
    items: ItemMatrix,
) -> Tensor:
    queries, chosen = batch.queries[states], batch.items[states]
    reward = torch.from_numpy(batch.rewards[states]).to(embeddings.device)
    # States of one query share its list and its negatives: searched, gathered and scored once.
    _, leader, group = np.unique(batch.passes[states], return_index=True, return_inverse=True)
    if config.loss == "inclusion":
        return _inclusion_losses(embeddings, queries, leader, group, chosen, reward, material, config, items)
    first, last = negative_ranks(config)
    negatives = material.base_rows[queries[leader], first:last].astype(np.int64)
    negative_vectors = items.rows(torch.from_numpy(np.maximum(negatives, 0)), embeddings)
    of_leader = embeddings[torch.from_numpy(leader)]
    negative_scores = torch.einsum("sd,snd->sn", of_leader, negative_vectors)[torch.from_numpy(group)]
    score = (embeddings * items.rows(torch.from_numpy(chosen), embeddings)).sum(dim=1)
    if config.loss == "conservative":
        return pg_ret.conservative(score, negative_scores, reward)
    mask = negatives >= 0
    if config.loss == "boundary":
        # What is known to be relevant is no item to be displaced.
        mask &= ~material.known_relevant(queries[leader][:, None], negatives)
    mask = mask[group] & (negatives[group] != chosen[:, None])
    return pg_ret.contrastive(
        score, negative_scores, torch.from_numpy(mask).to(score.device), reward, config.temperature
    )


def _inclusion_losses(
    embeddings: Tensor,
    queries: np.ndarray,
    leader: np.ndarray,
    group: np.ndarray,
    chosen: np.ndarray,
    reward: Tensor,
    material: Material,
    config: TrainConfig,
    items: ItemMatrix,
) -> Tensor:
    """Against the current policy's K-th item other than z, whose score moves too: the list's boundary."""
    k = config.base_depth
    excluded = torch.from_numpy(material.split.excluded[queries[leader]]).to(embeddings.device)
    best = items.top_k(embeddings[torch.from_numpy(leader)], k + 1, excluded)[0][torch.from_numpy(group)]
    own = torch.from_numpy(chosen).to(best.device)
    inside = (best[:, :k] == own[:, None]).any(dim=1)
    threshold_rows = torch.where(inside, best[:, k], best[:, k - 1])
    pair = items.rows(torch.stack([own, threshold_rows], dim=1), embeddings)
    scores = torch.einsum("sd,snd->sn", embeddings, pair)
    return pg_ret.inclusion(scores[:, 0], scores[:, 1], reward, config.temperature)


def negative_ranks(config: TrainConfig) -> tuple[int, int]:
    """Base ranks that a loss contrasts with, from the first to below the last (ranks count from 0)."""
    if config.loss == "conservative":
        return 0, 1
    if config.loss == "aggressive":
        return 0, config.negatives
    first, last = (round(multiple * config.base_depth) for multiple in window_multiples(config.window))
    return min(first, config.depth - 1), min(max(last, first + 1), config.depth)
