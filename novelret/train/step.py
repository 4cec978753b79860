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
from novelret.train.noise import uniform
from novelret.train.objectives import pg_ret
from novelret.train.objectives.supervised import infonce as infonce_loss
from novelret.train.sampler import Key
from novelret.train.states import FEEDBACK, Batch, Material
from novelret.train.step_loss import StepLoss

_JUDGED = 5  # the stream of judged negatives; the first five are the sampler's


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
    rewards = batch.rewards[here[batch.sources[here] != FEEDBACK]]
    paired, rewarded = infonce[here], ~infonce[here] & (weights[here] > 0)
    of_pairs, of_states = here[paired], here[rewarded]
    if len(of_pairs):
        chosen = embeddings[torch.from_numpy(place[paired])]
        losses = _pair_losses(chosen, of_pairs, batch, infonce, material, config, items, step)
        losses = losses * losses.new_tensor(weights[of_pairs])
        is_feedback = torch.from_numpy(batch.sources[of_pairs] == FEEDBACK).to(losses.device)
        feedback, states = losses[is_feedback].sum(), losses[~is_feedback].sum()
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
            states = states + (losses * losses.new_tensor(weights[of_states])).sum()
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
    step: int,
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
    if config.hard_negatives or config.judged_negatives:
        hard = _hard_negatives(pairs, batch, material, config, step)
        vectors = items.rows(torch.from_numpy(np.maximum(hard, 0)), embeddings)
        scores = torch.cat([scores, torch.einsum("sd,snd->sn", embeddings, vectors)], dim=1)
        relevant = material.known_relevant(batch.queries[pairs][:, None], hard) | (hard < 0)
        known = np.concatenate([known, relevant], axis=1)
    column = torch.from_numpy(positive).to(scores.device)
    return infonce_loss(scores, column, torch.from_numpy(known).to(scores.device), config.temperature)


def _hard_negatives(
    pairs: np.ndarray, batch: Batch, material: Material, config: TrainConfig, step: int
) -> np.ndarray:
    """Deployed top items of each pair's query and items judged irrelevant to it: catalog rows, −1 padded."""
    queries = batch.queries[pairs]
    top = material.base_rows[queries, : config.hard_negatives].astype(np.int64)
    places, numbers = torch.from_numpy(pairs)[:, None], torch.arange(config.judged_negatives)
    at = uniform(config.seed, _JUDGED, step, places, numbers)
    return np.concatenate([top, material.noes_at(queries, at.numpy())], axis=1)


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
    of_leader = embeddings[torch.from_numpy(leader)]
    negatives = _negatives(of_leader, queries[leader], material, config, items)
    negative_vectors = items.rows(torch.from_numpy(np.maximum(negatives, 0)), embeddings)
    negative_scores = torch.einsum("sd,snd->sn", of_leader, negative_vectors)[torch.from_numpy(group)]
    score = (embeddings * items.rows(torch.from_numpy(chosen), embeddings)).sum(dim=1)
    if config.loss == "conservative":
        return pg_ret.conservative(score, negative_scores, reward)
    mask = negatives >= 0
    if config.loss in ("boundary", "inclusion"):
        # What is known to be relevant is no item to be displaced.
        mask &= ~material.known_relevant(queries[leader][:, None], negatives)
    counts = torch.from_numpy(mask[group] & (negatives[group] != chosen[:, None])).to(score.device)
    form = pg_ret.inclusion if config.loss == "inclusion" else pg_ret.contrastive
    return form(score, negative_scores, counts, reward, config.temperature)


def _negatives(
    embeddings: Tensor, queries: np.ndarray, material: Material, config: TrainConfig, items: ItemMatrix
) -> np.ndarray:
    """(b, M) catalog rows that the items of a query are contrasted with, −1 padded.

    Of the deployed model's list, or for "inclusion" of the current policy's own, which all processes search
    together.
    """
    first, last = negative_ranks(config)
    if config.loss == "inclusion":
        excluded = material.split.excluded.tensor(queries, embeddings.device)
        # Of a tiny catalog all there is to a query that leaves out the most.
        last = min(last, max(1, len(items) - material.split.excluded.longest))
        first = min(first, last - 1)
        return items.top_k(embeddings, last, excluded)[0][:, first:].cpu().numpy()
    return material.base_rows[queries, first:last].astype(np.int64)


def negative_ranks(config: TrainConfig) -> tuple[int, int]:
    """Ranks that a loss contrasts with, from the first to below the last (ranks count from 0)."""
    if config.loss == "conservative":
        return 0, 1
    if config.loss == "aggressive":
        return 0, config.negatives
    first, last = (round(multiple * config.base_depth) for multiple in window_multiples(config))
    last = max(last, first + 1)
    if config.loss == "inclusion":  # the policy's own list is searched as deep as it takes
        return first, last
    return min(first, config.depth - 1), min(last, config.depth)
