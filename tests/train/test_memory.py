"""`--tune memory`: the module by itself, where it starts, and as a user trains, serves and exports it."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import softmax
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize
from torch import nn

from novelret import adapted, encode, index
from novelret.cli import main
from novelret.data.split import load_split, make_split
from novelret.errors import UserError
from novelret.export.export import export_model
from novelret.label.table import make_table
from novelret.memory import Memory, read_memory
from novelret.train import memorise, prepare
from novelret.train.rewards import load_reward
from novelret.train.states import gather_material
from novelret.train.tower import adapter_tower
from tests.commands import fails, run
from tests.conftest import make_encoder
from tests.killing import break_off_at, start
from tests.rows import from_padded
from tests.train.conftest import SHORT, weights_of

TUNE = ("--tune", "memory", "--learning-rate", 0.02)
TEXTS = ["buy red sofa", "lamp", "buy grey desk unknown words here", "chair " * 40]


@pytest.fixture(scope="module")
def model(command, tmp_path_factory):
    """The weights of the last step, without validation."""
    out = tmp_path_factory.mktemp("model") / "memory"
    words = [*command, *TUNE, "--validation-fraction", 0, "--out", out, "--quiet"]
    assert main([str(word) for word in words]) == 0
    return out


def train(capsys, command, out, *more):
    code, found, err = run(capsys, *command, *more, "--out", out, "--json", "--quiet")
    assert code == 0, err
    return json.loads(found)


def same_weights(one, two) -> bool:
    mine, others = weights_of(one), weights_of(two)
    return mine.keys() == others.keys() and all(torch.equal(mine[name], others[name]) for name in mine)


def log_of(folder):
    timing = ("step_time", "memory_gb")
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in timing} for line in lines]


def load(folder) -> SentenceTransformer:
    return SentenceTransformer(str(folder), device="cpu")


# The module


def random_memory(size=7, dimension=5, seed=0, dtype=torch.float32, length=1.0) -> Memory:
    generator = torch.Generator().manual_seed(seed)
    memory = Memory(dimension, size, length).to(dtype)
    with torch.no_grad():
        keys = torch.randn(size, dimension, generator=generator, dtype=dtype)
        memory.keys.copy_(torch.nn.functional.normalize(keys, dim=1))
        memory.values.copy_(torch.randn(size, dimension, generator=generator, dtype=dtype))
        memory.metric.copy_(0.1 * torch.randn(dimension, dimension, generator=generator, dtype=dtype))
        memory.scale.fill_(0.07)
    return memory


def by_hand(memory, query, left_out=frozenset(), share=1.0, length=1.0) -> np.ndarray:
    keys, values = memory.keys.double().numpy(), memory.values.detach().double().numpy()
    seeking = query + query @ memory.metric.detach().double().numpy()
    weights = {j: np.exp(keys[j] @ seeking / length / 0.06) for j in range(len(keys)) if j not in left_out}
    moved = query.astype(np.float64)
    for j, weight in weights.items():
        moved = moved + share * 10 * 0.07 * weight / sum(weights.values()) * values[j]
    return moved


@pytest.mark.parametrize("length", [1.0, 2.5])
def test_the_shift_is_the_formula_for_queries_of_any_length(length):
    memory = random_memory(length=length)
    queries = np.random.default_rng(1).normal(size=(4, 5)).astype(np.float32)
    found = queries + memory.served_shift(torch.from_numpy(queries)).detach().numpy()
    for row, query in zip(found, queries, strict=True):
        assert row == pytest.approx(by_hand(memory, query, length=length), abs=1e-5)
        assert np.abs(row - query).max() > 0.01


@pytest.mark.parametrize("length", [1.0, 2.5])
def test_training_queries_do_not_see_keys_that_equal_them(length):
    memory = random_memory(length=length)
    with torch.no_grad():
        memory.keys[4] = memory.keys[1]  # the same query twice
        memory.keys[5] = torch.nn.functional.normalize(
            memory.keys[1] + 0.02, dim=0
        )  # one that is only like it
    query = length * memory.keys[1]
    found = memory(query[None], torch.tensor([0.3]))[0].detach().numpy()
    expected = by_hand(memory, query.numpy(), {1, 4}, share=0.3, length=length)
    assert found == pytest.approx(expected, abs=1e-5)
    whole = (query + memory.served_shift(query[None])[0]).detach().numpy()
    assert whole == pytest.approx(by_hand(memory, query.numpy(), length=length), abs=1e-5)
    assert np.abs(whole - found).max() > 0.05
    # What a query's own values are has no say in its loss.
    memory(query[None], torch.ones(1)).square().sum().backward()
    assert memory.values.grad[[1, 4]].abs().max() == 0
    assert memory.values.grad[5].abs().max() > 0


def test_a_query_that_equals_every_key_stays_where_it_is():
    memory = random_memory(size=3)
    with torch.no_grad():
        memory.keys[:] = memory.keys[0]
    query = (2.5 * memory.keys[:1]).clone().requires_grad_()
    found = memory(query, torch.ones(1))
    assert torch.equal(found, query)
    found.sum().backward()
    assert all(torch.isfinite(part.grad).all() for part in (query, *memory.parameters()))


def test_gradients_are_those_of_finite_differences():
    shares = torch.tensor([1.0, 0.4, 0.0], dtype=torch.float64)
    queries = torch.from_numpy(np.random.default_rng(2).normal(size=(3, 5)))
    memory = random_memory(dtype=torch.float64)
    queries[0] = memory.keys[2]
    parameters = [part.detach().clone() for part in (memory.values, memory.metric, memory.scale)]
    del memory.values, memory.metric, memory.scale

    def shifted(x, values, metric, scale):
        memory.values, memory.metric, memory.scale = values, metric, scale
        return memory(x, shares)

    assert torch.autograd.gradcheck(shifted, [part.requires_grad_() for part in (queries, *parameters)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_two_dense_modules_serve_it(dtype, tmp_path):
    memory = random_memory(length=1.5)
    served = nn.Sequential(*memory.modules_to_serve()).to(dtype)
    queries = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    found = served({"sentence_embedding": queries.to(dtype)})["sentence_embedding"].float()
    loose = {torch.float32: 1e-5, torch.bfloat16: 0.2, torch.float16: 0.02}[dtype]
    torch.testing.assert_close(found, queries + memory.served_shift(queries), atol=loose, rtol=0)
    assert (found - queries).abs().max() > 0.3


# Where it starts


@pytest.fixture
def material():
    """Nine queries, some with feedback, some with labels, number 4 with nothing but a no, 7 with nothing."""
    rng = np.random.default_rng(3)
    feedback = np.array([[0, 3], [0, 8], [1, 5], [2, 5], [5, 0], [6, 11]]).T
    labelled = np.array(
        [[0, 3, 1], [0, 9, 1], [0, 2, 0], [3, 1, 1], [3, 4, 1], [4, 6, 0], [6, 11, 0], [8, 7, 1]]
    )
    split = make_split(
        "train", list("abcdefghi"), list("abcdefghi"), *feedback, from_padded(np.full((9, 1), -1))
    )
    labels = make_table(*labelled[:, :2].T, labelled[:, 2].astype(np.int8), 12)
    lists = np.stack([rng.permutation(12) for _ in range(9)])
    return gather_material(split, lists, 3, labels, load_reward("eq7"))


ITEMS = np.random.default_rng(4).normal(size=(12, 5)).astype(np.float16)
QUERIES = np.random.default_rng(5).normal(size=(9, 5)).astype(np.float32)
KNOWN = {0: {3, 8, 9}, 1: {5}, 2: {5}, 3: {1, 4}, 5: {0}, 6: {11}, 8: {7}}


def unit(vector) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def mean_of(items) -> np.ndarray:
    return np.mean([ITEMS[item].astype(float) for item in items], axis=0)


@pytest.mark.parametrize("numbers", [1, 15, 1 << 24])
def test_values_start_at_the_mean_of_what_is_known(material, monkeypatch, numbers):
    monkeypatch.setattr(memorise, "_NUMBERS", numbers)  # parts that cut through a query's items
    memory = memorise.make_memory(material, QUERIES, ITEMS, 100, 0)
    queries = [(query, unit(QUERIES[query]), mean_of(items)) for query, items in KNOWN.items()]
    pairs = [
        (query, unit(ITEMS[item].astype(float)), mean_of(items - {item}))
        for query, items in KNOWN.items()
        for item in sorted(items)
        if len(items) > 1
    ]
    assert len(pairs) == 5
    assert len(memory.keys) == len(queries) + len(pairs)
    for row, (query, key, value) in enumerate(queries + pairs):
        assert memory.keys[row].numpy() == pytest.approx(key, abs=1e-6)
        assert memory.values[row].detach().numpy() == pytest.approx(value, abs=1e-5)
        assert memory.sources[row] == list(KNOWN).index(query)
    embeddings = torch.from_numpy(QUERIES)
    assert not memory.served_shift(embeddings).any()


def test_a_query_that_is_an_item_goes_with_its_items(material):
    """Of a query's only item, too, nothing else would be known to go with it."""
    own = np.array([7, 2, -1, -1, 10, -1, 4, 1, -1])
    memory = memorise.make_memory(material, QUERIES, ITEMS, 100, 0, own)
    values = [mean_of(items) for items in KNOWN.values()]  # as ever
    pairs = []
    for query, items in KNOWN.items():
        for item in sorted(items):
            goes_along = items - {item} | ({own[query]} if own[query] >= 0 else set())
            if goes_along:
                pairs.append((list(KNOWN).index(query), item))
                values.append(mean_of(goes_along))
    assert [item for _, item in pairs] == [3, 8, 9, 5, 1, 4, 11]
    assert memory.sources.tolist() == [*range(len(KNOWN)), *(source for source, _ in pairs)]
    assert memory.values.detach().numpy() == pytest.approx(np.stack(values), abs=1e-5)
    keys = np.stack([unit(ITEMS[item].astype(float)) for _, item in pairs])
    assert memory.keys[len(KNOWN) :].numpy() == pytest.approx(keys, abs=1e-6)


def test_a_yes_that_is_hardly_believed_is_not_remembered(material):
    """Unless there is feedback that says so, too: of query 0 and item 3."""
    doubted = dataclasses.replace(material, trust=np.full(len(material.positives), 0.4, np.float32))
    lost = [tuple(pair) for pair in material.positives.tolist() if tuple(pair) != (0, 3)]
    assert len(lost) >= 2
    left = {query: {item for item in items if (query, item) not in lost} for query, items in KNOWN.items()}
    left = {query: items for query, items in left.items() if items}
    memory = memorise.make_memory(doubted, QUERIES, ITEMS, 100, 0)
    assert len(memory.keys) == len(left) + sum(len(items) for items in left.values() if len(items) > 1)
    for row, (query, items) in enumerate(left.items()):
        assert memory.keys[row].numpy() == pytest.approx(unit(QUERIES[query]), abs=1e-6)
        assert memory.values[row].detach().numpy() == pytest.approx(mean_of(items), abs=1e-5)
    believed = dataclasses.replace(material, trust=np.full(len(material.positives), 0.6, np.float32))
    memory = memorise.make_memory(believed, QUERIES, ITEMS, 100, 0)
    assert len(memory.keys) == 12  # all, and alike
    assert memory.values[0].detach().numpy() == pytest.approx(mean_of(KNOWN[0]), abs=1e-5)


@pytest.mark.parametrize(("size", "queries"), [(3, 2), (5, 3), (11, 6), (12, 7)])
def test_at_most_so_many_keys_drawn_by_the_seed(material, size, queries):
    """Queries take half of the places and what items leave; items are those of the queries drawn."""
    full = memorise.make_memory(material, QUERIES, ITEMS, 100, 0)
    drawn = []
    for seed in (0, 0, *range(1, 12)):
        memory = memorise.make_memory(material, QUERIES, ITEMS, size, seed)
        assert len(memory.keys) == len(memory.values) <= size
        places = [int(np.flatnonzero((full.keys == key).all(dim=1))[0]) for key in memory.keys]
        assert torch.equal(memory.values, full.values[places])  # each key with its own value
        assert [place < len(KNOWN) for place in places] == [row < queries for row in range(len(places))]
        assert [places[row] for row in memory.sources] == full.sources[places].tolist()
        drawn.append(tuple(places))
    assert drawn[0] == drawn[1]
    assert size == 12 or len(set(drawn)) > 2


def test_a_query_without_an_embedding_is_no_key(material):
    queries = QUERIES.copy()
    queries[3] = 0  # none of its words is known to the encoder
    memory = memorise.make_memory(material, queries, ITEMS, 100, 0)
    full = memorise.make_memory(material, QUERIES, ITEMS, 100, 0)
    others = np.flatnonzero(full.sources != list(KNOWN).index(3))
    assert torch.equal(memory.keys, full.keys[others])
    assert torch.equal(memory.values, full.values[others])
    assert memory.temperature == pytest.approx(
        0.06 * np.mean([np.linalg.norm(QUERIES[query]) for query in KNOWN if query != 3])
    )


def test_a_query_sees_nothing_in_training_that_is_known_from_itself():
    """Not its own key, and none of the items that are keys on its account; other queries' items it does."""
    memory = random_memory(size=6)
    memory.sources, memory.queries = torch.tensor([0, 1, 2, 0, 0, 1]), 3
    query = memory.keys[[0]].clone()
    found = memory(query, torch.tensor([0.7]))[0].detach().numpy()
    keys, values = (
        memory.served_keys().detach().numpy()[[1, 2, 5]],
        memory.scaled_values().detach().numpy()[[1, 2, 5]],
    )
    shares = softmax(keys @ query[0].numpy())
    assert found == pytest.approx(query[0].numpy() + 0.7 * shares @ values, abs=1e-5)


def test_nothing_known_is_nothing_to_remember(material):
    split = make_split(
        "train", list("ab"), list("ab"), *np.zeros((2, 0), dtype=np.int64), from_padded(np.full((2, 1), -1))
    )
    labels = make_table(np.array([0]), np.array([4]), np.array([0], dtype=np.int8), 12)
    nothing = gather_material(split, material.base_rows[:2], 3, labels, load_reward("eq7"))
    with pytest.raises(
        UserError, match="no training query has feedback or an item that is labelled relevant"
    ):
        memorise.make_memory(nothing, QUERIES[:2], ITEMS, 10, 0)


def test_training_leaves_one_out_and_serving_nothing(encoder):
    deployed = encode.load_encoder(encoder)
    texts = ["buy red sofa", "buy grey desk", "buy red sofa", "lamp"]
    queries = encode.encode_queries(deployed, texts)
    memory = random_memory(size=3, dimension=16)
    with torch.no_grad():
        memory.keys.copy_(torch.from_numpy(queries[:3]))
    tower = adapter_tower(deployed, queries, queries, "cpu", memory, seed=5)
    (served,) = tower.embed_validation((1.0,))
    for row, found in enumerate(served):
        expected = by_hand(memory, queries[row])
        assert found == pytest.approx(expected / np.linalg.norm(expected), abs=1e-5)
    # While training, each at a share of its own.
    left_out = {0: {0, 2}, 1: {1}, 3: set()}
    for row, out in left_out.items():
        shares = []
        for step in range(40):
            found = tower.embed(np.array([row, 2]), step)[0].detach().numpy()
            both = tower.embed(np.array([2, row]), step)[1].detach().numpy()
            assert np.array_equal(found, both)  # wherever it stands in the batch
            moved = [by_hand(memory, queries[row], out, share) for share in np.linspace(0, 1, 201)]
            away = [np.abs(found - vector / np.linalg.norm(vector)).max() for vector in moved]
            assert min(away) < 5e-3
            shares.append(np.argmin(away) / 200)
        assert 0.35 < np.mean(shares) < 0.65
        assert np.std(shares) > 0.2


# What a user does with it


def test_it_brings_relevant_novel_items_to_queries_it_never_saw(
    command, world, index_folder, capsys, tmp_path
):
    found = train(
        capsys, command, tmp_path / "model", "--tune", "memory", "--steps", 100, "--learning-rate", 0.01
    )
    start, chosen = found["points"][0], found["chosen"]
    assert start["novelty"] == start["relevant_novel"] == 0
    assert chosen["relevant_novel"] > 0
    report = tmp_path / "report"
    evaluate = ["eval", "--data", world, "--index", index_folder, "--split", "test", "--model",
                f"new={tmp_path / 'model'}", "--judge", f"file:{world}/judgements.tsv", "--missing", "irrelevant",
                "--base-depth", 3, "--k", 3, "--out", report, "--quiet"]  # fmt: skip
    code, _, err = run(capsys, *evaluate)
    assert code == 0, err
    assert "was trained on" not in err  # but on those of another split
    means = json.loads((report / "metrics.json").read_text())["models"]
    assert means["base"]["RelevantNovel@3"] == 0
    assert means["new"]["RelevantNovel@3"] > 0.2


def test_a_trained_model_is_loaded_by_sentence_transformers_and_evaluated_from_deployed_embeddings(
    model, index_folder
):
    whole = load(model)
    assert [type(module) for module in whole][-4:] == [Dense, Dense, Dense, Normalize]
    memory, dense = read_memory(whole[-4], whole[-3]), whole[-2]
    assert np.abs(memory.values).max() > 0.005
    assert dense.linear.weight.abs().max() > 0.01
    deployed = index.open_index(index_folder).query_encoder("cpu")
    behind = adapted.modules_behind(whole, deployed)
    assert [type(module) for module in behind] == [Dense, Dense, Dense, Normalize]
    embeddings = encode.encode_queries(deployed, TEXTS)
    found = adapted.embed_behind(behind, embeddings, normalized=True, device="cpu")
    expected = whole.encode_query(TEXTS, normalize_embeddings=True)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.abs(found - embeddings).max() > 0.01
    # In small parts too.
    parts = pytest.MonkeyPatch()
    parts.setattr(adapted, "NUMBERS", 30)
    again = adapted.embed_behind(behind, embeddings, normalized=True, device="cpu")
    parts.undo()
    np.testing.assert_allclose(again, expected, atol=1e-6)
    assert "trust_remote_code" not in (model / "README.md").read_text()


def test_validation_in_parts_is_the_same(encoder, monkeypatch):
    deployed = encode.load_encoder(encoder)
    queries = encode.encode_queries(deployed, TEXTS)
    tower = adapter_tower(deployed, queries, queries, "cpu", random_memory(dimension=16))
    whole = tower.embed_validation((1.0, 0.25))
    monkeypatch.setattr("novelret.train.tower.NUMBERS", 2 * len(tower.memory.keys))
    real, sizes = Memory.served_shift, []
    monkeypatch.setattr(Memory, "served_shift", lambda self, x: sizes.append(len(x)) or real(self, x))
    parts = adapter_tower(deployed, queries, queries, "cpu", tower.memory).embed_validation((1.0, 0.25))
    np.testing.assert_allclose(parts, whole, atol=1e-6)
    assert max(sizes) <= 2 < len(TEXTS)
    assert np.abs(whole[1] - whole[0]).max() > 1e-3
    with torch.no_grad():
        tower.memory.scale.mul_(0.25)  # as it is served at that share
    np.testing.assert_allclose(tower.embed_validation((1.0,))[0], whole[1], atol=1e-6)


def test_a_query_in_bfloat16_is_the_same_though_it_came_in_other_company():
    """The embedding of one text differs from batch to batch by the rounding of its encoder."""
    draw = torch.Generator().manual_seed(0)
    queries = torch.nn.functional.normalize(torch.randn(50, 384, generator=draw), dim=1)
    noise = torch.nn.functional.normalize(torch.randn(50, 384, generator=draw), dim=1)
    rounded = torch.nn.functional.normalize(queries + 0.008 * noise, dim=1)
    assert (queries * rounded).sum(dim=1).min() < 1 - 2e-5
    memory = Memory(384, 50)
    with torch.no_grad():
        memory.keys.copy_(queries)
        memory.values.copy_(100 * torch.eye(50, 384))
        memory.scale.fill_(0.1)
    moved = memory(rounded, torch.ones(50)) - rounded
    assert moved.diagonal().abs().max() < 1e-5  # its own value is the only one in its own direction


def test_a_memory_of_an_encoder_that_does_not_normalise_itself(encoder, tmp_path):
    whole = encode.load_encoder(encoder)
    deployed = SentenceTransformer(modules=[*whole][:-1], device="cpu")
    queries = encode.encode_queries(deployed, TEXTS)
    memory = random_memory(dimension=16)
    tower = adapter_tower(deployed, queries, queries, "cpu", memory)
    tower.finished().save(str(tmp_path / "model"))
    again = encode.load_encoder(tmp_path / "model")
    np.testing.assert_allclose(
        encode.encode_queries(again, TEXTS), tower.embed_validation((1.0,))[0], atol=1e-6
    )
    export_model(tmp_path / "model", "npz", tmp_path / "memory.npz")
    bare = deployed.encode_query(TEXTS)  # as they are served, of any length
    assert np.linalg.norm(bare, axis=1).min() > 1.5
    np.testing.assert_allclose(
        serve(tmp_path / "memory.npz", bare), tower.embed_validation((1.0,))[0], atol=1e-5
    )
    behind = adapted.modules_behind(again, deployed)
    assert [type(module) for module in behind] == [Normalize, Dense, Dense, Dense, Normalize]
    found = adapted.embed_behind(behind, queries, normalized=True, device="cpu")
    np.testing.assert_allclose(found, tower.embed_validation((1.0,))[0], atol=1e-6)
    # A memory straight behind it would see the length that is normalised away in the deployed embeddings.
    bare = SentenceTransformer(modules=[*deployed, *memory.modules_to_serve()], device="cpu")
    assert adapted.modules_behind(bare, deployed) is None


def test_an_encoder_whose_scores_are_dot_products(world, encoder, capsys, tmp_path):
    dot = encode.load_encoder(encoder)
    del dot[2]
    dot.similarity_fn_name = "dot"
    dot.save(str(tmp_path / "dot"))
    folder = tmp_path / "index"
    judge = ("--judge", f"file:{world}/judgements.tsv", "--missing", "irrelevant")
    words = ["index", "--data", world, "--model", tmp_path / "dot", "--out", folder, "--quiet"]
    assert run(capsys, *words)[0] == 0
    common = ["--data", world, "--index", folder, "--device", "cpu", "--quiet"]
    words = ["label", *common, *judge, "--base-depth", 3, "--depth", 12, "--out", tmp_path / "labels"]
    assert run(capsys, *words)[0] == 0
    out = tmp_path / "model"
    words = ["train", *common, "--labels", tmp_path / "labels", *SHORT, *TUNE]
    code, _, said = run(capsys, *words, "--temperature", 1, "--out", out)
    assert (code, "temperatures are given for cosines" in said) == (0, False), said
    code, _, said = run(capsys, *words, "--out", tmp_path / "as-it-comes")
    assert code == 0, said
    items = np.linalg.norm(index.open_index(folder).embeddings, axis=1).mean()
    finetuned, deployed = load(out), encode.load_encoder(tmp_path / "dot")
    queries = encode.encode_queries(deployed, TEXTS)
    expected = encode.encode_queries(finetuned, TEXTS)
    assert np.linalg.norm(queries, axis=1).max() > 1.5
    # Queries attend as sharply as if they had the length that they have on average.
    memory, matrix = read_memory(finetuned[2], finetuned[3]), finetuned[4].linear.weight.detach().numpy()
    split = load_split(str(world), "train", index.open_index(folder).catalog)
    lengths = np.linalg.norm(encode.encode_queries(deployed, split.query_texts), axis=1)
    like_cosines = f"--temperature {0.03 * lengths.mean() * items:.2g} --sampling-temperature"
    assert f"temperatures are given for cosines, alike would be {like_cosines}" in " ".join(said.split())
    sharpness = 1 / np.linalg.norm(memory.keys, axis=1)
    # Of those that are not held back, and but for the metric, which makes keys shorter or longer.
    assert np.median(sharpness) == pytest.approx(0.06 * lengths.mean(), rel=0.15)
    logits = queries @ memory.keys.T
    attention = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    shifted = queries + attention @ memory.values
    np.testing.assert_allclose(shifted + shifted @ matrix.T, expected, atol=1e-5)
    exported = tmp_path / "memory.npz"
    assert run(capsys, "export", "--model", out, "--format", "npz", "--out", exported)[0] == 0
    np.testing.assert_allclose(serve(exported, queries), expected, atol=1e-5)


def test_whole_encoders_with_a_memory_keep_it(command, model, capsys, tmp_path):
    out = tmp_path / "full"
    train(
        capsys,
        command,
        out,
        "--tune",
        "full",
        "--init",
        model,
        "--learning-rate",
        1e-3,
        "--validation-fraction",
        0,
    )
    before, after = weights_of(model), weights_of(out)
    same = {name for name in after if torch.equal(before[name], after[name]) and "pooler" not in name}
    assert same == {name for name in after if name.startswith(("3_Dense", "4_Dense"))}
    # No arrays take the deployed embeddings to what another encoder gives.
    line = fails(capsys, "export", "--model", out, "--format", "npz", "--out", tmp_path / "no.npz")
    assert "whose weights are not the deployed ones" in line


def test_arrays_that_would_give_other_embeddings_are_not_written(model, capsys, tmp_path):
    broken = load(model)
    with torch.no_grad():
        broken[-3].linear.weight[:, -16:] *= 1.1  # what a memory passes through
    broken.save(str(tmp_path / "broken"))
    out = tmp_path / "no.npz"
    line = fails(capsys, "export", "--model", tmp_path / "broken", "--format", "npz", "--out", out)
    assert "arrays would give embeddings that differ" in line
    assert not out.exists()


@pytest.mark.parametrize("tune", ["adapter", "memory"])
def test_an_encoder_that_is_stored_in_half_precision(world, encoder, capsys, tmp_path, tune):
    encode.load_encoder(encoder).half().save(str(tmp_path / "half"))
    judge = ("--judge", f"file:{world}/judgements.tsv", "--missing", "irrelevant")
    common = ["--data", world, "--index", tmp_path / "index"]
    labels = ("--labels", tmp_path / "labels")
    how = (*SHORT, "--tune", tune, "--learning-rate", 0.02, "--validation-fraction", 0)
    against = ("--split", "test", "--model", f"new={tmp_path / 'model'}", "--base-depth", 3, "--k", 3)
    for words in (
        ("index", "--data", world, "--model", tmp_path / "half", "--out", tmp_path / "index"),
        ("label", *common, *judge, "--base-depth", 3, "--depth", 12, "--out", tmp_path / "labels"),
        ("train", *common, *labels, *how, "--out", tmp_path / "model"),
        ("eval", *common, *judge, *against, "--out", tmp_path / "report"),
        ("export", "--model", tmp_path / "model", "--format", "npz", "--out", tmp_path / "a.npz"),
    ):
        code, _, err = run(capsys, *words)
        assert code == 0, err
    deployed, finetuned = (encode.load_encoder(tmp_path / name) for name in ("half", "model"))
    queries, expected = (encode.encode_queries(model, TEXTS) for model in (deployed, finetuned))
    np.testing.assert_allclose(serve(tmp_path / "a.npz", queries), expected, atol=5e-3)
    assert np.abs(queries - expected).max() > 0.01


def test_kept_checkpoints_load_and_share_what_is_frozen(command, index_folder, capsys, tmp_path):
    found = train(capsys, command, tmp_path / "model", *TUNE, "--keep", 20, "--blends", 4)
    folders = sorted((tmp_path / "model" / "checkpoints").iterdir())
    # 4 checkpoints, 3 blends, and the whole line with less of the memory.
    assert len(folders) == len(found["points"]) == 4 + 3 + 3 * 4
    assert len({(folder / "model.safetensors").stat().st_ino for folder in folders}) == 1
    weights = {folder.name: weights_of(folder) for folder in folders}
    deployed = index.open_index(index_folder).query_encoder("cpu")
    embeddings = encode.encode_queries(deployed, TEXTS)
    (start, last, half) = (weights[name] for name in ("step-0", "step-12", "step-12-share-0.5"))
    keys, adds, maps = (f"{n}_Dense/model.safetensors/linear.weight" for n in (3, 4, 5))
    assert {name for name in last if not torch.equal(start[name], last[name])} == {keys, adds, maps}
    assert torch.allclose(half[maps], (start[maps] + last[maps]) / 2, atol=1e-6)
    assert torch.allclose(half[keys], (start[keys] + last[keys]) / 2, atol=1e-5)  # 17 times as large
    for name, whole_share in (("step-12", last), ("step-12-share-0.5", half)):
        tenth = weights[f"{name}-memory-0.1"]
        assert torch.equal(tenth[maps], whole_share[maps])
        assert torch.equal(tenth[keys], whole_share[keys])
        assert torch.allclose(tenth[adds][:, :-16], whole_share[adds][:, :-16] / 10, atol=1e-7)
        assert torch.equal(tenth[adds][:, -16:], torch.eye(16))
    assert last[adds][:, :-16].abs().max() > half[adds][:, :-16].abs().max() > 0
    # The start is the deployed encoder; the others are what they say, as whole encoders of text.
    np.testing.assert_allclose(encode.encode_queries(load(folders[0]), TEXTS), embeddings, atol=1e-6)
    whole = load(tmp_path / "model" / "checkpoints" / "step-12-share-0.5")
    assert torch.equal(whole[-3].linear.weight, half[adds])
    behind = adapted.modules_behind(whole, deployed)
    served = adapted.embed_behind(behind, embeddings, normalized=True, device="cpu")
    np.testing.assert_allclose(encode.encode_queries(whole, TEXTS), served, atol=1e-6)


def test_broken_off_and_resumed_is_as_undisturbed(command, capsys, tmp_path, monkeypatch):
    mixed = (*TUNE, "--alpha", 0.25, "--gamma", 0.5, "--log-every", 1)
    train(capsys, command, tmp_path / "whole", *mixed)
    train(capsys, command, tmp_path / "again", *mixed)
    assert same_weights(tmp_path / "whole", tmp_path / "again")
    break_off_at(9, monkeypatch)
    assert run(capsys, *command, *mixed, "--out", tmp_path / "broken")[0] == 130
    monkeypatch.undo()
    code, _, err = run(capsys, *command, *mixed, "--out", tmp_path / "broken")
    assert (code, "going on at step 8" in err) == (0, True), err
    assert same_weights(tmp_path / "whole", tmp_path / "broken")
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "broken")


def test_killed_at_random_moments_it_ends_with_the_same_weights(command, capsys, tmp_path):
    longer = (*TUNE, "--steps", 300, "--eval-every", 5, "--keep", 1, "--log-every", 1, "--memory-size", 12)
    words = [str(word) for word in (*command, *longer, "--quiet", "--out", tmp_path / "killed")]
    rng, kills, said = random.Random(2), 0, tmp_path / "said"
    log = tmp_path / "killed.partial" / "log.jsonl"
    for attempt in range(4):
        before = log.stat().st_size if log.exists() else 0
        process = start(words, {"OMP_NUM_THREADS": "1"}, said, {})
        deadline = time.monotonic() + 180
        while attempt < 3 and process.is_alive() and time.monotonic() < deadline:
            if log.exists() and log.stat().st_size > before + 4000:
                time.sleep(rng.random() * 0.1)
                process.kill()
                break
            time.sleep(0.005)
        process.join()
        kills += process.exitcode == -signal.SIGKILL
    assert kills == 3
    assert process.exitcode == 0, said.read_text()
    train(capsys, command, tmp_path / "whole", *longer)
    assert same_weights(tmp_path / "whole", tmp_path / "killed")
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "killed")


def test_micro_batches_give_the_same(command, capsys, tmp_path):
    train(capsys, command, tmp_path / "whole", *TUNE)
    train(capsys, command, tmp_path / "cut", *TUNE, "--micro-batch", 5)
    one, two = weights_of(tmp_path / "whole"), weights_of(tmp_path / "cut")
    assert one.keys() == two.keys()
    # Keys are served divided by the temperature.
    scales = {name: 0.06 if name.startswith("3_Dense") else 1 for name in one}
    assert all(
        torch.allclose(scale * one[name], scale * two[name], atol=1e-5) for name, scale in scales.items()
    )


def test_several_deployed_models(command, world, capsys, tmp_path):
    other = make_encoder(tmp_path / "other", dimension=24, seed=9)
    words = ["index", "--data", world, "--model", other, "--out", tmp_path / "second", "--quiet"]
    assert run(capsys, *words)[0] == 0
    found = train(capsys, command, tmp_path / "model", *TUNE, "--index", tmp_path / "second")
    assert found["points"][0]["novelty"] == 0
    assert found["points"][3]["novelty"] > 0
    assert load(tmp_path / "model")[-4].in_features == 16


def test_plain_supervised_training_remembers_feedback_alone(
    command, world, index_folder, capsys, tmp_path, monkeypatch
):
    remembered = []

    def keep(*given):
        memory = memorise.make_memory(*given)
        remembered.append(copy.deepcopy(memory))
        return memory

    monkeypatch.setattr(prepare, "make_memory", keep)
    train(capsys, command, tmp_path / "model", *TUNE, "--objective", "supervised", "--validation-fraction", 0.2,
          "--steps", 4, "--memory-size", 100, "--no-refit")  # fmt: skip
    found = index.open_index(index_folder)
    split = load_split(str(world), "train", found.catalog)
    embeddings = index.base_query_embeddings(found, split)
    feedback = {}
    for query, item in zip(split.feedback_queries, split.feedback_items, strict=True):
        feedback.setdefault(tuple(embeddings[query].round(4)), []).append(np.array(found.embeddings[item]))
    keys, values = remembered[0].keys.numpy(), remembered[0].values.detach().numpy()
    sources = remembered[0].sources.tolist()
    assert sources[:16] == list(range(16))  # of twenty queries four are held back
    assert max(sources[16:]) < 16
    for key, value in zip(keys[:16], values, strict=False):
        assert value == pytest.approx(np.mean(feedback[tuple(key.round(4))], axis=0), abs=1e-5)
    for key, value, source in list(zip(keys, values, sources, strict=True))[16:]:
        known = feedback[tuple(keys[source].round(4))]
        others = [item for item in known if unit(item.astype(float)) != pytest.approx(key, abs=1e-3)]
        assert len(others) == len(known) - 1
        assert value == pytest.approx(np.mean(others, axis=0), abs=1e-3)


def test_the_size_is_a_cap_and_bad_ones_are_one_line(command, capsys, tmp_path):
    train(capsys, command, tmp_path / "five", *TUNE, "--memory-size", 5)
    assert load(tmp_path / "five")[-4].out_features == 5 + 16
    assert json.loads((tmp_path / "five" / "manifest.json").read_text())["config"]["memory_size"] == 5
    out = ("--out", tmp_path / "none")
    assert "--memory-size 0: must be at least 1" in fails(capsys, *command, *TUNE, "--memory-size", 0, *out)
    assert "--tune memories: unknown; choose from full, lora, adapter, memory" in fails(
        capsys, *command, "--tune", "memories", *out
    )
    assert not (tmp_path / "none").exists()


# Where it is served


def serve(file: Path, queries: np.ndarray) -> np.ndarray:
    """What the README says, with numpy alone; `queries` as the deployed encoder gives them."""
    with np.load(file) as arrays:  # no pickle in it
        if "keys" in arrays:
            if arrays["normalize"]:
                queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
            queries = queries + softmax(queries @ arrays["keys"].T, axis=1) @ arrays["values"]
        moved = queries @ arrays["matrix"]
        if arrays["normalize"]:
            moved /= np.linalg.norm(moved, axis=1, keepdims=True)
    return moved


def test_the_exported_arrays_serve_the_same_embeddings(model, index_folder, capsys, tmp_path):
    out = tmp_path / "memory.npz"
    code, found, err = run(capsys, "export", "--model", model, "--format", "npz", "--out", out, "--json")
    assert code == 0, err
    made = json.loads(found)
    assert made["difference"] < 1e-5
    assert made["keys"] == load(model)[-4].out_features - 16 == 66  # 20 queries, and items of theirs
    queries = encode.encode_queries(index.open_index(index_folder).query_encoder(), TEXTS)
    expected = load(model).encode_query(TEXTS, normalize_embeddings=True)
    np.testing.assert_allclose(serve(out, queries), expected, atol=1e-5)


@pytest.mark.parametrize("form", ["onnx", "st"])
def test_whole_encoders_are_exported(model, form, capsys, tmp_path):
    if form == "onnx":
        pytest.importorskip("onnxscript")
    code, found, err = run(
        capsys, "export", "--model", model, "--format", form, "--out", tmp_path / "x", "--json"
    )
    assert code == 0, err
    assert json.loads(found)["difference"] < 1e-4


def test_arrays_hold_one_memory_in_front_of_what_stands_behind_it(
    command, model, index_folder, capsys, tmp_path
):
    adapter = ("--tune", "adapter", "--learning-rate", 0.05, "--validation-fraction", 0)
    train(capsys, command, tmp_path / "second", *adapter, "--init", model)
    out = tmp_path / "arrays.npz"
    assert run(capsys, "export", "--model", tmp_path / "second", "--format", "npz", "--out", out)[0] == 0
    second = load(tmp_path / "second")
    assert [type(module) for module in second][-5:] == [Dense, Dense, Normalize, Dense, Normalize]
    queries = encode.encode_queries(index.open_index(index_folder).query_encoder(), TEXTS)
    np.testing.assert_allclose(serve(out, queries), encode.encode_queries(second, TEXTS), atol=1e-5)
    # A second memory asks what the first one gives: no arrays, but any other way of serving it.
    code, _, err = run(capsys, *command, *TUNE, "--init", model, "--out", tmp_path / "third", "--quiet")
    assert code == 0
    assert "its memory may hold the training queries themselves" in " ".join(err.split())
    line = fails(
        capsys, "export", "--model", tmp_path / "third", "--format", "npz", "--out", tmp_path / "no.npz"
    )
    assert "its memory stands behind another adapter" in line
    assert not (tmp_path / "no.npz").exists()
    assert run(capsys, "export", "--model", tmp_path / "third", "--out", tmp_path / "st")[0] == 0
