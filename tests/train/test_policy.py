"""The streamed policy against torch.logsumexp, and its draws against the exact softmax."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch.autograd import gradcheck

from novelret.errors import UserError
from novelret.progress import Reporter
from novelret.shard import Shard
from novelret.train import sampler
from novelret.train.matrix import ItemMatrix, open_matrix
from tests.train.conftest import log_partition

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
    found = log_partition(queries, ITEMS, TAU, EXCLUDED, block)
    assert torch.allclose(found, torch.logsumexp(exact_logits(QUERIES), dim=1))
    (gradient,) = torch.autograd.grad(found.sum(), queries)
    (expected,) = torch.autograd.grad(torch.logsumexp(exact_logits(queries), dim=1).sum(), queries)
    assert torch.allclose(gradient, expected)
    assert gradcheck(lambda q: log_partition(q, ITEMS, TAU, EXCLUDED, block), (queries,))


@pytest.mark.parametrize(
    "items", [ITEMS.numpy().astype(np.float16), ITEMS.half(), ITEMS.bfloat16(), ITEMS.float().numpy()]
)
def test_stored_precisions_are_read(items):
    found = log_partition(QUERIES, items, TAU, EXCLUDED)
    assert torch.allclose(found, torch.logsumexp(exact_logits(QUERIES), dim=1), atol=0.02)


def test_entropy_is_exact():
    logits = exact_logits(QUERIES)
    expected = torch.distributions.Categorical(logits=logits).entropy()
    assert torch.allclose(ItemMatrix(ITEMS, ITEMS).entropy(QUERIES, TAU, EXCLUDED), expected)


@pytest.mark.parametrize("scale", [1e4, 1e-4])
def test_extreme_scores_stay_finite(scale):
    queries = (QUERIES * scale).float().requires_grad_()
    value = log_partition(queries, ITEMS.float(), 1.0)
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(queries.grad).all()


def test_a_gpu_too_small_for_the_items_reads_them_from_the_host(monkeypatch):
    def too_small(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    matrix, report = ITEMS.numpy(), Reporter()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", too_small)
        held = open_matrix(matrix, "cpu:0", report)  # as on a GPU
    assert held.held is matrix
    assert "--dtype float16" in report.warnings[0]
    assert "torchrun" in report.warnings[0]
    found = held.log_partition(QUERIES, TAU, EXCLUDED)
    assert torch.allclose(found, torch.logsumexp(exact_logits(QUERIES), dim=1))
    assert torch.equal(held.rows(torch.tensor([3, 0]), QUERIES), ITEMS[[3, 0]].float().double())
    fits = open_matrix(matrix, "cpu:0", report)
    assert isinstance(fits.held, torch.Tensor)
    assert len(report.warnings) == 1


def test_everything_left_out_is_the_users_error():
    everything = torch.arange(37)[None].repeat(4, 1)
    with pytest.raises(UserError, match="every item is left out"):
        log_partition(QUERIES, ITEMS, TAU, everything)
    with pytest.raises(UserError, match="every item is left out"):
        sampler.draw_with_replacement(QUERIES, ITEMS, 1, sampler.Key(0, 0, torch.arange(4)), TAU, everything)
    with pytest.raises(UserError, match="must be above 0"):
        log_partition(QUERIES, ITEMS, 0.0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_scores_that_are_not_finite_are_the_users_error_wherever_they_stand(monkeypatch, value):
    cut(4, 2, monkeypatch)
    top = torch.topk(QUERIES @ ITEMS.T, 10, dim=1)
    for row in (0, 17, 36):
        items = ITEMS.clone()
        items[row] = QUERIES[3] * value
        for draw in (sampler.draw_with_replacement, sampler.draw_without_replacement):
            with pytest.raises(UserError, match="scores are not finite"):
                draw(QUERIES[3:], items, 5, key([3]), TAU, EXCLUDED[3:], block=12)
        scores = top.values.clone()
        scores[3, row // 4] = value
        with pytest.raises(UserError, match="query 3 of the batch: scores are not finite"):
            sampler.draw_from_top(top.indices, scores, 5, key(range(4)), TAU)


def key(places, step=0):
    return sampler.Key(0, step, torch.as_tensor(places))


def exact_probability():
    return torch.softmax(exact_logits(QUERIES), dim=1)


def check_counts(seen, expected):
    """Chi-square of counts against expected ones, rare outcomes lumped together."""
    assert seen[expected == 0].sum() == 0
    often = expected > 5
    counts, means = ([*x[often], x[~often].sum()] for x in (seen, expected))
    if means[-1] == 0:
        counts, means = counts[:-1], means[:-1]
    assert stats.chisquare(counts, np.array(means) * sum(counts) / sum(means)).pvalue > 1e-4


def cut(cell, part, monkeypatch):
    monkeypatch.setattr(sampler, "CELL", cell)
    monkeypatch.setattr(sampler, "PART", part)


@pytest.fixture(params=[(4, 2), (8, 4), (21, 3), (4096, 64)])
def cells(request, monkeypatch):
    cut(*request.param, monkeypatch)


@pytest.mark.usefixtures("cells")
def test_draws_with_replacement_follow_the_exact_softmax():
    drawn = sampler.draw_with_replacement(QUERIES, ITEMS, 20_000, key(range(4)), TAU, EXCLUDED, block=28)
    probability = exact_probability()
    for q in range(4):
        check_counts(np.bincount(drawn.rows[q].numpy(), minlength=37), probability[q].numpy() * 20_000)


@pytest.mark.usefixtures("cells")
def test_draws_without_replacement_are_plackett_luce():
    """Counts of all ordered pairs against p(a) p(b) / (1 − p(a)), many places of one query at once."""
    many = 60_000
    probability = exact_probability()[2].numpy()
    drawn = sampler.draw_without_replacement(
        QUERIES[2:3].expand(many, -1),
        ITEMS,
        2,
        key(range(many)),
        TAU,
        EXCLUDED[2:3].expand(many, -1),
        block=28,
    )
    a, b = drawn.rows.numpy().T
    assert (a != b).all()
    order = np.outer(probability, probability) / (1 - probability)[:, None]
    np.fill_diagonal(order, 0)
    check_counts(np.bincount(a * 37 + b, minlength=37 * 37), order.ravel() * many)
    # The perturbed scores are Gumbel order statistics: the largest is Gumbel around log Z.
    largest = (drawn.perturbed[:, 0] - torch.logsumexp(exact_logits(QUERIES), dim=1)[2]).numpy()
    assert stats.kstest(largest, stats.gumbel_r.cdf).pvalue > 1e-4


def test_perturbed_scores_have_the_right_gaps():
    """κ, the third largest, against plain noise on every item."""
    many = 20_000
    drawn = sampler.draw_without_replacement(QUERIES[:1].expand(many, -1), ITEMS, 3, key(range(many)), TAU)
    plain = (QUERIES[:1] @ ITEMS.T / TAU).numpy() + np.random.default_rng(0).gumbel(size=(many, 37))
    for place in range(3):
        theirs = np.sort(plain, axis=1)[:, -1 - place]
        assert stats.ks_2samp(drawn.perturbed[:, place].numpy(), theirs).pvalue > 1e-4


@pytest.mark.parametrize("draw", [sampler.draw_with_replacement, sampler.draw_without_replacement])
def test_draws_do_not_depend_on_blocks_company_or_device_order(monkeypatch, draw):
    cut(4, 2, monkeypatch)
    whole = draw(QUERIES, ITEMS, 6, key(range(4)), TAU, EXCLUDED, block=40)
    for block in (4, 12):
        assert torch.equal(
            draw(QUERIES, ITEMS, 6, key(range(4)), TAU, EXCLUDED, block=block).rows, whole.rows
        )
    alone = draw(QUERIES[2:3], ITEMS, 6, key([2]), TAU, EXCLUDED[2:3])
    assert torch.equal(alone.rows[0], whole.rows[2])
    assert not torch.equal(draw(QUERIES, ITEMS, 6, key(range(4), step=1), TAU, EXCLUDED).rows, whole.rows)


def test_the_whole_catalog_can_be_drawn_and_no_more():
    drawn = sampler.draw_without_replacement(QUERIES[:1], ITEMS, 35, key([0]), TAU, EXCLUDED[:1])
    assert sorted(drawn.rows[0].tolist()) == [r for r in range(37) if r not in (0, 36)]
    with pytest.raises(UserError, match="fewer than 36 items are left"):
        sampler.draw_without_replacement(QUERIES[:1], ITEMS, 36, key([0]), TAU, EXCLUDED[:1])


def test_extreme_scores_are_drawn():
    for scale in (1e4, 1e-4):
        queries = (QUERIES * scale).float()
        for draw in (sampler.draw_with_replacement, sampler.draw_without_replacement):
            drawn = draw(queries, ITEMS.float(), 5, key(range(4)), 1.0)
            assert (drawn.rows >= 0).all()
            assert drawn.perturbed is None or torch.isfinite(drawn.perturbed).all()
    dominating = torch.cat([torch.ones(1, 6), -torch.ones(36, 6)]) * 100
    drawn = sampler.draw_without_replacement(torch.ones(3, 6), dominating, 2, key(range(3)), 1.0)
    assert (drawn.rows[:, 0] == 0).all()


def test_approximate_draws_keep_to_the_top_items_in_proportion():
    scores = QUERIES @ ITEMS.T
    top = torch.topk(scores, 10, dim=1)
    drawn = sampler.draw_from_top(top.indices, top.values, 20_000, key(range(4)), TAU)
    inside = torch.softmax(scores / TAU, dim=1).gather(1, top.indices)
    for q in range(4):
        seen = np.bincount(drawn.rows[q].numpy(), minlength=37)[top.indices[q].numpy()]
        check_counts(seen, (inside[q] / inside[q].sum()).numpy() * 20_000)


def _one_of_two(rank, path, results):
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    sampler.CELL, sampler.PART = 4, 2
    first = rank * 20
    shard = Shard(first)
    mine = ITEMS[first : first + 20]
    for draw in (sampler.draw_with_replacement, sampler.draw_without_replacement):
        drawn = draw(QUERIES, mine, 6, key(range(4)), TAU, EXCLUDED, shard=shard)
        results[rank, draw.__name__] = (drawn.rows, drawn.perturbed)
        broken = mine.clone()
        if rank == 1:  # the other process hears of it
            broken[3, 0] = torch.nan
        with pytest.raises(UserError, match="query 0 of the batch: scores are not finite"):
            draw(QUERIES, broken, 6, key(range(4)), TAU, EXCLUDED, shard=shard)
    torch.distributed.destroy_process_group()


def test_two_processes_draw_what_one_draws(monkeypatch, tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        results = manager.dict()
        workers = [
            context.Process(target=_one_of_two, args=(r, tmp_path / "rendezvous", results)) for r in range(2)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(120)
        assert [worker.exitcode for worker in workers] == [0, 0]
        found = dict(results)
    cut(4, 2, monkeypatch)
    for draw in (sampler.draw_with_replacement, sampler.draw_without_replacement):
        whole = draw(QUERIES, ITEMS, 6, key(range(4)), TAU, EXCLUDED)
        for rank in range(2):
            rows, perturbed = found[rank, draw.__name__]
            assert torch.equal(rows, whole.rows)
            assert perturbed is whole.perturbed is None or torch.allclose(perturbed, whole.perturbed)
