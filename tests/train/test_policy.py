"""The streamed policy against torch.logsumexp, and its draws against the exact softmax."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch.autograd import gradcheck

from novelret.errors import UserError
from novelret.train import policy, sampler

torch.manual_seed(0)
QUERIES = torch.nn.functional.normalize(torch.randn(4, 6, dtype=torch.float64), dim=1)
ITEMS = torch.nn.functional.normalize(torch.randn(37, 6, dtype=torch.float64), dim=1)
EXCLUDED = torch.tensor([[0, 36], [-1, -1], [5, -1], [9, 9]])
TAU = 0.2


def exact_logits(queries):
    logits = queries @ ITEMS.T / TAU
    for q, rows in enumerate(EXCLUDED.tolist()):
        for row in rows:
            if row >= 0:
                logits = logits.clone()
                logits[q, row] = -torch.inf
    return logits


@pytest.mark.parametrize("block", [1, 5, 37, 1000])
def test_log_partition_and_its_gradient_are_exact(block):
    queries = QUERIES.clone().requires_grad_()
    found = policy.log_partition(queries, ITEMS, TAU, EXCLUDED, block)
    assert torch.allclose(found, torch.logsumexp(exact_logits(QUERIES), dim=1))
    (gradient,) = torch.autograd.grad(found.sum(), queries)
    (expected,) = torch.autograd.grad(torch.logsumexp(exact_logits(queries), dim=1).sum(), queries)
    assert torch.allclose(gradient, expected)
    assert gradcheck(lambda q: policy.log_partition(q, ITEMS, TAU, EXCLUDED, block), (queries,))


@pytest.mark.parametrize(
    "items", [ITEMS.numpy().astype(np.float16), ITEMS.half(), ITEMS.bfloat16(), ITEMS.float().numpy()]
)
def test_stored_precisions_are_read(items):
    found = policy.log_partition(QUERIES, items, TAU, EXCLUDED)
    assert torch.allclose(found, torch.logsumexp(exact_logits(QUERIES), dim=1), atol=0.02)


def test_entropy_is_exact():
    logits = exact_logits(QUERIES)
    expected = torch.distributions.Categorical(logits=logits).entropy()
    assert torch.allclose(policy.entropy(QUERIES, ITEMS, TAU, EXCLUDED), expected)


@pytest.mark.parametrize("scale", [1e4, 1e-4])
def test_extreme_scores_stay_finite(scale):
    queries = (QUERIES * scale).float().requires_grad_()
    value = policy.log_partition(queries, ITEMS.float(), 1.0)
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(queries.grad).all()


def test_everything_left_out_is_the_users_error():
    everything = torch.arange(37)[None].repeat(4, 1)
    with pytest.raises(UserError, match="every item is left out"):
        policy.log_partition(QUERIES, ITEMS, TAU, everything)
    with pytest.raises(UserError, match="every item is left out"):
        sampler.draw_with_replacement(QUERIES, ITEMS, np.zeros((4, 2)), TAU, everything)
    with pytest.raises(UserError, match="must be above 0"):
        policy.log_partition(QUERIES, ITEMS, 0.0)


def draw(n, cells_of=4):
    numbers = sampler.uniform_numbers(0, 0, np.arange(4), 2 * n)
    return sampler.draw_with_replacement(QUERIES, ITEMS, numbers, TAU, EXCLUDED, cells_of)


@pytest.mark.parametrize("cell", [4, 7, 4096])
def test_draws_follow_the_exact_softmax(monkeypatch, cell):
    monkeypatch.setattr(sampler, "CELL", cell)
    drawn = draw(20_000)
    probability = torch.softmax(exact_logits(QUERIES), dim=1)
    assert torch.allclose(drawn.log_probability, probability.log().gather(1, drawn.rows))
    for q in range(4):
        seen = np.bincount(drawn.rows[q].numpy(), minlength=37)
        expected = probability[q].numpy() * 20_000
        assert seen[expected == 0].sum() == 0
        often = expected > 5
        counts, means = ([*x[often], x[~often].sum()] for x in (seen, expected))
        if means[-1] == 0:
            counts, means = counts[:-1], means[:-1]
        assert stats.chisquare(counts, means).pvalue > 1e-4


def test_draws_do_not_depend_on_blocks_or_on_company(monkeypatch):
    monkeypatch.setattr(sampler, "CELL", 5)
    whole = draw(50)
    assert torch.equal(draw(50, cells_of=1).rows, whole.rows)
    numbers = sampler.uniform_numbers(0, 0, np.array([2]), 100)
    alone = sampler.draw_with_replacement(QUERIES[2:3], ITEMS, numbers, TAU, EXCLUDED[2:3])
    assert torch.equal(alone.rows[0], whole.rows[2])


def test_another_step_draws_anew_and_the_same_step_the_same():
    first, again, other = (sampler.uniform_numbers(3, step, np.arange(8), 4) for step in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
