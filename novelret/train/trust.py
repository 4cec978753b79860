"""How far each yes of the judge is to be believed, estimated from its answers alone.

A judge that wrongly calls one irrelevant item in fifty relevant can give more wrong yeses than right ones, as
nearly all novel items are irrelevant. Wrong yeses fall anywhere; right ones where the deployed score, the
query's other yeses and its feedback suggest them. So the share that the judge says yes to whatever the
features φ of a pair is its rate of false positives, the floor:

    P(yes | φ) = floor + (1 − floor) · p,    p = σ(w·φ + b),    P(right | yes, φ) = p / P(yes | φ)

Floor, w and b are those of the greatest likelihood; no human label is needed. Where a floor explains the
answers no better than none (likelihood ratio), all yeses are believed.

What it assumes: that false positives do not depend on φ (a judge fooled by what looks alike errs unseen), and
that some of the labelled pairs are almost surely irrelevant.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from novelret.label.table import RELEVANT
from novelret.progress import Reporter
from novelret.train.processes import Processes
from novelret.train.states import Material
from novelret.train.trust_features import RATE, SIMILAR, Pairs, gather_labelled

_MOST = 100_000
"""Yeses, and noes, that the model is fitted on; of more, a sample stands for the rest."""

_LEAST = 50
"""Yeses, and noes, below which nothing is fitted."""

_RATIO = 10.8
"""Twice the gain in log-likelihood from which on a floor is taken to be there (p = 0.001)."""

_NOTABLE = 0.001
"""The floor from which on the user is told."""

_CLEAN = 0.98
"""The share of yeses believed from which on all are."""

_CHUNK = 1 << 16  # labels at a time


def weigh_labels(
    material: Material,
    query_embeddings: np.ndarray,
    item_embeddings: np.ndarray,
    seed: int,
    processes: Processes,
    report: Reporter,
) -> Material:
    """The material with the trust of its positive states, the same in all processes; says what was found.

    Args:
        material: labels, lists and feedback.
        query_embeddings: (Q, d) float32 of the deployed encoder.
        item_embeddings: (N, d), memory-mapped; rows are read where needed.
        seed: decides the samples.
        processes: who trains; the first one's estimate holds.
        report: told where the judge seems to say yes wrongly.
    """
    estimate = estimate_trust(material, query_embeddings, item_embeddings, seed)
    # Sums may differ in the last digit between machines.
    shared = processes.from_first(np.append(estimate.weights.astype(np.float64), estimate.floor))
    trust, floor = shared[:-1].astype(np.float32), float(shared[-1])
    # So few may be in doubt that doubting them is more noise than help.
    if len(trust) == 0 or trust.mean() > _CLEAN:
        return replace(material, trust=np.ones_like(trust), floor=floor)
    if floor > _NOTABLE:
        report.note(
            f"the judge seems to call {floor:.1%} of irrelevant items relevant: of its {len(trust)} novel "
            f"yeses {trust.mean():.0%} are believed, and each weighs as far as it is (--no-trust: all alike)"
        )
    return replace(material, trust=trust, floor=floor)


@dataclass(frozen=True)
class Trust:
    """An estimate.

    Attributes:
        weights: (P,) float32, P(truly relevant) of each of the material's positive states.
        floor: share of irrelevant items that the judge calls relevant; 0 where none is found.
    """

    weights: np.ndarray
    floor: float


def estimate_trust(
    material: Material, query_embeddings: np.ndarray, item_embeddings: np.ndarray, seed: int = 0
) -> Trust:
    """Estimate how far each positive state is to be believed; 1 where nothing can be said.

    Args:
        material: labels, lists and feedback.
        query_embeddings: (Q, d) float32 of the deployed encoder.
        item_embeddings: (N, d), memory-mapped; rows are read where needed.
        seed: decides the samples.
    """
    weights = np.ones(len(material.positives), dtype=np.float32)
    labelled = gather_labelled(material, _MOST, seed)
    if min(len(labelled.yeses), len(labelled.noes)) < _LEAST:
        return Trust(weights, 0.0)
    rng = np.random.default_rng((seed % (1 << 32), 2))
    chosen = np.sort(rng.permutation(len(labelled.yeses))[:_MOST])
    pairs = np.concatenate([labelled.yeses[chosen], labelled.noes])
    is_yes = np.repeat([True, False], [len(chosen), len(labelled.noes)])
    stands_for = np.where(is_yes, len(labelled.yeses) / len(chosen), labelled.no_weight)
    context = Pairs(material, labelled, query_embeddings, item_embeddings)
    model = _fit(context.features(pairs, is_yes), is_yes, stands_for)
    if model is None:
        return Trust(weights, 0.0)
    for start in range(0, len(weights), _CHUNK):
        states = material.positives[start : start + _CHUNK]
        # A user's own reward may be positive for other states too: those are not the judge's novel yeses.
        novel = ~material.in_base(states[:, 0], states[:, 1])
        known = np.flatnonzero(novel & (material.labels.lookup(*states.T) == RELEVANT))
        features = context.features(states[known], np.ones(len(known), dtype=bool))
        weights[start + known] = model.right(features)
    return Trust(weights, model.floor)


@dataclass(frozen=True)
class _Model:
    """The fitted model.

    Attributes:
        stand_in: (7,) what counts for a feature that a pair lacks.
        mean: (8,) and
        scale: (8,) standardise features and the product of two.
        weights: (16,) for these and their squares.
        bias: of the score.
        floor: share of irrelevant items that the judge calls relevant.
    """

    stand_in: np.ndarray
    mean: np.ndarray
    scale: np.ndarray
    weights: Tensor
    bias: Tensor
    floor: float

    def right(self, features: np.ndarray) -> np.ndarray:
        """P(right | yes) of pairs with a yes, (n,) float32."""
        whole = _completed(features, self.stand_in)
        p = torch.sigmoid(_expand(whole, self.mean, self.scale) @ self.weights + self.bias)
        right: np.ndarray = (p / (self.floor + (1 - self.floor) * p)).float().numpy()
        return right


def _completed(features: np.ndarray, stand_in: np.ndarray) -> np.ndarray:
    """(n, 8): gaps filled in, and as an eighth the product of SIMILAR and RATE."""
    whole = np.where(np.isnan(features), stand_in, features)
    return np.column_stack([whole, whole[:, SIMILAR] * whole[:, RATE]])


def _expand(features: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> Tensor:
    x = torch.from_numpy((features - mean) / scale).clamp(-4, 4)
    return torch.cat([x, x**2], dim=1)


def _fit(features: np.ndarray, is_yes: np.ndarray, stands_for: np.ndarray) -> _Model | None:
    """Maximum likelihood; None where a floor is not better than none, or nothing finite is found."""
    known = np.isfinite(features)
    stand_in = np.where(known, features, 0.0).sum(axis=0) / np.maximum(1, known.sum(axis=0))
    features = _completed(features, stand_in)
    share = stands_for / stands_for.sum()
    mean = share @ features
    scale = np.sqrt(share @ (features - mean) ** 2) + 1e-6
    x, yes, weight = _expand(features, mean, scale), torch.from_numpy(is_yes), torch.from_numpy(share)
    rate = float(share @ is_yes)
    without, _ = _maximise(x, yes, weight, None)
    likelihood, (weights, bias, logit) = _maximise(x, yes, weight, float(np.log(rate / 2)))
    gain = 2 * stands_for.sum() * (likelihood - without)
    if not (np.isfinite(gain) and gain > _RATIO and bool(torch.isfinite(weights).all())):
        return None
    return _Model(stand_in, mean, scale, weights, bias, float(torch.sigmoid(logit)))


def _maximise(x: Tensor, yes: Tensor, weight: Tensor, floor: float | None) -> tuple[float, list[Tensor]]:
    """Mean log-likelihood reached and w, b and the floor's logit; None for no floor."""
    start = [torch.zeros(x.shape[1]), torch.tensor(-4.0), torch.tensor(-50.0 if floor is None else floor)]
    parameters = [part.double().requires_grad_() for part in start]
    weights, bias, logit = parameters
    trained = parameters[:2] if floor is None else parameters
    optimizer = torch.optim.LBFGS(trained, max_iter=100, line_search_fn="strong_wolfe")

    def likelihood() -> Tensor:
        score = x @ weights + bias
        of_no = logsigmoid(-logit) + logsigmoid(-score)
        of_yes = torch.logaddexp(logsigmoid(logit), logsigmoid(-logit) + logsigmoid(score))
        return (weight * torch.where(yes, of_yes, of_no)).sum()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = 1e-6 * (weights**2).sum() - likelihood()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        return float(likelihood()), [part.detach() for part in parameters]
