"""How much each example of a batch counts in its loss: the mixture of feedback, base and policy states."""

from __future__ import annotations

import numpy as np

from novelret.train.config import LIST_OBJECTIVES, TrainConfig
from novelret.train.states import BASE, FEEDBACK, POLICY, Batch


def is_pair(batch: Batch, config: TrainConfig) -> np.ndarray:
    """Which examples are (query, relevant item) pairs for InfoNCE rather than states to be rewarded."""
    is_feedback: np.ndarray = batch.sources == FEEDBACK
    if config.objective == "supervised-judged":
        return is_feedback | (batch.rewards > 0)
    return is_feedback


def example_weights(batch: Batch, infonce: np.ndarray, config: TrainConfig) -> np.ndarray:
    """Each kind of example is averaged, then weighted by its share of the mixture; no reward, no weight.

    Base and policy states share what is not γ by the passes that found a reward, so that queries with many
    judged items do not drown the policy's draws. States count as far as they are believed; a list objective
    credits many items a state, each by its own trust (see `list_step`).
    """
    if config.objective.startswith("supervised"):
        return _pair_weights(batch, infonce, config)
    rewarded = ~infonce
    if config.objective not in LIST_OBJECTIVES:
        rewarded &= ~np.isnan(batch.rewards)
    weights = np.zeros(len(batch.queries), dtype=np.float32)
    weights[infonce] = config.gamma / max(1, infonce.sum())
    trust = np.ones_like(weights) if config.objective in LIST_OBJECTIVES else batch.trust
    passes = max(1, len(np.unique(batch.passes[rewarded])))
    for source in (BASE, POLICY):
        of_source = rewarded & (batch.sources == source)
        share = (1 - config.gamma) * len(np.unique(batch.passes[of_source])) / passes
        weights[of_source] = share * trust[of_source] / max(1.0, float(trust[of_source].sum()))
    return weights


def _pair_weights(batch: Batch, pairs: np.ndarray, config: TrainConfig) -> np.ndarray:
    """Feedback pairs weigh γ in all and judged pairs the rest, each as far as it is believed; one alone 1."""
    of_feedback = batch.sources == FEEDBACK
    judged = pairs & ~of_feedback
    gamma = config.gamma if judged.any() else 1.0
    gamma = gamma if of_feedback.any() else 0.0
    weights = np.zeros(len(pairs), dtype=np.float32)
    weights[of_feedback] = gamma / max(1, of_feedback.sum())
    weights[judged] = (1 - gamma) * batch.trust[judged] / max(1.0, float(batch.trust[judged].sum()))
    return weights
