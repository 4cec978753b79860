"""Whether a judge's wrong yeses are told from its right ones, and what that does to the loss."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid

from novelret import encode
from novelret.cli import main
from novelret.data.split import make_split
from novelret.label.table import make_table
from novelret.memory import memory_modules
from novelret.progress import Reporter
from novelret.train import trust, trust_features
from novelret.train.config import TrainConfig
from novelret.train.example_weights import example_weights, is_pair
from novelret.train.list_step import _rewards
from novelret.train.matrix import ItemMatrix
from novelret.train.processes import Processes
from novelret.train.rewards import load_reward
from novelret.train.states import BASE, FEEDBACK, draw_batch, gather_material, with_more_labels
from novelret.train.step import batch_loss, negative_ranks
from tests.rows import from_padded

Q, CLUSTERS, SIZE, D, L, DEPTH = 200, 80, 15, 16, 5, 100
N = CLUSTERS * SIZE
ALONE = Processes(0, 1, "cpu")


def unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


RNG = np.random.default_rng(0)
CENTRES = RNG.normal(size=(CLUSTERS, D))
ITEMS = unit(np.repeat(CENTRES, SIZE, axis=0) + 0.7 * RNG.normal(size=(N, D)))
OF_QUERY = RNG.integers(0, CLUSTERS, Q)
QUERIES = unit(CENTRES[OF_QUERY] + 0.7 * RNG.normal(size=(Q, D)))
LISTS = np.argsort(-(QUERIES @ ITEMS.T), axis=1)[:, :DEPTH]
IS_TRUE = OF_QUERY[:, None] == LISTS // SIZE


def make_material(verdicts, lists=LISTS, reward="eq7"):
    feedback = np.stack([np.repeat(np.arange(Q), 2), LISTS[:, :2].ravel()])
    split = make_split(
        "train", [str(q) for q in range(Q)], ["x"] * Q, *feedback, from_padded(np.full((Q, 1), -1))
    )
    queries = np.repeat(np.arange(Q), DEPTH)
    labels = make_table(queries, LISTS.ravel(), np.asarray(verdicts).ravel().astype(np.int8), N)
    return gather_material(split, lists, L, labels, load_reward(reward))


def judged(false_positives, misses=0.1, seed=1):
    rng = np.random.default_rng(seed)
    return np.where(IS_TRUE, rng.random(IS_TRUE.shape) >= misses, rng.random(IS_TRUE.shape) < false_positives)


def truth_of(material):
    return material.positives[:, 1] // SIZE == OF_QUERY[material.positives[:, 0]]


@pytest.mark.parametrize("rate", [0.03, 0.1])
def test_the_rate_of_false_positives_is_found_and_wrong_yeses_weigh_less(rate):
    material = make_material(judged(rate))
    found = trust.estimate_trust(material, QUERIES, ITEMS)
    is_right = truth_of(material)
    assert 0.3 < is_right.mean() < 0.8
    assert found.floor == pytest.approx(rate, rel=0.2)
    assert found.weights[is_right].mean() > 0.75
    assert found.weights[~is_right].mean() < 0.35
    # The weights are probabilities: as many yeses are believed as are right.
    assert found.weights.sum() == pytest.approx(is_right.sum(), rel=0.12)
    assert found.weights.dtype == np.float32
    assert 0 <= found.weights.min() <= found.weights.max() <= 1


@pytest.mark.parametrize("misses", [0.0, 0.4])
def test_a_judge_without_false_positives_is_believed(misses):
    found = trust.estimate_trust(make_material(judged(0.0, misses)), QUERIES, ITEMS)
    assert found.floor < 0.002
    assert found.weights.mean() > 0.985
    if not misses:
        assert (found.weights == 1).all()


def test_a_sample_stands_for_the_rest(monkeypatch):
    material = make_material(judged(0.05))
    monkeypatch.setattr(trust, "_MOST", 700)
    labelled = trust_features.gather_labelled(material, trust._MOST, 3)
    assert len(labelled.noes) < 900 < len(labelled.yeses)
    assert labelled.count.tolist() == [DEPTH - L] * Q
    assert len(labelled.noes) * labelled.no_weight == pytest.approx(Q * DEPTH * 0.9, rel=0.1)
    found, again = (trust.estimate_trust(material, QUERIES, ITEMS, seed=3) for _ in range(2))
    assert found.floor == pytest.approx(0.05, rel=0.4)
    assert np.array_equal(found.weights, again.weights)


def test_a_sample_speaks_for_as_many_labels_as_it_stands_for():
    """That there is a floor is as likely after noes were sampled as by all of them, not a tenth as likely."""
    rng = np.random.default_rng(7)
    features = rng.normal(size=(60_000, 7))
    rate = 0.001 + 0.999 / (1 + np.exp(9 - 4 * features[:, 0]))
    is_yes = rng.random(len(rate)) < rate
    kept = is_yes | (rng.random(len(rate)) < 0.1)
    stands_for = np.where(is_yes, 1.0, 10.0)
    whole = trust._fit(features, is_yes, np.ones(len(rate)))
    sampled = trust._fit(features[kept], is_yes[kept], stands_for[kept])
    assert whole is not None
    assert sampled is not None
    assert sampled.floor == pytest.approx(whole.floor, rel=0.5)


def test_too_few_labels_or_no_no_leave_all_yeses_believed():
    yes_alone = np.where(judged(0.05), 1, -1)
    few = np.full(IS_TRUE.shape, -1)
    few[:2] = judged(0.05)[:2]
    for verdicts in (yes_alone, few, np.full(IS_TRUE.shape, -1)):
        material = make_material(verdicts)
        found = trust.estimate_trust(material, QUERIES, ITEMS)
        assert found.floor == 0
        assert found.weights.tolist() == [1] * len(material.positives)


def by_hand(material, verdict, query, item, is_yes):
    """The features of one pair, after their definition; `verdict`: those of all pairs beyond the lists."""
    of_query = {i: v for (q, i), v in verdict.items() if q == query}
    mean = sum(verdict.values()) / len(verdict)
    rate = (sum(of_query.values()) - is_yes + mean) / len(of_query)
    score = QUERIES[query] @ ITEMS[item]
    base = material.base_rows[query].tolist()
    yeses = sorted((ITEMS[item] @ ITEMS[i] for i, v in of_query.items() if v and i != item), reverse=True)[:3]
    liked = material.split.feedback_items[material.split.feedback_queries == query]
    rank = base.index(item) + 1 if item in base else len(base) + 1
    near = np.mean(yeses) if yeses else np.nan
    return np.array([
        score, score - QUERIES[query] @ ITEMS[base[L - 1]], np.log(rank), np.log(1e-3 + rate), rate,
        near, (ITEMS[liked] @ ITEMS[item]).max(),
    ])  # fmt: skip


@pytest.mark.parametrize("cut", [False, True], ids=["at once", "in parts"])
def test_features_are_those_of_their_definition(monkeypatch, cut):
    if cut:
        for name, value in {"_GROUP": 3, "_CHUNK": 7, "_NUMBERS": 5 * D * (3 + 256)}.items():
            monkeypatch.setattr(trust_features, name, value)
    verdicts = judged(0.02, 0.3)
    verdicts[4] = False
    verdicts[4, 20] = True  # a yes alone
    material = make_material(verdicts, lists=LISTS[:, :60])  # what lies deeper is in no list
    labelled = trust_features.gather_labelled(material, trust._MOST, 0)
    context = trust_features.Pairs(material, labelled, QUERIES, ITEMS)
    pairs = np.stack([np.repeat(np.arange(9), 95), LISTS[:9, L:].ravel()], axis=1)
    pairs = pairs[np.random.default_rng(2).permutation(len(pairs))[:200]]
    pairs = np.concatenate([pairs, [[4, LISTS[4, 20]]]])
    is_yes = material.labels.lookup(*pairs.T) == 1
    labels = material.labels
    verdict = {
        (q, i): int(v)
        for q, i, v in zip(labels.query_rows, labels.item_rows, labels.verdicts, strict=True)
        if i not in material.pool[q]
    }
    expected = np.stack(
        [by_hand(material, verdict, *pair, yes) for pair, yes in zip(pairs, is_yes, strict=True)]
    )
    alone = np.isnan(expected[:, 5])
    assert alone.any()
    features = context.features(pairs, is_yes)
    assert np.allclose(features, expected, atol=1e-5, equal_nan=True)
    whole = trust._completed(features, np.arange(7.0))
    expected[alone, 5] = 5
    assert np.allclose(whole, np.column_stack([expected, expected[:, 5] * expected[:, 4]]), atol=1e-5)


def test_what_a_yes_alone_is_worth_does_not_depend_on_what_it_is_estimated_with(monkeypatch):
    verdicts = judged(0.05)
    for query in range(0, 12):
        verdicts[query] = False
        verdicts[query, 20 + query] = True
    material = make_material(verdicts)
    at_once = trust.estimate_trust(material, QUERIES, ITEMS)
    assert at_once.floor > 0
    states = material.positives
    labelled = trust_features.gather_labelled(material, trust._MOST, 0)
    context = trust_features.Pairs(material, labelled, QUERIES, ITEMS)
    alone = np.isnan(context.features(states, np.ones(len(states), dtype=bool))[:, 5])
    assert alone.sum() >= 12
    real = trust._Model.right
    monkeypatch.setattr(
        trust._Model, "right", lambda self, x: np.concatenate([real(self, part[None]) for part in x])
    )
    assert np.allclose(trust.estimate_trust(material, QUERIES, ITEMS).weights, at_once.weights, atol=1e-6)


def test_the_user_is_told_of_a_notable_rate(capsys):
    from rich.console import Console

    report = Reporter(console=Console(width=400))
    material = trust.weigh_labels(make_material(judged(0.1)), QUERIES, ITEMS, 0, ALONE, report)
    told = capsys.readouterr().out
    assert told.count("\n") == 1
    assert f"call {material.floor:.1%} of irrelevant items relevant" in told
    assert f"{material.trust.mean():.0%} are believed" in told
    trust.weigh_labels(make_material(judged(0.0)), QUERIES, ITEMS, 0, ALONE, report)
    assert capsys.readouterr().out == ""


@pytest.mark.filterwarnings("error")
def test_labels_without_a_yes_have_nothing_to_weigh():
    material = make_material(np.zeros(IS_TRUE.shape))
    assert len(trust.weigh_labels(material, QUERIES, ITEMS, 0, ALONE, Reporter()).trust) == 0


def config(**changes):
    settings = {"batch_size": 24, "base_depth": L, "depth": DEPTH, "labels": "x", "list_size": 6}
    return TrainConfig("data", "index", **(settings | changes))


@pytest.fixture(scope="module")
def weighed():
    material = make_material(judged(0.05))
    weights = np.random.default_rng(5).random(len(material.positives)).astype(np.float32)
    return dataclasses.replace(material, trust=weights, floor=0.05)


def test_states_carry_the_trust_of_their_pair(weighed):
    known = {tuple(pair): w for pair, w in zip(weighed.positives.tolist(), weighed.trust, strict=True)}
    batch = draw_batch(weighed, config(gamma=0.25, draw="plain"), 1)
    pairs = zip(batch.queries.tolist(), batch.items.tolist(), strict=True)
    assert batch.trust.tolist() == [known.get(pair, 1.0) for pair in pairs]
    of_base = batch.trust[batch.sources == BASE]
    assert 0 < (of_base < 1).sum() < len(of_base)
    assert draw_batch(weighed, config(alpha=1.0, gamma=0.0), 1).trust.tolist() == [1.0] * 24


def test_the_loss_of_states_is_their_mean_weighted_by_trust(weighed):
    settings = config(gamma=0.0, loss="aggressive")
    batch = draw_batch(weighed, settings, 0)
    passes = np.arange(24)
    table = torch.from_numpy(QUERIES[batch.queries_of(passes)])
    loss = batch_loss(table, passes, batch, weighed, settings, ItemMatrix(ITEMS, ITEMS), 0).loss.item()
    first, last = negative_ranks(settings)
    losses = []
    for query, item in zip(batch.queries, batch.items, strict=True):
        others = LISTS[query, first:last]
        logits = torch.from_numpy(QUERIES[query] @ ITEMS[[item, *others]].T) / settings.temperature
        losses.append(-logsigmoid(logits[0] - torch.logsumexp(logits[1:], dim=0)).item())
    assert loss == pytest.approx(np.average(losses, weights=batch.trust), rel=1e-4)
    assert loss != pytest.approx(np.mean(losses), rel=1e-3)


def test_a_step_of_hardly_believed_states_is_not_blown_up(weighed):
    settings = config(gamma=0.0)
    batch = draw_batch(weighed, settings, 0)
    doubtful = dataclasses.replace(batch, trust=np.full(len(batch.queries), 1e-6, dtype=np.float32))
    assert example_weights(doubtful, np.zeros(len(batch.queries), dtype=bool), settings).sum() < 1e-3


def test_judged_pairs_of_supervised_training_count_as_far_as_they_are_believed(weighed):
    settings = config(objective="supervised-judged", gamma=0.25)
    batch = draw_batch(weighed, settings, 0)
    weights = example_weights(batch, is_pair(batch, settings), settings)
    is_feedback = batch.sources == FEEDBACK
    assert weights[is_feedback] == pytest.approx(0.25 / is_feedback.sum())
    assert weights[~is_feedback].sum() == pytest.approx(0.75)
    believed = batch.trust[~is_feedback]
    assert weights[~is_feedback] == pytest.approx(0.75 * believed / believed.sum())


def test_list_objectives_credit_items_by_their_trust(weighed):
    rewarded, credit = weighed.rewarded_of(np.array([3, 8]))
    for row, (items, values) in enumerate(zip(rewarded, credit, strict=True)):
        query = (3, 8)[row]
        mine = weighed.positives[:, 0] == query
        assert dict(zip(items[values > 0], values[values > 0], strict=True)) == dict(
            zip(weighed.positives[mine, 1], weighed.trust[mine], strict=True)
        )
    queries = weighed.positives[[0, -1], 0]
    rows = torch.from_numpy(weighed.positives[[0, -1], 1][:, None])
    passes = np.arange(24)
    gradients = []
    for believed in (0.0, 0.25, 1.0):
        alike = dataclasses.replace(weighed, trust=np.full_like(weighed.trust, believed))
        settings = config(objective="reinforce", alpha=1.0, gamma=0.0, list_size=40, temperature=1.0)
        batch = draw_batch(alike, settings, 0)
        table = torch.from_numpy(QUERIES[batch.queries_of(passes)]).requires_grad_()
        batch_loss(table, passes, batch, alike, settings, ItemMatrix(ITEMS, ITEMS), 0).loss.backward()
        gradients.append(table.grad)
    nothing, quarter, whole = gradients
    assert (whole - nothing).abs().max() > 1e-4
    assert torch.allclose(quarter - nothing, 0.25 * (whole - nothing), atol=1e-7)
    rewards, believed = _rewards(weighed, queries, rows)
    assert rewards.tolist() == [[1], [1]]
    assert believed[:, 0].tolist() == weighed.trust[[0, -1]].tolist()


def test_labels_that_come_later_are_believed_and_older_ones_keep_their_trust(weighed):
    labelled = set(weighed.labels.keys.tolist())
    new = next(item for item in range(N) if item not in labelled)  # of query 0
    more = make_table(np.array([0]), np.array([new]), np.ones(1, dtype=np.int8), N)
    grown = with_more_labels(weighed, more)
    is_new = (grown.positives == [0, new]).all(axis=1)
    assert is_new.sum() == 1
    assert grown.trust[is_new].tolist() == [1]
    assert np.array_equal(grown.trust[~is_new], weighed.trust)
    assert grown.floor == weighed.floor


@pytest.mark.parametrize(
    ("tune", "objective"), [("adapter", "pg-ret"), ("memory", "pg-ret"), ("adapter", "supervised-judged")]
)
def test_train_estimates_trust_unless_told_not_to(
    tune, objective, world, index_folder, tmp_path, monkeypatch, capsys
):
    labels = tmp_path / "labels"
    command = ["--data", world, "--index", index_folder, "--base-depth", 3, "--depth", 12, "--quiet"]
    judge = ["--judge", f"file:{world}/judgements.tsv", "--missing", "irrelevant", "--out", labels]
    assert main([str(part) for part in ["label", *command, *judge]]) == 0
    asked = []

    def half(material, queries, items, seed):
        # One row a training query, of the encoder that made the lists.
        nearest = (queries @ np.asarray(items).T).argmax(axis=1)
        asked.append((nearest == material.base_rows[:, 0]).mean())
        return trust.Trust(np.linspace(0, 1, len(material.positives), dtype=np.float32), 0.25)

    monkeypatch.setattr(trust, "estimate_trust", half)
    facts, weights, keys = [], [], []
    for flag in ("--trust", "--no-trust"):
        out = tmp_path / flag
        how = ["--tune", tune, "--objective", objective, flag]
        more = ["--labels", labels, *how, "--steps", 4, "--out", out, "--device", "cpu"]
        assert main([str(part) for part in ["train", *command, *more, "--validation-fraction", 0]]) == 0
        manifest = json.loads((out / "manifest.json").read_text())
        facts.append((manifest["facts"]["false_positive_rate"], manifest["facts"]["mean_trust"]))
        weights.append(manifest["fingerprint"])
        keys.append([len(module.linear.weight) for module in memory_modules([*encode.load_encoder(out)])][:1])
    assert facts == [(0.25, pytest.approx(0.5)), (0.0, 1.0)]
    assert len(asked) == 1
    assert asked[0] > 0.4  # but for queries whose own item, which is left out, is nearest
    assert weights[0] != weights[1]
    assert (keys[0] < keys[1]) == (tune == "memory")  # what is not believed is not remembered
