"""`--tune memory`: the module by itself, where it starts, and as a user trains, serves and exports it."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize

from novelret import adapted, encode, index
from novelret.cli import main
from novelret.data.split import load_split, make_split
from novelret.errors import UserError
from novelret.label.table import make_table
from novelret.memory import Memory
from novelret.train import memorise
from novelret.train.rewards import load_reward
from novelret.train.states import gather_material
from novelret.train.tower import adapter_tower
from tests.conftest import make_encoder
from tests.killing import break_off_at, start

SHORT = ("--base-depth", 3, "--depth", 12, "--steps", 12, "--eval-every", 4, "--batch-size", 16, "--max-recall-drop", 1,
         "--validation-fraction", 0.2, "--device", "cpu")  # fmt: skip
TUNE = ("--tune", "memory", "--learning-rate", 0.02)
TEXTS = ["buy red sofa", "lamp", "buy grey desk unknown words here", "chair " * 40]


@pytest.fixture(scope="module")
def labels(world, index_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("labels") / "labels"
    command = ["label", "--data", world, "--index", index_folder, "--judge", f"file:{world}/judgements.tsv",
               "--missing", "irrelevant", "--base-depth", 3, "--depth", 12, "--out", out, "--quiet"]  # fmt: skip
    assert main([str(part) for part in command]) == 0
    return out


@pytest.fixture(scope="module")
def command(world, index_folder, labels):
    return ["train", "--data", world, "--index", index_folder, "--labels", labels, *SHORT]


@pytest.fixture(scope="module")
def model(command, tmp_path_factory):
    """The weights of the last step, without validation."""
    out = tmp_path_factory.mktemp("model") / "memory"
    words = [*command, *TUNE, "--validation-fraction", 0, "--out", out, "--quiet"]
    assert main([str(word) for word in words]) == 0
    return out


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err.strip()


def train(capsys, command, out, *more):
    code, found, err = run(capsys, *command, *more, "--out", out, "--json", "--quiet")
    assert code == 0, err
    return json.loads(found)


def fails(capsys, *arguments) -> str:
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert len(err.splitlines()) == 1, err
    return err


def weights_of(folder):
    return {
        f"{path.relative_to(folder)}/{name}": tensor
        for path in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def same_weights(one, two) -> bool:
    mine, others = weights_of(one), weights_of(two)
    return mine.keys() == others.keys() and all(torch.equal(mine[name], others[name]) for name in mine)


def log_of(folder):
    timing = ("step_time", "memory_gb")
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in timing} for line in lines]


def load(folder) -> SentenceTransformer:
    return SentenceTransformer(str(folder), device="cpu", trust_remote_code=True)


# The module


def random_memory(size=7, dimension=5, seed=0, dtype=torch.float32) -> Memory:
    generator = torch.Generator().manual_seed(seed)
    memory = Memory(dimension, size).to(dtype)
    with torch.no_grad():
        keys = torch.randn(size, dimension, generator=generator, dtype=dtype)
        memory.keys.copy_(torch.nn.functional.normalize(keys, dim=1))
        memory.values.copy_(torch.randn(size, dimension, generator=generator, dtype=dtype))
        memory.scale.fill_(0.07)
    return memory


def by_hand(memory: Memory, query: np.ndarray, left_out: set[int] = frozenset()) -> np.ndarray:
    keys, values = memory.keys.double().numpy(), memory.values.detach().double().numpy()
    unit = query / np.sqrt((query**2).sum())
    weights = {j: np.exp(keys[j] @ unit / 0.06) for j in range(len(keys)) if j not in left_out}
    moved = query.astype(np.float64)
    for j, weight in weights.items():
        moved = moved + 10 * 0.07 * weight / sum(weights.values()) * values[j]
    return moved


def test_the_shift_is_the_formula_for_queries_of_any_length():
    memory = random_memory()
    queries = np.random.default_rng(1).normal(size=(4, 5)).astype(np.float32)
    found = memory({"sentence_embedding": torch.from_numpy(queries)})["sentence_embedding"].detach().numpy()
    for row, query in zip(found, queries, strict=True):
        assert row == pytest.approx(by_hand(memory, query), abs=1e-5)
        assert np.abs(row - query).max() > 0.01


def test_training_queries_do_not_see_keys_that_equal_them():
    memory = random_memory()
    with torch.no_grad():
        memory.keys[4] = memory.keys[1]  # the same query twice
        memory.keys[5] = torch.nn.functional.normalize(
            memory.keys[1] + 0.02, dim=0
        )  # one that is only like it
    query = memory.keys[1].clone()
    found = memory.shift(query[None], leave_one_out=True)[0].detach().numpy()
    assert found == pytest.approx(by_hand(memory, query.numpy(), {1, 4}), abs=1e-5)
    whole = memory.shift(query[None])[0].detach().numpy()
    assert whole == pytest.approx(by_hand(memory, query.numpy()), abs=1e-5)
    assert np.abs(whole - found).max() > 0.05
    # What a query's own values are has no say in its loss.
    memory.shift(query[None], leave_one_out=True).square().sum().backward()
    assert memory.values.grad[[1, 4]].abs().max() == 0
    assert memory.values.grad[5].abs().max() > 0


def test_a_query_that_equals_every_key_stays_where_it_is():
    memory = random_memory(size=3)
    with torch.no_grad():
        memory.keys[:] = memory.keys[0]
    query = (2.5 * memory.keys[:1]).clone().requires_grad_()
    found = memory.shift(query, leave_one_out=True)
    assert torch.equal(found, query)
    found.sum().backward()
    assert all(torch.isfinite(part.grad).all() for part in (query, memory.values, memory.scale))


@pytest.mark.parametrize("leave_one_out", [False, True])
def test_gradients_are_those_of_finite_differences(leave_one_out):
    queries = torch.from_numpy(np.random.default_rng(2).normal(size=(3, 5)))
    memory = random_memory(dtype=torch.float64)
    queries[0] = memory.keys[2]
    parameters = [part.detach().clone() for part in (memory.values, memory.scale)]
    del memory.values, memory.scale

    def shifted(x, values, scale):
        memory.values, memory.scale = values, scale
        return memory.shift(x, leave_one_out=leave_one_out)

    assert torch.autograd.gradcheck(shifted, [part.requires_grad_() for part in (queries, *parameters)])


def test_a_saved_memory_is_read_back(tmp_path):
    memory = random_memory()
    memory.save(str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    again = Memory.load(str(tmp_path))
    queries = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.shift(queries), memory.shift(queries))


# Where it starts


@pytest.fixture
def material():
    """Nine queries, some with feedback, some with labels, number 4 with nothing but a no, 7 with nothing."""
    rng = np.random.default_rng(3)
    feedback = np.array([[0, 3], [0, 8], [1, 5], [2, 5], [5, 0], [6, 11]]).T
    labelled = np.array(
        [[0, 3, 1], [0, 9, 1], [0, 2, 0], [3, 1, 1], [3, 4, 1], [4, 6, 0], [6, 11, 0], [8, 7, 1]]
    )
    split = make_split("train", list("abcdefghi"), list("abcdefghi"), *feedback, np.full((9, 1), -1))
    labels = make_table(*labelled[:, :2].T, labelled[:, 2].astype(np.int8), 12)
    lists = np.stack([rng.permutation(12) for _ in range(9)])
    return gather_material(split, lists, 3, labels, load_reward("eq7"))


ITEMS = np.random.default_rng(4).normal(size=(12, 5)).astype(np.float16)
QUERIES = np.random.default_rng(5).normal(size=(9, 5)).astype(np.float32)
KNOWN = {0: {3, 8, 9}, 1: {5}, 2: {5}, 3: {1, 4}, 5: {0}, 6: {11}, 8: {7}}


@pytest.mark.parametrize("numbers", [1, 15, 1 << 24])
def test_values_start_at_the_mean_of_what_is_known(material, monkeypatch, numbers):
    monkeypatch.setattr(memorise, "_NUMBERS", numbers)  # parts that cut through a query's items
    memory = memorise.make_memory(material, QUERIES, ITEMS, 100, 0)
    assert memory.size == len(KNOWN)
    for row, (query, items) in enumerate(KNOWN.items()):
        key = QUERIES[query] / np.linalg.norm(QUERIES[query])
        assert memory.keys[row].numpy() == pytest.approx(key, abs=1e-6)
        mean = np.mean([ITEMS[item].astype(float) for item in items], axis=0)
        assert memory.values[row].detach().numpy() == pytest.approx(mean, abs=1e-6)
    queries = torch.from_numpy(QUERIES)
    assert torch.equal(memory.shift(queries), queries)


def test_at_most_so_many_keys_drawn_by_the_seed(material):
    full = memorise.make_memory(material, QUERIES, ITEMS, 7, 0)
    drawn = []
    for seed in (0, 0, 1, 2, 3):
        memory = memorise.make_memory(material, QUERIES, ITEMS, 3, seed)
        assert memory.keys.shape == memory.values.shape == (3, 5)
        places = [int(np.flatnonzero((full.keys == key).all(dim=1))[0]) for key in memory.keys]
        assert torch.equal(memory.values, full.values[places])  # each key with its own value
        drawn.append(tuple(places))
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) > 2


def test_nothing_known_is_nothing_to_remember(material):
    split = make_split(
        "train", list("ab"), list("ab"), *np.zeros((2, 0), dtype=np.int64), np.full((2, 1), -1)
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
    tower = adapter_tower(deployed, queries, queries, "cpu", memory)
    rows = np.array([3, 0, 1])
    trained = tower.embed(rows).detach().numpy()
    served = tower.embed_validation()
    for place, (row, left_out) in enumerate(zip(rows, ({}, {0, 2}, {1}), strict=True)):
        for found, out in ((trained[place], left_out), (served[row], set())):
            expected = by_hand(memory, queries[row], set(out))
            assert found == pytest.approx(expected / np.linalg.norm(expected), abs=1e-5)
    assert np.abs(served[[0, 1]] - trained[[1, 2]]).max() > 0.01


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
    means = json.loads((report / "metrics.json").read_text())["models"]
    assert means["base"]["RelevantNovel@3"] == 0
    assert means["new"]["RelevantNovel@3"] > 0.2


def test_a_trained_model_is_loaded_by_sentence_transformers_and_evaluated_from_deployed_embeddings(
    model, index_folder
):
    whole = load(model)
    assert [type(module) for module in whole][-3:] == [Memory, Dense, Normalize]
    memory, dense = whole[-3], whole[-2]
    assert memory.scale.abs() > 0.005
    assert dense.linear.weight.abs().max() > 0.01
    deployed = index.open_index(index_folder).query_encoder("cpu")
    behind = adapted.modules_behind(whole, deployed)
    assert [type(module) for module in behind] == [Memory, Dense, Normalize]
    embeddings = encode.encode_queries(deployed, TEXTS)
    found = adapted.embed_behind(behind, embeddings, normalized=True, device="cpu")
    expected = whole.encode_query(TEXTS, normalize_embeddings=True)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.abs(found - embeddings).max() > 0.01
    # In small parts too.
    parts = pytest.MonkeyPatch()
    parts.setattr(adapted, "_ATTENDED", 30)
    again = adapted.embed_behind(behind, embeddings, normalized=True, device="cpu")
    parts.undo()
    np.testing.assert_allclose(again, expected, atol=1e-6)
    assert "trust_remote_code=True" in (model / "README.md").read_text()


def test_a_memory_of_an_encoder_that_does_not_normalise_itself(encoder, tmp_path):
    whole = encode.load_encoder(encoder)
    deployed = SentenceTransformer(modules=[*whole][:-1], device="cpu")
    queries = encode.encode_queries(deployed, TEXTS)
    memory = random_memory(dimension=16)
    tower = adapter_tower(deployed, queries, queries, "cpu", memory)
    tower.finished().save(str(tmp_path / "model"))
    again = encode.load_encoder(tmp_path / "model")
    np.testing.assert_allclose(encode.encode_queries(again, TEXTS), tower.embed_validation(), atol=1e-6)
    behind = adapted.modules_behind(again, deployed)
    assert [type(module) for module in behind] == [Normalize, Memory, Dense, Normalize]
    found = adapted.embed_behind(behind, queries, normalized=True, device="cpu")
    np.testing.assert_allclose(found, tower.embed_validation(), atol=1e-6)
    # A memory straight behind it would see the length that is normalised away in the deployed embeddings.
    bare = SentenceTransformer(modules=[*deployed, memory], device="cpu")
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
    train(capsys, ["train", *common, "--labels", tmp_path / "labels", *SHORT, *TUNE, "--temperature", 1], out)
    finetuned, deployed = load(out), encode.load_encoder(tmp_path / "dot")
    queries = encode.encode_queries(deployed, TEXTS)
    expected = encode.encode_queries(finetuned, TEXTS)
    assert np.linalg.norm(queries, axis=1).max() > 1.5
    memory, dense = finetuned[2], finetuned[3]
    assert torch.linalg.norm(memory.keys, dim=1).numpy() == pytest.approx(1, abs=1e-5)
    shifted = memory.shift(torch.from_numpy(queries))
    moved = (shifted + dense.linear(shifted)).detach().numpy()
    np.testing.assert_allclose(moved, expected, atol=1e-5)
    exported = tmp_path / "memory.npz"
    assert run(capsys, "export", "--model", out, "--format", "npz", "--out", exported)[0] == 0
    np.testing.assert_allclose(serve(exported, queries), expected, atol=1e-5)


def test_kept_checkpoints_load_and_share_what_is_frozen(command, index_folder, capsys, tmp_path):
    found = train(capsys, command, tmp_path / "model", *TUNE, "--keep", 20, "--blends", 4)
    folders = sorted((tmp_path / "model" / "checkpoints").iterdir())
    assert len(folders) == len(found["points"]) == 7
    assert len({(folder / "model.safetensors").stat().st_ino for folder in folders}) == 1
    weights = {folder.name: weights_of(folder) for folder in folders}
    deployed = index.open_index(index_folder).query_encoder("cpu")
    embeddings = encode.encode_queries(deployed, TEXTS)
    (start, last, half) = (weights[name] for name in ("step-0", "step-12", "step-12-share-0.5"))
    own = {"3_Memory/model.safetensors/values", "3_Memory/model.safetensors/scale",
           "4_Dense/model.safetensors/linear.weight"}  # fmt: skip
    assert {name for name in last if not torch.equal(start[name], last[name])} == own
    for name in own:
        assert torch.allclose(half[name], (start[name] + last[name]) / 2, atol=1e-6)
    # The start is the deployed encoder; the others are what they say, as whole encoders of text.
    np.testing.assert_allclose(encode.encode_queries(load(folders[0]), TEXTS), embeddings, atol=1e-6)
    whole = load(tmp_path / "model" / "checkpoints" / "step-12-share-0.5")
    assert torch.equal(whole[-3].values, half["3_Memory/model.safetensors/values"])
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
        deadline = time.monotonic() + 60
        while attempt < 3 and process.is_alive() and time.monotonic() < deadline:
            if log.exists() and log.stat().st_size > before + 4000:
                time.sleep(rng.random() * 0.1)
                os.kill(process.pid, signal.SIGKILL)
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
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)


def test_several_deployed_models(command, world, capsys, tmp_path):
    other = make_encoder(tmp_path / "other", dimension=24, seed=9)
    words = ["index", "--data", world, "--model", other, "--out", tmp_path / "second", "--quiet"]
    assert run(capsys, *words)[0] == 0
    found = train(capsys, command, tmp_path / "model", *TUNE, "--index", tmp_path / "second")
    assert found["points"][0]["novelty"] == 0
    assert found["points"][3]["novelty"] > 0
    assert load(tmp_path / "model")[-3].keys.shape[1] == 16


def test_plain_supervised_training_remembers_feedback_alone(command, world, index_folder, capsys, tmp_path):
    train(capsys, command, tmp_path / "model", *TUNE, "--objective", "supervised", "--validation-fraction", 0.2,
          "--steps", 4, "--eval-every", 2, "--keep", 20, "--memory-size", 100)  # fmt: skip
    start = weights_of(tmp_path / "model" / "checkpoints" / "step-0")
    found = index.open_index(index_folder)
    split = load_split(str(world), "train", found.catalog)
    embeddings = index.base_query_embeddings(found, split)
    feedback = {}
    for query, item in zip(split.feedback_queries, split.feedback_items, strict=True):
        feedback.setdefault(tuple(embeddings[query].round(4)), []).append(np.array(found.embeddings[item]))
    keys, values = (start[f"3_Memory/model.safetensors/{name}"].numpy() for name in ("keys", "values"))
    assert len(keys) == 16  # of twenty queries four are held back
    for key, value in zip(keys, values, strict=True):
        assert value == pytest.approx(np.mean(feedback[tuple(key.round(4))], axis=0), abs=1e-5)


def test_the_size_is_a_cap_and_bad_ones_are_one_line(command, capsys, tmp_path):
    train(capsys, command, tmp_path / "five", *TUNE, "--memory-size", 5)
    assert load(tmp_path / "five")[-3].keys.shape == (5, 16)
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
        unit = queries / np.linalg.norm(queries, axis=1, keepdims=True)
        attention = np.exp((unit @ arrays["keys"].T - 1) / arrays["temperature"])
        shift = attention / attention.sum(axis=1, keepdims=True) @ arrays["values"]
        moved = (queries + shift) @ arrays["matrix"]
        if arrays["normalize"]:
            moved /= np.linalg.norm(moved, axis=1, keepdims=True)
    return moved


def test_the_exported_arrays_serve_the_same_embeddings(model, index_folder, capsys, tmp_path):
    out = tmp_path / "memory.npz"
    code, found, err = run(capsys, "export", "--model", model, "--format", "npz", "--out", out, "--json")
    assert code == 0, err
    made = json.loads(found)
    assert made["difference"] < 1e-5
    assert made["keys"] == load(model)[-3].size == 20
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
    assert [type(module) for module in second][-5:] == [Memory, Dense, Normalize, Dense, Normalize]
    queries = encode.encode_queries(index.open_index(index_folder).query_encoder(), TEXTS)
    np.testing.assert_allclose(serve(out, queries), encode.encode_queries(second, TEXTS), atol=1e-5)
    assert "trust_remote_code=True" in (tmp_path / "second" / "README.md").read_text()
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
