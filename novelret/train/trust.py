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

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from novelret.label.table import IRRELEVANT, RELEVANT
from novelret.progress import Reporter
from novelret.train.processes import Processes
from novelret.train.states import Material, items_of

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

_REFERENCES = 256
"""Of a query's yeses or feedback, how many a pair is compared with."""

_GROUP = 256  # pairs of one query that are compared at once
_CHUNK = 1 << 16  # labels at a time
_NUMBERS = 1 << 24  # of embeddings held at a time, 64 MB
_FEATURES = 7
_RATE, _SIMILAR = 4, 5  # two of them


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
    if trust.mean() > _CLEAN:  # so few are in doubt that doubting them is more noise than help
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
    labelled = _gather(material, seed)
    if min(len(labelled.yeses), len(labelled.noes)) < _LEAST:
        return Trust(weights, 0.0)
    rng = np.random.default_rng((seed % (1 << 32), 2))
    chosen = np.sort(rng.permutation(len(labelled.yeses))[:_MOST])
    pairs = np.concatenate([labelled.yeses[chosen], labelled.noes])
    is_yes = np.repeat([True, False], [len(chosen), len(labelled.noes)])
    stands_for = np.where(is_yes, len(labelled.yeses) / len(chosen), labelled.no_weight)
    context = _Context(material, labelled, query_embeddings, item_embeddings)
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
class _Labelled:
    """Labelled pairs beyond T_L.

    Attributes:
        yeses: (Y, 2) int64 (query row, item row), ascending.
        noes: (n, 2) int64, a sample, ascending.
        no_weight: how many pairs each of `noes` stands for.
        yes_count: (Q,) yeses of each query.
        count: (Q,) labelled pairs of each query.
    """

    yeses: np.ndarray
    noes: np.ndarray
    no_weight: float
    yes_count: np.ndarray
    count: np.ndarray


def _gather(material: Material, seed: int) -> _Labelled:
    labels, n_queries = material.labels, len(material.split)
    share = min(1.0, _MOST / max(1, int((labels.verdicts == IRRELEVANT).sum())))
    rng = np.random.default_rng((seed % (1 << 32), 1))
    yeses, noes = [], []
    counts = np.zeros((2, n_queries), dtype=np.int64)
    for start in range(0, len(labels), _CHUNK):
        verdicts = labels.verdicts[start : start + _CHUNK]
        pairs = np.stack(np.divmod(labels.keys[start : start + _CHUNK], labels.catalog_size), axis=1)
        novel = ~material.in_base(pairs[:, 0], pairs[:, 1])
        yeses.append(pairs[novel & (verdicts == RELEVANT)])
        sampled = rng.random(len(pairs)) < share
        noes.append(pairs[novel & (verdicts == IRRELEVANT) & sampled])
        for verdict in (IRRELEVANT, RELEVANT):
            counts[verdict] += np.bincount(pairs[novel & (verdicts == verdict), 0], minlength=n_queries)
    none = np.empty((0, 2), dtype=np.int64)
    total = counts.sum(axis=0)
    return _Labelled(
        np.concatenate([none, *yeses]), np.concatenate([none, *noes]), 1 / share, counts[RELEVANT], total
    )


@dataclass(frozen=True)
class _Context:
    """What features of a pair are computed from."""

    material: Material
    labelled: _Labelled
    queries: np.ndarray
    items: np.ndarray

    def features(self, pairs: np.ndarray, is_yes: np.ndarray) -> np.ndarray:
        """Features of (query, item) pairs, grouped by query, (n, 7) float64; similarities may be NaN.

        Args:
            pairs: (n, 2) int64.
            is_yes: (n,) bool, the judge's verdicts, which no pair's own features may depend on.
        """
        found = np.empty((len(pairs), _FEATURES))
        queries, labelled = pairs[:, 0], self.labelled
        mean_rate = labelled.yes_count.sum() / labelled.count.sum()
        # Among the query's other labels; one more, as the average query's, stands in where there is none.
        rate = (labelled.yes_count[queries] - is_yes + mean_rate) / labelled.count[queries]
        found[:, 0] = self._scores(pairs)
        edge = self.material.base_rows[:, self.material.base_depth - 1]
        asked, place = np.unique(queries, return_inverse=True)
        found[:, 1] = found[:, 0] - self._scores(np.stack([asked, np.maximum(edge[asked], 0)], axis=1))[place]
        found[:, 2] = np.log(self._ranks(pairs))
        found[:, 3] = np.log(1e-3 + rate)
        found[:, _RATE] = rate
        split = self.material.split
        feedback = np.stack([split.feedback_queries, split.feedback_items], axis=1)
        found[:, _SIMILAR] = self._similarities(pairs, labelled.yeses, 3, others=True)
        found[:, 6] = self._similarities(pairs, feedback, 1, others=False)
        return found

    def _scores(self, pairs: np.ndarray) -> np.ndarray:
        """Deployed scores, (n,) float32."""
        size = max(1, _NUMBERS // (2 * self.items.shape[1]))
        parts = [np.zeros(0, dtype=np.float32)]
        for start in range(0, len(pairs), size):
            query, item = pairs[start : start + size].T
            parts.append(np.einsum("nd,nd->n", self.queries[query], _read(self.items, item)))
        return np.concatenate(parts)

    def _ranks(self, pairs: np.ndarray) -> np.ndarray:
        """Ranks in the base lists, from 1, (n,); one beyond the list's depth for what is not in it."""
        depth = self.material.base_rows.shape[1]
        size = max(1, _NUMBERS // (4 * depth))
        parts = [np.zeros(0, dtype=np.int64)]
        for start in range(0, len(pairs), size):
            query, item = pairs[start : start + size].T
            same = self.material.base_rows[query] == item[:, None]
            parts.append(np.where(same.any(axis=1), same.argmax(axis=1), depth) + 1)
        return np.concatenate(parts)

    def _similarities(self, pairs: np.ndarray, of: np.ndarray, most: int, *, others: bool) -> np.ndarray:
        """Mean of the `most` largest similarities to a query's items `of`, (n,) float64, NaN without any.

        With `others`, an item is not compared with itself.
        """
        found = np.full(len(pairs), np.nan)
        for group in _groups(pairs[:, 0], self.items.shape[1]):
            queries, inside = pairs[group[:, 0], 0], group >= 0
            references = items_of(of, queries, _REFERENCES)
            if references.shape[1] == 0:
                continue
            rows = np.where(inside, pairs[group, 1], 0)
            items, vectors = (
                torch.from_numpy(_read(self.items, np.maximum(part, 0))) for part in (rows, references)
            )
            similar = torch.bmm(items, vectors.transpose(1, 2))
            absent = (references < 0)[:, None, :]
            if others:
                absent = absent | (references[:, None, :] == rows[:, :, None])
            similar = similar.masked_fill(torch.from_numpy(absent), -torch.inf)
            best = torch.topk(similar, min(most, similar.shape[2]), dim=2).values.double()
            there = torch.isfinite(best)
            mean = best.masked_fill(~there, 0.0).sum(dim=2) / there.sum(dim=2)
            found[group[inside]] = mean.numpy()[inside]
        return found


def _read(embeddings: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Item rows as float32, in ascending order of a memory map."""
    unique, place = np.unique(rows, return_inverse=True)
    read: np.ndarray = np.asarray(embeddings[unique], dtype=np.float32)[place.reshape(rows.shape)]
    return read


def _groups(queries: np.ndarray, dimension: int) -> Iterator[np.ndarray]:
    """Positions of pairs by query, in parts that fit in memory: (g, ≤ _GROUP) int64, −1 padded."""
    order = np.argsort(queries, kind="stable")
    ordered = queries[order]
    is_first = np.ones(len(order), dtype=bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    of_query = np.flatnonzero(is_first)[np.cumsum(is_first) - 1]
    firsts = np.flatnonzero((np.arange(len(order)) - of_query) % _GROUP == 0)
    counts = np.diff(np.append(firsts, len(order)))
    size = max(1, _NUMBERS // ((_GROUP + _REFERENCES) * dimension))
    for start in range(0, len(firsts), size):
        first, count = firsts[start : start + size, None], counts[start : start + size, None]
        column = np.arange(int(count.max()))[None]
        inside = column < count
        yield np.where(inside, order[np.where(inside, first + column, 0)], -1)


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
    """(n, 8): nothing lacks, and what the query's other yeses are like counts by how many they are, too."""
    whole = np.where(np.isnan(features), stand_in, features)
    return np.column_stack([whole, whole[:, _SIMILAR] * whole[:, _RATE]])


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
    gain = 2 * len(features) * (likelihood - without)
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
