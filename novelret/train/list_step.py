"""List objectives on the full catalog: draw K items per query from the policy, reward and credit them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from novelret.train.config import THRESHOLD_OBJECTIVES, TrainConfig
from novelret.train.matrix import ItemMatrix
from novelret.train.objectives import ca_pg, expected_threshold, gumbel_threshold, pl_rank, reinforce, swap
from novelret.train.sampler import Key
from novelret.train.states import Material

_EXACT_PER_ITEM = 4
"""Top items, per item of the list, whose inclusion is not linearised."""


def list_losses(
    embeddings: Tensor,
    queries: np.ndarray,
    material: Material,
    items: ItemMatrix,
    config: TrainConfig,
    key: Key,
) -> tuple[Tensor, np.ndarray]:
    """Surrogate losses of one drawn list per query, and the lists' rewards.

    Lists are drawn on-policy at the loss's own temperature; items with unknown labels earn nothing.

    Args:
        embeddings: (b, d) with gradient.
        queries: (b,) query rows.
        material: labels, rewards and what each query leaves out.
        items: the frozen catalog.
        config: objective, temperature and list size.
        key: what decides the draws.

    Returns:
        (b,) losses and (b, K) float32 rewards of the drawn items, NaN where unknown.
    """
    k, tau = config.list_size, config.temperature
    excluded = material.split.excluded.tensor(queries, embeddings.device)
    threshold_based = config.objective in THRESHOLD_OBJECTIVES
    replacement = config.objective == "reinforce"
    drawn = items.draw(embeddings, k + threshold_based, key, tau, excluded, replacement=replacement)
    logits = _logits(embeddings, items, drawn.rows, tau)
    rewards, trust = _rewards(material, queries, drawn.rows)
    credit = torch.from_numpy(np.nan_to_num(rewards) * trust).to(embeddings.device)
    if threshold_based:
        assert drawn.perturbed is not None
        kappa = drawn.perturbed[:, k]
        if config.objective == "swap":
            gain = swap.additive_gain(credit[:, :k], credit[:, k])
            losses = swap.swap(logits[:, :k], kappa, gain)
        else:
            losses = gumbel_threshold.pathwise(logits[:, :k], logits[:, k], kappa, credit[:, :k])
        return losses, rewards[:, :k]
    if config.objective == "expected-threshold":
        available = len(items) - material.split.excluded.longest
        log_t = _expected_time(embeddings, items, excluded, tau, k, available)
        return expected_threshold.credited(logits, log_t, credit), rewards
    if config.objective in ("ca-pg", "ca-pg-loo"):
        best, _ = items.top_k(embeddings, k, excluded)
        is_best = drawn.rows[:, :, None] == best[:, None, :]
        best_logits = _logits(embeddings, items, best, tau)
        log_rest = _log_rest(embeddings, items, excluded, best, tau)
        if config.objective == "ca-pg-loo":
            known = _known(rewards, credit)
            credit = (credit - ca_pg.leave_one_out(credit, known)) * known
        losses = ca_pg.plug_in(logits, log_rest, credit, best_logits, is_best)
    elif config.objective in ("v-pg", "pl-rank"):
        log_rest = _log_rest(embeddings, items, excluded, drawn.rows, tau)
        if config.objective == "v-pg":
            losses = reinforce.top_k(logits, log_rest, credit.sum(dim=1))
        else:
            losses = _pl_rank(embeddings, queries, drawn.rows, logits, log_rest, credit, material, items, tau)
    else:
        log_z = items.log_partition(embeddings, tau, excluded)
        if config.objective == "reinforce":
            losses = reinforce.item_wise(logits, log_z, credit)
        elif config.objective == "v-pg-swr":
            losses = reinforce.top_k_with_replacement(logits, log_z, credit.sum(dim=1))
        else:
            losses = ca_pg.with_replacement(logits, log_z, credit)
    return losses, rewards


def _logits(embeddings: Tensor, items: ItemMatrix, rows: Tensor, temperature: float) -> Tensor:
    return torch.einsum("bd,bnd->bn", embeddings, items.rows(rows, embeddings)) / temperature


def _rewards(material: Material, queries: np.ndarray, rows: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Rewards of drawn items, NaN where unknown, and how far each is to be believed."""
    drawn = rows.cpu().numpy()
    pairs = np.repeat(queries, drawn.shape[1]), drawn.ravel()
    return material.rewards(*pairs).reshape(drawn.shape), material.trust_of(*pairs).reshape(drawn.shape)


def _known(rewards: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(~np.isnan(rewards)).to(like.device)


def _expected_time(
    embeddings: Tensor, items: ItemMatrix, excluded: Tensor, tau: float, k: int, available: int
) -> Tensor:
    """When K clocks have rung on average: the top items one by one, the others by their mass.

    `available` is how many items there are to a query that leaves out the most.
    """
    top, _ = items.top_k(embeddings, min(_EXACT_PER_ITEM * k, available), excluded)
    rest = _log_rest(embeddings, items, excluded, top, tau)
    return expected_threshold.log_time(_logits(embeddings, items, top, tau), rest, k)


def _log_rest(embeddings: Tensor, items: ItemMatrix, excluded: Tensor, listed: Tensor, tau: float) -> Tensor:
    """(b,) log-partition over the items that are not listed; −inf where that is none."""
    # Where a query has nothing left, one listed item is kept for the pass, and its result dropped.
    there = (excluded >= 0).sum(dim=1) + listed.shape[1] < len(items)
    kept = listed.clone()
    kept[~there, -1] = -1
    rest = items.log_partition(embeddings, tau, torch.cat([excluded, kept], dim=1))
    return torch.where(there, rest, -torch.inf)


def _pl_rank(
    embeddings: Tensor,
    queries: np.ndarray,
    rows: Tensor,
    logits: Tensor,
    log_rest: Tensor,
    credit: Tensor,
    material: Material,
    items: ItemMatrix,
    temperature: float,
) -> Tensor:
    rewarded, rewards = material.rewarded_of(queries)
    wanted = torch.from_numpy(rewarded).to(rows.device)
    same = wanted[:, :, None] == rows[:, None, :]
    place = torch.where(same.any(dim=2), same.to(torch.int8).argmax(dim=2), rows.shape[1])
    place[wanted < 0] = -1  # padding
    rewarded_logits = _logits(embeddings, items, wanted.clamp_min(0), temperature)
    values = torch.from_numpy(rewards).to(embeddings.device)
    return pl_rank.pl_rank_3(logits, log_rest, credit, rewarded_logits, values, place)
