"""Every list estimator's mean update against the exact gradient, by enumeration of all ordered lists."""

from __future__ import annotations

import itertools
import math
import types

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from novelret.train.config import TrainConfig
from novelret.train.list_step import list_losses
from novelret.train.matrix import ItemMatrix
from novelret.train.objectives import ca_pg, expected_threshold, gumbel_threshold, pl_rank, reinforce, swap
from novelret.train.objectives.lists import log_included, log_remaining
from novelret.train.sampler import Key, draw_with_replacement, draw_without_replacement
from tests.rows import from_padded
from tests.train.conftest import log_partition

N, K, MANY = 6, 3, 150_000
ITEMS = torch.eye(N, dtype=torch.float64)  # so that a query's coordinates are its logits
ADDITIVE = torch.tensor([1.0, -1.0, 0.5, 0.0, 2.0, -0.5], dtype=torch.float64)


POSITIVE = torch.tensor([0.9, 0.1, 0.6, 0.3, 1.0, 0.2], dtype=torch.float64)


@pytest.fixture
def positive_rewards(monkeypatch):
    """Rewards from 0 to 1, where a missing baseline hurts most."""
    monkeypatch.setitem(globals(), "ADDITIVE", POSITIVE)


def logits_of(spread, seed=0):
    return torch.randn(N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * spread


def additive_reward(rows):
    return ADDITIVE[rows].sum(dim=1)


def shown_by_a_misaligned_ranker(rows):
    """Only one item of the set is shown and rewarded: the one with the lowest row."""
    return ADDITIVE[rows.min(dim=1).values]


def exact(phi, set_reward):
    """(E R(S), its gradient) by summing over all ordered lists of K items."""
    phi = phi.clone().requires_grad_()
    value = phi.new_zeros(())
    for order in itertools.permutations(range(N), K):
        chosen = phi[list(order)]
        log_p = sum(
            chosen[j]
            - torch.logsumexp(phi.masked_fill(torch.isin(torch.arange(N), torch.tensor(order[:j])), -1e9), 0)
            for j in range(K)
        )
        value = value + torch.exp(log_p) * set_reward(torch.tensor([order]))[0]
    (gradient,) = torch.autograd.grad(value, phi)
    return value.item(), gradient


def updates(phi, estimator):
    """(MANY, N) updates of one estimator, from draws by the sampler."""
    queries = phi.expand(MANY, -1).clone().requires_grad_()
    key = Key(7, 0, torch.arange(MANY))
    surrogate = estimator(queries, key)
    (gradient,) = torch.autograd.grad(surrogate.sum(), queries)
    return -gradient


def without_replacement(queries, key, n=K):
    drawn = draw_without_replacement(queries.detach(), ITEMS, n, key, 1.0)
    return drawn, queries.gather(1, drawn.rows), log_partition(queries, ITEMS, 1.0)


def rest_of(queries, rows):
    """Log-partition of what is not among the rows."""
    return log_partition(queries, ITEMS.to(queries.dtype), 1.0, rows)


def v_pg(set_reward):
    def estimator(queries, key):
        drawn, logits, _ = without_replacement(queries, key)
        return reinforce.top_k(logits, rest_of(queries, drawn.rows), set_reward(drawn.rows))

    return estimator


def v_pg_with_replacement(queries, key):
    drawn, logits, log_z = without_replacement(queries, key)
    return reinforce.top_k_with_replacement(logits, log_z, additive_reward(drawn.rows))


def item_wise(queries, key):
    drawn = draw_with_replacement(queries.detach(), ITEMS, K, key, 1.0)
    log_z = log_partition(queries, ITEMS, 1.0)
    return reinforce.item_wise(queries.gather(1, drawn.rows), log_z, ADDITIVE[drawn.rows])


def plug_in(baseline):
    def estimator(queries, key):
        drawn, logits, _ = without_replacement(queries, key)
        top = torch.topk(queries.detach(), K, dim=1).indices
        is_top = drawn.rows[:, :, None] == top[:, None, :]
        best, rest = queries.gather(1, top), rest_of(queries, top)
        credit = ADDITIVE[drawn.rows]
        if baseline:
            credit = credit - ca_pg.leave_one_out(credit, torch.ones_like(credit, dtype=torch.bool))
        return ca_pg.plug_in(logits, rest, credit, best, is_top)

    return estimator


def top_1(queries, key):
    drawn, logits, log_z = without_replacement(queries, key)
    return ca_pg.with_replacement(logits, log_z, ADDITIVE[drawn.rows])


def threshold(queries, key):
    drawn, logits, _ = without_replacement(queries, key, K + 1)
    return gumbel_threshold.pathwise(
        logits[:, :K], logits[:, K], drawn.perturbed[:, K], ADDITIVE[drawn.rows[:, :K]]
    )


def expected(queries, key):
    drawn, logits, log_z = without_replacement(queries, key)
    log_t = expected_threshold.log_time(queries, torch.full_like(log_z, -torch.inf), K)
    return expected_threshold.credited(logits, log_t, ADDITIVE[drawn.rows])


def swap_additive(queries, key):
    drawn, logits, _ = without_replacement(queries, key, K + 1)
    gain = swap.additive_gain(ADDITIVE[drawn.rows[:, :K]], ADDITIVE[drawn.rows[:, K]])
    return swap.swap(logits[:, :K], drawn.perturbed[:, K], gain)


def swap_any(set_reward):
    def estimator(queries, key):
        drawn, logits, _ = without_replacement(queries, key, K + 1)
        rows, gains = drawn.rows[:, :K], []
        for j in range(K):
            swapped = rows.clone()
            swapped[:, j] = drawn.rows[:, K]
            gains.append(set_reward(rows) - set_reward(swapped))
        return swap.swap(logits[:, :K], drawn.perturbed[:, K], torch.stack(gains, dim=1))

    return estimator


def pl_rank_3(queries, key):
    drawn, logits, _ = without_replacement(queries, key)
    rest = rest_of(queries, drawn.rows)
    every = torch.arange(N)[None, :, None] == drawn.rows[:, None, :]
    place = torch.where(every.any(dim=2), every.to(torch.int8).argmax(dim=2), K)
    return pl_rank.pl_rank_3(logits, rest, ADDITIVE[drawn.rows], queries, ADDITIVE.expand(MANY, -1), place)


UNBIASED = {
    "v-pg": (v_pg(additive_reward), additive_reward),
    "v-pg, misaligned": (v_pg(shown_by_a_misaligned_ranker), shown_by_a_misaligned_ranker),
    "gumbel threshold": (threshold, additive_reward),
    "swap": (swap_additive, additive_reward),
    "swap, any set reward": (swap_any(additive_reward), additive_reward),
    "swap, misaligned": (swap_any(shown_by_a_misaligned_ranker), shown_by_a_misaligned_ranker),
    "pl-rank-3": (pl_rank_3, additive_reward),
}


@pytest.mark.parametrize("spread", [0.3, 2.0])
@pytest.mark.parametrize("name", UNBIASED)
def test_unbiased_estimators_agree_within_sampling_error(name, spread):
    estimator, set_reward = UNBIASED[name]
    phi = logits_of(spread)
    _, gradient = exact(phi, set_reward)
    found = updates(phi, estimator)
    # An item that is next to never drawn has next to no spread either, hence the absolute part.
    error = (found.mean(dim=0) - gradient).abs() / (found.std(dim=0) / math.sqrt(MANY) + 2e-5)
    assert error.max() < 4.5


@pytest.mark.parametrize("name", ["v-pg", "gumbel-threshold", "swap"])
def test_they_are_unbiased_for_what_is_known_where_few_items_have_a_label(name):
    known = np.array([1.0, np.nan, 0.5, np.nan, np.nan, -0.5], dtype=np.float32)
    material = types.SimpleNamespace(
        split=types.SimpleNamespace(excluded=from_padded(np.full((MANY, 1), -1))),
        rewards=lambda _, rows: known[rows],
        trust_of=lambda _, rows: np.ones(len(rows), np.float32),
    )
    config = TrainConfig("d", "i", objective=name, temperature=1.0, list_size=K)
    phi = logits_of(1.0)
    _, gradient = exact(phi, lambda rows: torch.from_numpy(np.nan_to_num(known))[rows].double().sum(dim=1))
    found = updates(
        phi,
        lambda queries, key: list_losses(
            queries, np.arange(MANY), material, ItemMatrix(ITEMS, ITEMS), config, key
        )[0],
    )
    error = (found.mean(dim=0) - gradient).abs() / (found.std(dim=0) / math.sqrt(MANY) + 2e-5)
    assert error.max() < 4.5


def test_item_wise_is_unbiased_for_one_item():
    phi = logits_of(1.0).requires_grad_()
    (gradient,) = torch.autograd.grad((torch.softmax(phi, 0) * ADDITIVE).sum(), phi)
    found = updates(phi.detach(), item_wise)
    error = (found.mean(dim=0) - gradient) / (found.std(dim=0) / math.sqrt(MANY))
    assert error.abs().max() < 4.5


def cosine(estimator, spread):
    worst, total = 1.0, 0.0
    for seed in range(4):
        phi = logits_of(spread, seed)
        found = updates(phi, estimator).mean(dim=0)
        # Adding a constant to all logits changes nothing, so updates are compared without it.
        found, gradient = found - found.mean(), exact(phi, additive_reward)[1]
        value = torch.nn.functional.cosine_similarity(found, gradient, dim=0).item()
        worst, total = min(worst, value), total + value / 4
    return total, worst


@pytest.mark.usefixtures("positive_rewards")
def test_biased_estimators_show_their_bias():
    """The published plug-in is off without a baseline and nearly right with one; TOP1 fails for peaked policies."""
    with_baseline, _ = cosine(plug_in(True), 1.0)
    without, worst = cosine(plug_in(False), 1.0)
    assert with_baseline > 0.98
    assert worst < 0.97
    assert with_baseline > without
    top_1_flat, _ = cosine(top_1, 0.3)
    top_1_peaked, worst_peaked = cosine(top_1, 2.0)
    assert top_1_flat > 0.95
    assert worst_peaked < 0.9
    assert top_1_peaked < top_1_flat


@pytest.mark.parametrize("log_p", [-12.0, -18.0, -25.0])
def test_an_item_of_the_far_tail_is_credited_in_single_precision(log_p):
    found = {}
    for dtype in (torch.float32, torch.float64):
        # One rare item drawn, the two best of a peaked policy beside it.
        logits = torch.tensor([[log_p, -0.7, -1.0]], dtype=dtype, requires_grad=True)
        top, is_top = logits.detach()[:, 1:], torch.tensor([[[False, False], [True, False], [False, True]]])
        top = torch.cat([top, torch.full((1, 1), -3.0, dtype=dtype)], dim=1)
        rest = torch.log1p(-top.exp().sum(dim=1))
        is_top = torch.cat([is_top, torch.zeros(1, 3, 1, dtype=torch.bool)], dim=2)
        log_pi = ca_pg.log_inclusion(logits, rest, top, is_top)
        (gradient,) = torch.autograd.grad(log_pi[0, 0], logits)
        found[dtype] = (log_pi[0, 0].item(), gradient[0, 0].item())
    assert found[torch.float32] == pytest.approx(found[torch.float64], rel=1e-4)
    assert found[torch.float64][1] == pytest.approx(1, rel=1e-3)


def test_the_plug_ins_probabilities_sum_to_more_than_k():
    phi = logits_of(1.0)
    drawn = torch.arange(N)[None]
    top = torch.topk(phi, N).indices
    is_top = drawn[:, :, None] == top[None, None, :]
    # The function takes as many best items as drawn ones; only K − 1 of them are ever removed.
    log_pi = torch.stack(
        [
            ca_pg.log_inclusion(
                torch.cat([phi[a : a + 1], phi[top[: K - 1]]])[None, :],
                torch.logsumexp(phi[top[K:]], 0)[None],
                phi[top[:K]][None],
                (torch.cat([torch.tensor([a]), top[: K - 1]])[:, None] == top[:K][None])[None],
            )[0, 0]
            for a in range(N)
        ]
    )
    assert is_top.any()
    assert K < log_pi.exp().sum() < K + 1
    by_hand = []
    for a in range(N):
        others = [phi[j].item() for j in top.tolist() if j != a]
        missed, left = 1.0, phi.exp().sum().item()
        for k in range(K):
            missed *= 1 - math.exp(phi[a].item()) / left
            left -= math.exp(others[k])
        by_hand.append(1 - missed)
    assert log_pi.exp().tolist() == pytest.approx(by_hand)


@pytest.mark.parametrize("exact_items", [4 * K, 500])
def test_expected_inclusions_sum_to_k_and_are_near_the_true_ones(exact_items):
    """500 items: the sum is K, and each is near what many draws count."""
    phi = torch.randn(500, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 1.5
    k, top = 3, torch.topk(phi, exact_items)
    rest = torch.logsumexp(phi.scatter(0, top.indices, -torch.inf), 0)[None]
    log_t = expected_threshold.log_time(top.values[None], rest, k)
    inclusion = expected_threshold.log_inclusion(phi[None], log_t).exp()[0]
    assert inclusion.sum().item() == pytest.approx(k, rel=0.02 if exact_items < 500 else 1e-6)
    noise = -torch.log(-torch.log(torch.rand(MANY, 500, generator=torch.Generator().manual_seed(4))))
    drawn = torch.topk(phi + noise, k, dim=1).indices
    counted = torch.bincount(drawn.flatten(), minlength=500) / MANY
    assert (inclusion - counted).abs().max() < 0.05
    plug_in_sum = (1 - (1 - torch.softmax(phi, 0)) ** k).sum()  # what drawing with replacement would give
    assert abs(inclusion.sum() - k) < abs(plug_in_sum - k)


def test_the_expected_thresholds_gradient_is_implicit():
    """Against finite differences of the solution found by bisection, the others' linear mass included."""
    phi = torch.randn(2, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(5))

    def log_t(every):
        top = torch.topk(every, 8, dim=1)
        rest = torch.logsumexp(every.scatter(1, top.indices, -torch.inf), dim=1)
        return expected_threshold.log_time(top.values, rest, 3)

    def bisection(every):
        top, low = torch.topk(every, 8, dim=1).values, torch.full((2,), -20.0, dtype=torch.float64)
        rest = torch.exp(every).sum(dim=1) - torch.exp(top).sum(dim=1)
        high = -low
        for _ in range(200):
            middle = (low + high) / 2
            passed = (1 - torch.exp(-torch.exp(top + middle[:, None]))).sum(dim=1) + rest * torch.exp(middle)
            low, high = torch.where(passed < 3, middle, low), torch.where(passed < 3, high, middle)
        return low

    assert torch.allclose(log_t(phi), bisection(phi), atol=1e-9)
    assert gradcheck(log_t, (phi.clone().requires_grad_(),))


def test_a_peaked_policy_keeps_what_rings_late():
    """One item holds all of the mass that float32 can see; K − 1 of the list come from the others all the same."""
    phi = torch.cat([torch.full((1, 1), 60.0), torch.zeros(1, 999)], dim=1)
    top = torch.topk(phi, 8, dim=1)
    rest = torch.logsumexp(phi.scatter(1, top.indices, -torch.inf), dim=1)
    inclusion = expected_threshold.log_inclusion(phi, expected_threshold.log_time(top.values, rest, 3)).exp()[
        0
    ]
    assert inclusion[0] == 1
    assert inclusion[1:].tolist() == pytest.approx([2 / 999] * 999, rel=0.01)


@pytest.mark.usefixtures("positive_rewards")
def test_the_expected_threshold_is_less_biased_than_the_plug_in_and_quieter_than_unbiased_ones():
    for spread in (0.3, 1.0):
        ours, _ = cosine(expected, spread)
        published, _ = cosine(plug_in(False), spread)
        assert ours > published
    phi = logits_of(1.0)
    quiet, loud = (
        updates(phi, expected).var(dim=0).sum(),
        updates(phi, v_pg(additive_reward)).var(dim=0).sum(),
    )
    assert quiet < loud / 5


@pytest.mark.usefixtures("positive_rewards")
def test_variances_are_as_claimed():
    """Credit assignment reduces variance: swap and PL-Rank against V-PG; V-PG's grows with the spread of R."""
    phi = logits_of(1.0)
    variance = {name: updates(phi, UNBIASED[name][0]).var(dim=0).sum().item() for name in UNBIASED}
    assert variance["swap"] < variance["v-pg"] / 10
    assert variance["swap, misaligned"] < variance["v-pg, misaligned"] / 5
    assert variance["pl-rank-3"] < variance["v-pg"]


@pytest.mark.parametrize("size", [1e4, 1.0])
@pytest.mark.parametrize("k", [1, 3, N - 1])
def test_extreme_scores_stay_finite(size, k):
    for phi in (torch.tensor([1.0, 0, 0, 0, 0, 0]), torch.zeros(N), torch.linspace(-1, 1, N)):
        queries = (phi * size)[None].expand(8, -1).clone().requires_grad_()
        items = ITEMS.float()
        drawn = draw_without_replacement(queries.detach(), items, k + 1, Key(0, 0, torch.arange(8)), 1.0)
        every = queries.gather(1, drawn.rows)
        logits, log_z = every[:, :k], log_partition(queries, items, 1.0)
        reward = ADDITIVE.float()[drawn.rows]
        none = torch.full_like(log_z, -torch.inf)
        top = torch.topk(queries.detach(), k, dim=1).indices
        is_top = drawn.rows[:, :k, None] == top[:, None, :]
        rest, best_rest = rest_of(queries, drawn.rows[:, :k]), rest_of(queries, top)
        place = torch.arange(k).expand(8, -1)
        losses = [
            reinforce.top_k(logits, rest, reward.sum(dim=1)),
            reinforce.item_wise(logits, log_z, reward[:, :k]),
            ca_pg.plug_in(logits, best_rest, reward[:, :k], queries.gather(1, top), is_top),
            ca_pg.with_replacement(logits, log_z, reward[:, :k]),
            gumbel_threshold.pathwise(logits, every[:, k], drawn.perturbed[:, k], reward[:, :k]),
            swap.swap(logits, drawn.perturbed[:, k], swap.additive_gain(reward[:, :k], reward[:, k])),
            expected_threshold.credited(logits, expected_threshold.log_time(queries, none, k), reward[:, :k]),
            pl_rank.pl_rank_3(logits, rest, reward[:, :k], logits, reward[:, :k], place),
        ]
        for loss in losses:
            assert torch.isfinite(loss).all()
            (gradient,) = torch.autograd.grad(loss.sum(), queries, retain_graph=True)
            assert torch.isfinite(gradient).all()


def test_k_equal_to_n_is_finite():
    queries = logits_of(1.0)[None].requires_grad_()
    drawn = draw_without_replacement(queries.detach(), ITEMS, N, Key(0, 0, torch.arange(1)), 1.0)
    logits, none = queries.gather(1, drawn.rows), torch.full((1,), -torch.inf, dtype=torch.float64)
    loss = reinforce.top_k(logits, none, torch.ones(1, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(loss.sum(), queries)
    assert torch.isfinite(gradient).all()


def test_gradients_of_the_shared_pieces():
    logits = torch.randn(2, 3, dtype=torch.float64).requires_grad_()
    log_rest = torch.randn(2, dtype=torch.float64).requires_grad_()
    assert gradcheck(log_remaining, (logits, log_rest))
    assert gradcheck(log_included, (torch.linspace(-20, 3, 12, dtype=torch.float64).requires_grad_(),))


@pytest.mark.parametrize("name", ["v-pg", "pl-rank", "ca-pg", "ca-pg-loo"])
def test_gradients_of_a_peaked_policy_are_right_in_single_precision(name):
    """Beside an item that holds all of the mass but a ten-millionth, log Z in single precision is that item."""
    n, k, dimension = 3000, 20, 64
    draw = torch.Generator().manual_seed(3)
    items = torch.randn(n, dimension, generator=draw, dtype=torch.float64)
    items = torch.nn.functional.normalize(items, dim=1)
    queries = torch.nn.functional.normalize(items[:4] + 0.2 * items[4:8], dim=1)
    reward = (torch.rand(n, generator=draw) < 0.2).numpy().astype(np.float32)
    rewarded = np.flatnonzero(reward)
    material = types.SimpleNamespace(
        split=types.SimpleNamespace(excluded=from_padded(np.full((4, 1), -1))),
        rewards=lambda _, rows: reward[rows],
        trust_of=lambda _, rows: np.ones(len(rows), np.float32),
        rewarded_of=lambda queries: (
            np.tile(rewarded, (len(queries), 1)),
            np.ones((4, len(rewarded)), np.float32),
        ),
    )
    config = TrainConfig("d", "i", objective=name, temperature=0.03, list_size=k)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        embeddings = queries.to(dtype).requires_grad_()
        matrix = ItemMatrix(items.to(dtype), items.to(dtype))
        losses, _ = list_losses(
            embeddings, np.arange(4), material, matrix, config, Key(0, 0, torch.arange(4))
        )
        gradients.append(torch.autograd.grad(losses.sum(), embeddings)[0].double())
    single, double = gradients
    assert torch.linalg.norm(single - double, dim=1) == pytest.approx(
        0, abs=1e-3 * double.norm(dim=1).max().item()
    )


def test_padding_of_what_is_rewarded_earns_nothing():
    """Row 0 stands for padding, and was drawn long before what is left."""
    items = torch.tensor([[1.0], [0.05], [0.04], [0.03], [0.02]])
    material = types.SimpleNamespace(
        split=types.SimpleNamespace(excluded=from_padded(np.full((1, 1), -1))),
        rewards=lambda _, rows: (rows == 1).astype(np.float32),
        trust_of=lambda _, rows: np.ones(len(rows), np.float32),
        rewarded_of=lambda queries: (np.array([[1, -1]]), np.array([[1.0, 0.0]], np.float32)),
    )
    embeddings = torch.ones(1, 1, requires_grad=True)
    config = TrainConfig("d", "i", objective="pl-rank", temperature=0.005, list_size=2)
    key = Key(0, 0, torch.arange(1))
    losses, _ = list_losses(embeddings, np.arange(1), material, ItemMatrix(items, items), config, key)
    assert torch.isfinite(losses).all()
    assert torch.isfinite(torch.autograd.grad(losses.sum(), embeddings)[0]).all()


@pytest.mark.parametrize("name", ["ca-pg", "ca-pg-loo"])
def test_items_without_a_label_get_no_credit(name, monkeypatch):
    """Only item 3 has a label: whatever else the list holds, the loss is of its inclusion alone."""
    items = torch.eye(6)
    material = types.SimpleNamespace(
        split=types.SimpleNamespace(excluded=from_padded(np.full((1, 1), -1))),
        rewards=lambda _, rows: np.where(rows == 3, 1.0, np.nan).astype(np.float32),
        trust_of=lambda _, rows: np.ones(len(rows), np.float32),
    )
    seen = []
    real = ca_pg.plug_in
    monkeypatch.setattr(
        ca_pg,
        "plug_in",
        lambda logits, rest, credit, *more: seen.append(credit) or real(logits, rest, credit, *more),
    )
    embeddings = torch.tensor([[0.1, 0.0, 0.0, 0.5, 0.0, 0.2]], requires_grad=True)
    config = TrainConfig("d", "i", objective=name, temperature=1.0, list_size=4)
    for step in range(20):
        key = Key(0, step, torch.arange(1))
        losses, rewards = list_losses(
            embeddings, np.arange(1), material, ItemMatrix(items, items), config, key
        )
        assert torch.isfinite(losses).all()
        assert seen[-1].numpy() == pytest.approx(np.nan_to_num(rewards))


def test_the_baseline_is_of_the_others_that_are_known():
    reward, known = torch.tensor([[1.0, 0.0, 0.0, 0.5]]), torch.tensor([[True, False, True, True]])
    found = ca_pg.leave_one_out(reward, known)
    assert found[0].tolist() == pytest.approx([0.25, 0.5, 0.75, 0.5])
    assert ca_pg.leave_one_out(reward[:, :1], known[:, :1]).tolist() == [[0.0]]


def test_a_list_of_all_items_but_one_leaves_that_one():
    draw = torch.Generator().manual_seed(4)
    items = torch.randn(12, 5, generator=draw, dtype=torch.float64)
    embeddings = torch.randn(3, 5, generator=draw, dtype=torch.float64).requires_grad_()
    excluded = torch.tensor([[-1], [-1], [2]])  # two queries have one item left, the third has none
    material = types.SimpleNamespace(
        split=types.SimpleNamespace(excluded=from_padded(excluded.numpy())),
        rewards=lambda _, rows: np.ones(len(rows), np.float32),
        trust_of=lambda _, rows: np.ones(len(rows), np.float32),
    )
    config = TrainConfig("d", "i", objective="v-pg", temperature=1.0, list_size=11)
    key, matrix = Key(0, 0, torch.arange(3)), ItemMatrix(items, items)
    losses, _ = list_losses(embeddings, np.arange(3), material, matrix, config, key)
    (found,) = torch.autograd.grad(losses.sum(), embeddings)
    rows = matrix.draw(embeddings, 11, key, 1.0, excluded, replacement=False).rows
    logits = (embeddings @ items.T).masked_fill(torch.arange(12) == excluded, -torch.inf)
    log_p = 0.0
    for k in range(11):
        gone = (rows[:, None, :k] == torch.arange(12)[None, :, None]).any(dim=2)
        left = torch.logsumexp(logits.masked_fill(gone, -torch.inf), dim=1)
        log_p = log_p + logits.gather(1, rows[:, k : k + 1])[:, 0] - left
    (expected,) = torch.autograd.grad(-11 * log_p.sum(), embeddings)
    assert torch.allclose(found, expected, atol=1e-9)
