"""Objectives against formulas written out in numpy, and their gradients against finite differences."""

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from novelret.train.objectives import pg_ret
from novelret.train.objectives.supervised import infonce

torch.manual_seed(0)
SCORE = torch.rand(6, dtype=torch.float64) * 2 - 1
NEGATIVES = torch.rand(6, 4, dtype=torch.float64) * 2 - 1
MASK = torch.tensor([[True] * 4, [True, False, True, True]] * 3)
REWARD = torch.tensor([1.0, 1.0, -1.0, -1.0, 0.5, -2.0], dtype=torch.float64)
TAU = 0.3


def test_contrastive_is_the_papers_formula():
    loss = pg_ret.contrastive(SCORE, NEGATIVES, MASK, REWARD, TAU).numpy()
    for s in range(6):
        own = np.exp(SCORE[s].item() / TAU)
        others = sum(np.exp(NEGATIVES[s, m].item() / TAU) for m in range(4) if MASK[s, m])
        select = own / (own + others)
        reward = REWARD[s].item()
        expected = -reward * np.log(select) if reward > 0 else -abs(reward) * np.log(1 - select)
        assert loss[s] == pytest.approx(expected, abs=1e-12)


def test_conservative_is_a_triplet_loss_with_margin_zero():
    score = torch.tensor([0.2, 0.9, 0.2, 0.9])
    top = torch.full((4, 1), 0.5)
    reward = torch.tensor([1.0, 1.0, -1.0, -2.0])
    assert pg_ret.conservative(score, top, reward).tolist() == pytest.approx([0.3, 0.0, 0.0, 0.8])


def test_inclusion_is_the_gumbel_formula_around_the_mean_of_the_window():
    loss = pg_ret.inclusion(SCORE, NEGATIVES, MASK, REWARD, TAU).numpy()
    for s in range(6):
        kappa = NEGATIVES[s][MASK[s]].mean().item()
        rate = np.exp((SCORE[s].item() - kappa) / TAU)
        inside = 1 - np.exp(-rate)
        reward = REWARD[s].item()
        expected = -reward * np.log(inside) if reward > 0 else abs(reward) * np.log1p(rate)
        assert loss[s] == pytest.approx(expected, rel=1e-9)


def test_inclusion_is_the_chance_of_clearing_the_threshold_by_gumbel_noise():
    rewards = torch.ones(6, dtype=torch.float64)
    kappa = (NEGATIVES * MASK).sum(dim=1) / MASK.sum(dim=1)
    inside = np.exp(-pg_ret.inclusion(SCORE, NEGATIVES, MASK, rewards, TAU).numpy())
    noise = np.random.default_rng(0).gumbel(size=(200_000, 6))
    assert inside == pytest.approx(
        (SCORE.numpy() / TAU + noise > kappa.numpy() / TAU).mean(axis=0), abs=0.005
    )


def test_infonce_leaves_known_positives_out_of_the_negatives():
    scores = torch.tensor([[0.5, 0.1, 0.9]], dtype=torch.float64)
    known = torch.tensor([[True, False, True]])
    loss = infonce(scores, torch.tensor([0]), known, TAU)
    expected = -np.log(np.exp(0.5 / TAU) / (np.exp(0.5 / TAU) + np.exp(0.1 / TAU)))
    assert loss.item() == pytest.approx(expected)


def test_infonce_is_cross_entropy_without_known_positives():
    scores = torch.randn(5, 5, dtype=torch.float64)
    loss = infonce(scores, torch.arange(5), torch.zeros(5, 5, dtype=torch.bool), TAU)
    expected = torch.nn.functional.cross_entropy(scores / TAU, torch.arange(5), reduction="none")
    assert torch.allclose(loss, expected)


LOSSES = [
    lambda s, n: pg_ret.contrastive(s, n, MASK, REWARD, TAU),
    lambda s, n: pg_ret.conservative(s, n[:, :1], REWARD),
    lambda s, n: pg_ret.inclusion(s, n, MASK, REWARD, TAU),
]


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients(loss):
    assert gradcheck(loss, (SCORE.clone().requires_grad_(), NEGATIVES.clone().requires_grad_()))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("size", [1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_scores_stay_finite(loss, size, dtype):
    for sign in (1, -1):
        score = (torch.full((6,), sign * size)).to(dtype).requires_grad_()
        negatives = (torch.full((6, 4), -sign * size)).to(dtype).requires_grad_()
        value = loss(score, negatives).sum()
        value.backward()
        assert torch.isfinite(value)
        assert torch.isfinite(score.grad).all()
        assert torch.isfinite(negatives.grad).all()


@pytest.mark.parametrize("loss", [LOSSES[0], LOSSES[2]])
def test_no_state_pulls_harder_than_its_reward_over_the_temperature(loss):
    """Else a single item that is far on the wrong side would decide the step of its whole batch."""
    for sign in (1, -1):
        score = (sign * torch.full((6,), 5.0, dtype=torch.float64)).requires_grad_()
        loss(score, -sign * torch.ones(6, 4, dtype=torch.float64)).sum().backward()
        assert (score.grad.abs() <= REWARD.abs() / TAU + 1e-9).all()


@pytest.mark.parametrize("form", [pg_ret.contrastive, pg_ret.inclusion])
@pytest.mark.parametrize("reward", [1.0, -1.0])
def test_a_state_without_negatives_has_no_loss(form, reward):
    score = torch.tensor([0.5], requires_grad=True)
    nothing = torch.zeros(1, 2, dtype=torch.bool)
    loss = form(score, torch.zeros(1, 2), nothing, torch.tensor([reward]), TAU)
    loss.sum().backward()
    assert loss.item() == 0
    assert score.grad.item() == 0


def test_rewards_pull_the_right_way():
    for loss in LOSSES:
        score = torch.full((6,), -0.5, dtype=torch.float64, requires_grad=True)
        value = loss(score, torch.zeros(6, 4, dtype=torch.float64))
        value.sum().backward()
        assert (score.grad[REWARD > 0] < 0).all()
        assert (score.grad[REWARD < 0] >= 0).all()
