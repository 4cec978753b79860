"""Which states a step trains on, and that a batch's loss does not depend on how it is cut."""

import contextlib
import dataclasses

import numpy as np
import pytest
import torch

from novelret.blocks import check_embeddings
from novelret.data.split import make_split
from novelret.errors import UserError
from novelret.label.table import IRRELEVANT, make_table
from novelret.train.config import LIST_OBJECTIVES, TrainConfig, check_config, check_list_size
from novelret.train.list_step import list_losses
from novelret.train.matrix import ItemMatrix
from novelret.train.noise import uniform
from novelret.train.rewards import load_reward
from novelret.train.sampler import Key
from novelret.train.states import BASE, FEEDBACK, POLICY, draw_batch, gather_material, shuffled
from novelret.train.step import batch_loss
from tests.rows import from_padded

RNG = np.random.default_rng(0)
Q, N, L, DEPTH = 12, 90, 5, 30
ITEMS = RNG.normal(size=(N, 8)).astype(np.float32)
ITEMS /= np.linalg.norm(ITEMS, axis=1, keepdims=True)
MATRIX = ItemMatrix(ITEMS, ITEMS)
QUERIES = torch.nn.functional.normalize(torch.from_numpy(RNG.normal(size=(Q, 8)).astype(np.float32)), dim=1)


@pytest.fixture(scope="module")
def material():
    lists = np.argsort(-(QUERIES.numpy() @ ITEMS.T), axis=1)[:, :DEPTH]
    feedback = np.stack([np.repeat(np.arange(Q), 3), RNG.integers(0, N, 3 * Q)])
    split = make_split(
        "train", [str(q) for q in range(Q)], ["x"] * Q, *feedback, from_padded(np.full((Q, 1), -1))
    )
    judged = np.concatenate([lists[:, :20], RNG.integers(0, N, (Q, 5))], axis=1)
    labels = make_table(np.repeat(np.arange(Q), 25), judged.ravel(), RNG.integers(-1, 2, Q * 25), N)
    return gather_material(split, lists, L, labels, load_reward("eq7"))


def config(**changes):
    settings = {
        "batch_size": 24,
        "base_depth": L,
        "depth": DEPTH,
        "labels": "x",
        "list_size": 6,
        "negatives": 3,
    }
    return TrainConfig("data", "index", **(settings | changes))


def test_shares_of_the_mixture(material):
    batch = draw_batch(material, config(alpha=0.25, gamma=0.25, draw="states"), 3)
    assert [(batch.sources == s).sum() for s in (FEEDBACK, BASE, POLICY)] == [6, 12, 6]
    assert (batch.items[batch.sources == POLICY] == -1).all()
    assert (batch.rewards[batch.sources == BASE] == 1).all()
    assert draw_batch(material, config(objective="supervised"), 0).sources.tolist() == [FEEDBACK] * 24


def test_labelled_draws_are_novel_and_relevant_or_as_asked(material):
    batch = draw_batch(material, config(gamma=0.0, draw="states", negative_share=0.25), 0)
    assert (batch.rewards > 0).sum() == 18
    assert (batch.rewards < 0).sum() == 6
    for q, i, r in zip(batch.queries, batch.items, batch.rewards, strict=True):
        assert (i in material.base_rows[q, :L]) == (r < 0)


def test_a_drawn_query_brings_all_its_positive_states_in_one_pass(material):
    batch = draw_batch(material, config(gamma=0.25, per_query=4), 1)
    assert batch.passes[0] == 0
    assert np.unique(batch.passes).tolist() == list(range(24))
    assert (batch.passes[: 24 // 4] == np.arange(6)).all()  # feedback: one pair a pass
    for number in range(6, 24):
        here = batch.passes == number
        (query,) = set(batch.queries[here].tolist())
        known = set(material.positives[material.positives[:, 0] == query][:, 1].tolist())
        drawn = batch.items[here].tolist()
        assert set(drawn) <= known
        assert len(set(drawn)) == len(drawn) == min(4, len(known))
    assert batch.queries_of(np.array([7, 23])).tolist() == [
        batch.queries[batch.passes == 7][0], batch.queries[batch.passes == 23][0],
    ]  # fmt: skip
    assert batch.states_of(np.array([0, 7])).tolist() == [0, *np.flatnonzero(batch.passes == 7)]


def test_plain_draws_are_the_ranks_beyond_l_and_may_be_unknown(material):
    batch = draw_batch(material, config(gamma=0.0, draw="plain", batch_size=400), 0)
    ranks = [material.base_rows[q].tolist().index(i) for q, i in zip(batch.queries, batch.items, strict=True)]
    assert min(ranks) == L
    assert max(ranks) == DEPTH - 1
    assert 0.3 < np.isnan(batch.rewards).mean() < 0.8


def test_without_a_share_of_feedback_rounding_draws_none():
    assert config(gamma=0.0, alpha=0.5, batch_size=9).states_by_source == (0, 5, 4)
    assert config(gamma=0.0, alpha=1.0, batch_size=9).states_by_source == (0, 0, 9)
    assert config(gamma=0.0, objective="swap", batch_size=9).states_by_source == (0, 0, 9)
    assert config(gamma=0.25, alpha=0.5, batch_size=9).states_by_source == (3, 2, 4)


def test_batches_depend_on_seed_and_step_alone(material):
    first, again = (draw_batch(material, config(), 5) for _ in range(2))
    assert np.array_equal(first.items, again.items)
    assert not np.array_equal(first.items, draw_batch(material, config(), 6).items)
    assert not np.array_equal(first.items, draw_batch(material, config(seed=1), 5).items)


def test_every_pair_is_seen_once_an_epoch():
    seen = np.concatenate([shuffled(10, 4, step, (0,)) for step in range(5)])
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert not np.array_equal(seen[:10], seen[10:])


def test_without_a_positive_reward_the_user_is_told(material):
    empty = make_table(*(np.empty(0, dtype=np.int64) for _ in range(3)), N)
    nothing = gather_material(material.split, material.base_rows, L, empty, load_reward("eq7"))
    with pytest.raises(UserError, match="no labelled state has a positive reward"):
        draw_batch(nothing, config(), 0)


def gradient(material, settings, size):
    """Gradient of a whole batch's loss in the query table, summed over parts of the given size."""
    batch = draw_batch(material, settings, 2)
    if settings.objective not in LIST_OBJECTIVES:
        policy = batch.items < 0
        items = np.where(policy, 7, batch.items)
        rewards = np.where(policy, 1, batch.rewards).astype(np.float32)
        batch = dataclasses.replace(batch, items=items, rewards=rewards)
    table = QUERIES.double().requires_grad_()  # what V-PG leaves of Z cancels badly in float32
    for start in range(0, settings.batch_size, size):
        here = np.arange(start, min(start + size, settings.batch_size))
        embeddings = table[torch.from_numpy(batch.queries_of(here))]
        part = batch_loss(embeddings, here, batch, material, settings, MATRIX, 2)
        if part.loss.requires_grad:
            part.loss.backward()
    return table.grad


OBJECTIVES = [
    {"objective": "supervised"},
    {"objective": "supervised", "catalog_negatives": 30},
    {"objective": "supervised", "catalog_negatives": 0},
    {"objective": "supervised-judged"},
    {"objective": "supervised-judged", "hard_negatives": 3},
    *(
        {"objective": "pg-ret", "loss": loss}
        for loss in ("conservative", "aggressive", "boundary", "inclusion")
    ),
    {"objective": "pg-ret", "alpha": 0.25, "gamma": 0.5},
    {"objective": "pg-ret", "draw": "states"},
    {"objective": "supervised-judged", "draw": "states"},
    {"objective": "pg-ret", "reward": "eq6", "draw": "plain", "negative_share": 0.3},
    *({"objective": name} for name in LIST_OBJECTIVES),
]


@pytest.mark.parametrize("changes", OBJECTIVES, ids=str)
def test_micro_batches_add_up_to_the_same_gradient(material, changes):
    settings = config(**changes)
    whole = gradient(material, settings, 24)
    assert whole.abs().max() > 0
    for size in (1, 7):
        assert torch.allclose(gradient(material, settings, size), whole, atol=1e-6)


def test_supervised_loss_is_written_out(material):
    settings = config(objective="supervised", batch_size=6, catalog_negatives=0)
    batch = draw_batch(material, settings, 0)
    scores = (
        QUERIES[torch.from_numpy(batch.queries)] @ torch.from_numpy(ITEMS[batch.items]).T / 0.03
    ).numpy()
    liked = {q: set(material.split.feedback_items[material.split.feedback_queries == q]) for q in range(Q)}
    expected = 0.0
    for n, q in enumerate(batch.queries):
        judged = {i for i in range(N) if material.labels.lookup(np.array(q), np.array(i)) == 1}
        others = [m for m in range(6) if m == n or batch.items[m] not in liked[q] | judged | {batch.items[n]}]
        expected += np.log(np.exp(scores[n, others]).sum()) - scores[n, n]
    embeddings = QUERIES[torch.from_numpy(batch.queries)].clone().requires_grad_()
    found = batch_loss(embeddings, np.arange(6), batch, material, settings, MATRIX, 0)
    assert found.loss.item() == pytest.approx(expected / 6, rel=1e-5)


def test_an_item_that_a_query_leaves_out_is_no_negative_of_it(material):
    """Such as the query's own, which is often most like it, where it is another query's feedback."""
    settings = config(objective="supervised", batch_size=6)
    batch = draw_batch(material, settings, 0)
    query = batch.queries[0]
    mine = material.known_relevant(np.full(6, query), batch.items)
    other = batch.items[np.flatnonzero(~mine)[0]]
    excluded = np.full((Q, 2), -1)
    embeddings = QUERIES[torch.from_numpy(batch.queries)]
    losses = []
    for left_out in (-1, other):
        excluded[query, 1] = left_out
        split = dataclasses.replace(material.split, excluded=from_padded(excluded))
        here = dataclasses.replace(material, split=split)
        known = {i for i in range(N) if here.known_relevant(np.array(query), np.array(i))} | {left_out}
        against = [
            batch.items[0],
            *(item for item in batch.items[1:] if item not in known | {batch.items[0]}),
        ]
        scores = (QUERIES[query] @ torch.from_numpy(ITEMS[against]).T / settings.temperature).double()
        found = batch_loss(embeddings[:1], np.arange(1), batch, here, settings, MATRIX, 0)
        losses.append(found.loss.item() * len(batch.queries))
        assert losses[-1] == pytest.approx((torch.logsumexp(scores, 0) - scores[0]).item(), rel=1e-4)
    assert losses[1] < losses[0]


@pytest.mark.parametrize("count", [30, N, 4096])
def test_pairs_are_contrasted_with_a_sample_that_stands_for_the_catalog(material, count):
    excluded = from_padded(np.tile([7, -1], (Q, 1)))  # an item that is left out of all lists
    material = dataclasses.replace(material, split=dataclasses.replace(material.split, excluded=excluded))
    settings = config(objective="supervised", batch_size=6, catalog_negatives=count)
    batch = draw_batch(material, settings, 0)
    assert batch.sampled.tolist() == sorted(set(batch.sampled.tolist()))
    assert len(batch.sampled) == min(count, N)
    expected = 0.0
    for q, own in zip(batch.queries, batch.items, strict=True):
        known = {i for i in range(N) if material.known_relevant(np.array(q), np.array(i))} | {7}
        mass = np.exp((QUERIES[q] @ torch.from_numpy(ITEMS).T / 0.03).double().numpy())
        others = sum(mass[i] for i in batch.sampled if i not in known) * N / len(batch.sampled)
        expected += np.log(mass[own] + others) - np.log(mass[own])
    embeddings = QUERIES[torch.from_numpy(batch.queries)]
    found = batch_loss(embeddings, np.arange(6), batch, material, settings, MATRIX, 0)
    assert found.loss.item() == pytest.approx(expected / 6, rel=1e-5)


def test_every_item_is_sampled_alike_and_anew_in_each_step(material):
    drawn = [draw_batch(material, config(catalog_negatives=30), step).sampled for step in range(300)]
    assert not np.array_equal(drawn[0], drawn[1])
    counts = np.bincount(np.concatenate(drawn), minlength=N)
    assert counts.min() > 65  # 100 each, four standard deviations of 8.2
    assert counts.max() < 135
    assert len(draw_batch(material, config(catalog_negatives=0), 0).sampled) == 0


@pytest.mark.parametrize(
    ("changes", "ranks"),
    [
        ({}, range(5, 10)),
        ({"window": "0.4,1.2"}, range(2, 6)),
        ({"loss": "aggressive"}, range(3)),
        ({"loss": "conservative"}, range(1)),
        ({"loss": "inclusion"}, range(4, 6)),
        ({"loss": "inclusion", "window": "0,2"}, range(10)),
        ({"loss": "inclusion", "window": "5,8"}, range(25, 40)),  # beyond base lists
    ],
    ids=str,
)
def test_losses_of_states_are_written_out(material, changes, ranks):
    settings = config(gamma=0.0, **changes)
    batch = draw_batch(material, settings, 0)
    assert (batch.rewards == 1).all()
    losses = []
    for query, item in zip(batch.queries, batch.items, strict=True):
        scores = (QUERIES[query].numpy() @ ITEMS.T).astype(np.float64)
        if settings.loss == "inclusion":  # Gumbel: the mean around rank L of the policy's own list
            order = [
                row for row in np.argsort(-scores) if row not in material.split.excluded.take([query]).rows
            ]
            near = [row for row in np.array(order)[list(ranks)] if row != item]
            near = [row for row in near if not material.known_relevant(query, np.array(row))]
            rate = np.exp((scores[item] - scores[near].mean()) / settings.temperature) if near else np.inf
            losses.append(-np.log(-np.expm1(-rate)))
            continue
        others = [other for other in material.base_rows[query, list(ranks)] if other != item]
        if settings.loss == "conservative":
            losses.append(max(0, scores[others[0]] - scores[item]))
            continue
        if settings.loss == "boundary":
            others = [other for other in others if not material.known_relevant(query, np.array(other))]
        against = np.exp(scores[others] / settings.temperature).sum()
        losses.append(np.log1p(against / np.exp(scores[item] / settings.temperature)))
    passes = np.arange(24)
    embeddings = QUERIES[torch.from_numpy(batch.queries_of(passes))]
    found = batch_loss(embeddings, passes, batch, material, settings, MATRIX, 0)
    assert found.loss.item() == pytest.approx(np.mean(losses), rel=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"hard_negatives": 3},
        {"judged_negatives": 40},
        {"hard_negatives": 3, "judged_negatives": 7},
        {"draw": "plain"},
        {"draw": "states", "negative_share": 0.5, "reward": "eq6"},
        {},
    ],
    ids=str,
)
def test_supervised_judged_learns_pairs_that_are_relevant_in_their_shares(material, changes):
    settings = config(objective="supervised-judged", gamma=0.25, catalog_negatives=0, **changes)
    if changes.get("reward"):
        material = dataclasses.replace(material, reward=load_reward(changes["reward"]))
    batch = draw_batch(material, settings, 1)
    is_feedback = batch.sources == FEEDBACK
    is_pair = is_feedback | (batch.rewards > 0)
    assert is_pair.any()
    only_pairs = not {"draw", "negative_share"} & changes.keys()
    assert only_pairs == is_pair.all()  # some other drawn states are not relevant
    pairs = np.flatnonzero(is_pair)
    expected = {"feedback": [], "judged": []}
    for n in pairs:
        q, own = batch.queries[n], batch.items[n]
        known = {m for m in pairs if material.known_relevant(np.array(q), batch.items[m])}
        others = [m for m in pairs if m not in known and batch.items[m] != own]
        scores = (QUERIES[q] @ torch.from_numpy(ITEMS).T / settings.temperature).double()
        hard = material.base_rows[q, : settings.hard_negatives]
        hard = [item for item in hard if not material.known_relevant(np.array(q), np.array(item))]
        count = settings.judged_negatives
        at = uniform(settings.seed, 5, 1, torch.tensor([[n]]), torch.arange(count))
        noes = material.noes_at(np.array([q]), at.numpy())[0].tolist()
        has_noes = (material.labels.verdicts[material.labels.query_rows == q] == IRRELEVANT).any()
        assert (len(noes) > 0 and -1 not in noes) == (count > 0 and has_noes)
        noes = [item for item in noes if item >= 0]
        assert (material.labels.lookup(np.full(len(noes), q), np.array(noes)) == IRRELEVANT).all()
        assert not material.is_feedback(np.full(len(noes), q), np.array(noes)).any()
        against = scores[[own, *batch.items[others], *hard, *noes]]
        loss = (torch.logsumexp(against, 0) - scores[own]).item()
        expected["feedback" if is_feedback[n] else "judged"].append(loss)
    whole = 0.25 * np.mean(expected["feedback"]) + 0.75 * np.mean(expected["judged"])
    here = np.arange(batch.passes.max() + 1)
    embeddings = QUERIES[torch.from_numpy(batch.queries_of(here))]
    found = batch_loss(embeddings, here, batch, material, settings, MATRIX, 1)
    assert found.loss.item() == pytest.approx(whole, rel=1e-4)


def test_shares_are_kept_however_many_items_a_query_brings(material):
    settings = config(alpha=0.25, gamma=0.5, temperature=1.0)
    batch = draw_batch(material, settings, 2)
    drawn = batch.items < 0
    batch = dataclasses.replace(
        batch, items=np.where(drawn, 7, batch.items), rewards=np.where(drawn, 1.0, batch.rewards).astype("f4")
    )
    parts = []
    for source in (BASE, POLICY):
        other = np.isin(batch.sources, (BASE, POLICY)) & (batch.sources != source)
        alone = dataclasses.replace(batch, rewards=np.where(other, np.nan, batch.rewards).astype("f4"))
        embeddings = QUERIES[torch.from_numpy(batch.queries_of(np.arange(24)))]
        parts.append(batch_loss(embeddings, np.arange(24), alone, material, settings, MATRIX, 2).states)
    whole = batch_loss(embeddings, np.arange(24), batch, material, settings, MATRIX, 2).states
    assert whole == pytest.approx(sum(parts) / 2, rel=1e-5)  # six passes each


def test_rewarded_items_of_queries(material):
    rows, rewards = material.rewarded_of(np.array([3, 0]))
    for place, q in enumerate((3, 0)):
        found = {(i, r) for i, r in zip(rows[place], rewards[place], strict=True) if i >= 0}
        expected = {(i, 1.0) for a, i in material.positives if a == q} | {
            (i, -1.0) for a, i in material.negatives if a == q
        }
        assert found == expected


def test_bad_settings_each_have_their_line():
    check_config(config(), N)
    for changes, message in [
        ({"temperature": 0.0}, "--temperature 0.0: must be above 0"),
        ({"negatives": 91}, "--negatives 91: the catalog holds 90 items"),
        (
            {"loss": "aggressive", "negatives": 41, "depth": 40},
            "--negatives 41: more than --depth 40; raise that",
        ),
        ({"list_size": 91, "objective": "swap"}, "--list-size 91: the catalog holds 90 items"),
        ({"gamma": 0.01, "alpha": 0.5}, "--gamma 0.01: not one of --batch-size 24 states is feedback"),
        ({"alpha": 0.01}, "--alpha 0.01: not one of --batch-size 24 states is drawn from the policy"),
        (
            {"alpha": 0.49, "gamma": 0.5},
            "--gamma 0.5, --alpha 0.49: not one of --batch-size 24 states is drawn for what --labels say",
        ),
        ({"gamma": 0.99}, "--gamma 0.99: not one of --batch-size 24 states is drawn for what --labels say"),
        ({"gamma": 0.99, "objective": "swap"}, "--gamma 0.99: not one of --batch-size 24 states is drawn"),
        ({"alpha": 0.6}, "--alpha 0.6 --gamma 0.5: neither may be below 0, nor their sum above 1"),
        ({"window": "1"}, "--window 1: expected two multiples of L"),
        ({"window": "2,1"}, "--window 2,1: the first must be at least 0 and below the second"),
        ({"per_query": 0}, "--per-query 0: must be at least 1"),
        ({"depth": L}, "must exceed --base-depth"),
        ({"validation_fraction": 1.0}, "--validation-fraction 1.0"),
        ({"steps": 0}, "--steps 0: must be at least 1"),
        ({"precision": "bf16"}, "--precision bf16: --tune memory trains no encoder"),
        (
            {"tune": "adapter", "gradient_checkpointing": True},
            "--gradient-checkpointing: --tune adapter trains no encoder",
        ),
    ]:
        with pytest.raises(UserError, match=message):
            check_config(config(**changes), N)


def test_labels_that_are_drawn_or_not_meant_to_be_are_no_fault():
    for changes in ({"gamma": 1.0}, {"gamma": 0.97}, {"gamma": 0.99, "objective": "supervised"}):
        check_config(config(**changes), N)


@pytest.mark.parametrize("objective", [*LIST_OBJECTIVES, "pg-ret"])
def test_a_list_is_no_longer_than_what_a_query_leaves_and_the_draw_takes(objective):
    """By the draw itself, of a query that leaves 7 of 90 items out."""
    excluded = torch.arange(7)[None]
    most = {"swap": 82, "gumbel-threshold": 82}.get(objective, 83)
    check_list_size(config(objective=objective, list_size=most), N, 7)
    too_long = config(objective=objective, list_size=most + 1)
    if objective in ("reinforce", "pg-ret"):
        check_list_size(too_long, N, 7)
        return
    with pytest.raises(
        UserError, match=f"--list-size {most + 1}: of 90 items a query leaves out 7.*most {most}"
    ):
        check_list_size(too_long, N, 7)
    lists = np.argsort(-(QUERIES[:1].numpy() @ ITEMS.T), axis=1)[:, :DEPTH]
    none = np.empty(0, dtype=np.int64)
    split = make_split("train", ["q"], ["x"], none, none, from_padded(excluded.numpy()))
    labels = make_table(np.zeros(1, dtype=np.int64), np.array([20]), np.array([1]), N)
    of_one = gather_material(split, lists, L, labels, load_reward("eq7"))
    for k in (most, most + 1):
        settings, key = config(objective=objective, list_size=k), Key(0, 0, torch.arange(1))
        with pytest.raises(UserError, match="items are left") if k > most else contextlib.nullcontext():
            list_losses(QUERIES[:1], np.zeros(1, dtype=np.int64), of_one, MATRIX, settings, key)


def test_bad_item_embeddings_are_refused():
    unknown = ITEMS.copy()
    unknown[3] = 0  # of an item whose words the encoder does not know
    check_embeddings(unknown, normalized=True, what="items")
    bad = ITEMS.copy()
    bad[17, 2] = np.nan
    with pytest.raises(UserError, match="items: row 17 holds values that are not finite"):
        check_embeddings(bad, normalized=False, what="items")
    with pytest.raises(UserError, match=r"row 0 has length 2\.0000, not 1"):
        check_embeddings(ITEMS * 2, normalized=True, what="items")


def test_labelled_states_count_as_labelled_whatever_loss_they_come_into(material):
    """What is judged relevant is a pair to supervised-judged finetuning, and has a label all the same."""
    settings = config(objective="supervised-judged", draw="plain", batch_size=6)
    for step in range(5):
        batch = draw_batch(material, settings, step)
        embeddings = QUERIES[torch.from_numpy(batch.queries_of(np.arange(6)))]
        found = batch_loss(embeddings, np.arange(6), batch, material, settings, MATRIX, step)
        drawn = batch.sources != FEEDBACK
        assert (found.drawn, found.known) == (drawn.sum(), (drawn & ~np.isnan(batch.rewards)).sum())
