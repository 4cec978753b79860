"""`novelret train` as a user drives it: what is tuned, which checkpoint, judges, kills, logs."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from rich.console import Console
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from novelret.artifacts import fingerprint_file
from novelret.cli import main
from novelret.data.split import make_split
from novelret.errors import UserError
from novelret.index import base_lists, open_index, pooled_lists
from novelret.label import questions
from novelret.label.judges import openai as openai_judge
from novelret.label.table import make_table
from novelret.progress import Reporter
from novelret.train import checkpoint, judging, loop, tower, trainer, write
from novelret.train.config import TrainConfig
from novelret.train.log import Log, read_log
from novelret.train.matrix import ItemMatrix
from novelret.train.objectives import pg_ret
from novelret.train.panel import peak_memory, training_panel
from novelret.train.tower import full_tower
from novelret.train.validation import (
    Point,
    Validation,
    best_first,
    keeps_budget,
    known_pairs,
    left_for_good,
    measure,
    pareto,
)
from novelret.trained import training_of
from tests.commands import run
from tests.conftest import COLOURS, THINGS, make_encoder, write_jsonl
from tests.killing import break_off_at, start
from tests.loopback import LoopbackJudge
from tests.rows import from_padded
from tests.train.conftest import SHORT, weights_of

ADAPTER = ("--tune", "adapter", "--learning-rate", 0.02)
MIXED = ("--alpha", 0.25, "--gamma", 0.5)


def train(capsys, command, out, *more):
    """The JSON result and what was said on stderr; a run that fails fails the test."""
    code, found, err = run(capsys, *command, *more, "--out", out, "--json", "--quiet")
    assert code == 0, err
    return json.loads(found), err


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


# What is tuned


def test_lora_moves_the_encoder_and_leaves_a_plain_model(command, encoder, capsys, tmp_path):
    train(capsys, command, tmp_path / "lora", "--tune", "lora", "--lora-rank", 2, "--learning-rate", 0.01)
    assert not [name for name in weights_of(tmp_path / "lora") if "lora" in name]
    train(capsys, command, tmp_path / "again", "--tune", "lora", "--lora-rank", 2, "--learning-rate", 0.01)
    one, two = (weights_of(tmp_path / name) for name in ("lora", "again"))
    assert all(torch.equal(one[name], two[name]) for name in one)  # the seed decides where it starts, too
    base, model = (SentenceTransformer(str(f), device="cpu") for f in (encoder, tmp_path / "lora"))
    plain, tuned = base[0].model.state_dict(), model[0].model.state_dict()
    assert plain.keys() == tuned.keys()
    changed = {name for name in plain if not torch.allclose(plain[name], tuned[name])}
    assert changed
    for name in changed:  # updates of rank 2, on matrices alone
        difference = (tuned[name] - plain[name]).double()
        assert torch.linalg.svdvals(difference)[2:].max() < 1e-5
    # The merged model is the one that was validated.
    points = json.loads((tmp_path / "lora" / "validation.json").read_text())
    chosen = json.loads((tmp_path / "lora" / "manifest.json").read_text())["facts"]["chosen"]
    assert chosen in points


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tune", ["full", "lora"])
def test_encoders_stored_in_half_precision_are_trained_in_single(
    world, encoder, labels, capsys, tmp_path, dtype, tune
):
    half = SentenceTransformer(str(encoder), device="cpu")
    half.to(dtype).save_pretrained(str(tmp_path / "half"))
    index = ["index", "--data", world, "--model", tmp_path / "half", "--out", tmp_path / "index", "-q"]
    assert main([str(part) for part in index]) == 0
    judged = ["label", "--data", world, "--index", tmp_path / "index", "--judge", f"file:{world}/judgements.tsv",
              "--missing", "irrelevant", "--base-depth", 3, "--depth", 12, "--out", tmp_path / "labels", "-q"]  # fmt: skip
    assert main([str(part) for part in judged]) == 0
    command = [
        "train",
        "--data",
        world,
        "--index",
        tmp_path / "index",
        "--labels",
        tmp_path / "labels",
        *SHORT,
    ]
    capsys.readouterr()
    rate = ("--learning-rate", 1e-4)  # steps that half precision rounds away
    train(capsys, command, tmp_path / "model", "--tune", tune, *rate, "--keep", 20, "--blends", 1)
    start = SentenceTransformer(str(tmp_path / "index" / "query_encoder"), device="cpu").state_dict()
    last = tmp_path / "model" / "checkpoints" / "step-12"
    moved = SentenceTransformer(str(last), device="cpu").state_dict()
    matrices = [name for name in start if "attention.self.query.weight" in name]
    for name in matrices:
        assert moved[name].dtype == torch.float32
        assert (moved[name] != start[name].float()).float().mean() > 0.9


def test_clipped_gradients_and_decay_change_the_weights(command, capsys, tmp_path):
    """Adam's steps do not depend on the gradient's size until it is near nothing."""
    common = (*ADAPTER, "--keep", 20, "--blends", 1)
    sizes = {}
    for name, more in {
        "plain": (),
        "clipped": ("--max-grad-norm", 1e-12),
        "decayed": ("--weight-decay", 20),
    }.items():
        train(capsys, command, tmp_path / name, *common, *more)
        weights = weights_of(tmp_path / name / "checkpoints" / "step-12")
        (map_of,) = (tensor for path, tensor in weights.items() if path.endswith("linear.weight"))
        sizes[name] = map_of.norm().item()
    assert 0 < sizes["clipped"] < 0.01 * sizes["plain"]
    assert sizes["decayed"] < 0.9 * sizes["plain"]


def test_starting_from_a_model_that_held_back_others_is_said(command, capsys, tmp_path):
    train(capsys, command, tmp_path / "first", *ADAPTER, "--no-refit")
    _, err = train(capsys, command, tmp_path / "same", *ADAPTER, "--keep", 20, "--init", tmp_path / "first")
    assert "looks better on them" not in err
    _, err = train(capsys, command, tmp_path / "again", *ADAPTER, "--init", tmp_path / "same")
    assert "queries that are held back here, and looks better on them" in err
    assert "train it with --no-refit" in err
    kept = tmp_path / "same" / "checkpoints" / "step-12"
    _, err = train(capsys, command, tmp_path / "kept", *ADAPTER, "--init", kept)
    assert "queries that are held back here, and looks better on them" in err
    _, err = train(capsys, command, tmp_path / "other", *ADAPTER, "--init", tmp_path / "first", "--seed", 1)
    assert "looks better on them" in err


def test_more_feedback_does_not_hide_what_a_start_was_trained_on(command, world, capsys, tmp_path):
    train(capsys, command, tmp_path / "refit", *ADAPTER)
    train(capsys, command, tmp_path / "kept-back", *ADAPTER, "--no-refit")
    assert run(capsys, "export", "--model", tmp_path / "refit", "--out", tmp_path / "export")[0] == 0
    shutil.copytree(world, tmp_path / "data")
    pairs = tmp_path / "data" / "qrels" / "train.tsv"
    query, item, score = pairs.read_text().splitlines()[-1].split("\t")
    (other,) = {"i00", "i39"} - {item} if item in ("i00", "i39") else ("i00",)
    pairs.write_text(f"{pairs.read_text()}{query}\t{other}\t{score}\n")
    for init, seed, told in (
        ("refit", 0, True),
        ("export", 0, True),
        ("kept-back", 0, False),
        ("kept-back", 1, True),
    ):
        _, err = train(
            capsys, command, tmp_path / f"of-{init}-{seed}", *ADAPTER, "--no-refit", "--seed", seed, "--data",
            tmp_path / "data", "--init", tmp_path / init,
        )  # fmt: skip
        assert ("looks better on them than it is" in " ".join(err.split())) == told, (init, seed)
    # What the start held back, its own start may have been trained on.
    held_back = np.load(tmp_path / "of-refit-0" / "held_back.npy")
    assert len(held_back) == 0 < len(np.load(tmp_path / "of-kept-back-0" / "held_back.npy"))


def test_a_kept_checkpoint_is_known_by_whatever_path(command, index_folder, capsys, tmp_path, monkeypatch):
    train(capsys, command, tmp_path / "model", *ADAPTER, "--keep", 1)
    (kept,) = (tmp_path / "model" / "checkpoints").iterdir()
    (tmp_path / "best").symlink_to(kept)
    monkeypatch.chdir(kept.parent)
    known = training_of(kept)
    assert known is not None
    for path in (tmp_path / "best", Path(kept.name), Path("..") / "checkpoints" / kept.name):
        found = training_of(path)
        assert found is not None
        assert (found.folder.resolve(), found.refit) == (known.folder, known.refit)


def test_gradient_checkpointing_changes_memory_only(command, capsys, tmp_path):
    tune = ("--tune", "full", "--learning-rate", 1e-3, "--log-every", 1)
    train(capsys, command, tmp_path / "plain", *tune)
    calls = []
    real = torch.utils.checkpoint.checkpoint

    def counted(*args, **kwargs):
        calls.append(1)
        return real(*args, **kwargs)

    import transformers.modeling_utils as modeling

    patched = pytest.MonkeyPatch()
    patched.setattr(torch.utils.checkpoint, "checkpoint", counted)
    patched.setattr(modeling, "checkpoint", counted, raising=False)
    train(capsys, command, tmp_path / "saving", *tune, "--gradient-checkpointing")
    patched.undo()
    assert calls
    for one, two in zip(log_of(tmp_path / "plain"), log_of(tmp_path / "saving"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)


def behind(transformer):
    module = torch.nn.Module()
    module.model = transformer
    return torch.nn.ModuleList([module]).eval()


def test_gradient_checkpointing_leaves_dropout_off():
    """OPT's layers call dropout themselves, by the same flag that checkpointing needs."""
    sizes = {
        "vocab_size": 20,
        "hidden_size": 16,
        "word_embed_proj_dim": 16,
        "ffn_dim": 16,
        "num_hidden_layers": 2,
    }
    opt = transformers.OPTModel(transformers.OPTConfig(**sizes, num_attention_heads=2, dropout=0.5))
    model, tokens = behind(opt), torch.arange(5)[None] + 3
    plain = opt(tokens).last_hidden_state
    tower._checkpoint_layers(model)
    assert any(layer.training for layer in model.modules())
    saving = opt(tokens).last_hidden_state
    assert torch.equal(plain, saving)
    saving.sum().backward()


def test_gradient_checkpointing_is_refused_where_it_cannot_be():
    config = transformers.MPNetConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(UserError, match="--gradient-checkpointing: MPNetModel does not support it"):
        tower._checkpoint_layers(behind(transformers.MPNetModel(config)))
    with pytest.raises(UserError, match="--gradient-checkpointing: Linear does not support it"):
        tower._checkpoint_layers(torch.nn.Sequential(torch.nn.Linear(2, 2)))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precisions_train_the_same_way(command, capsys, tmp_path, precision):
    tune = ("--tune", "full", "--learning-rate", 1e-3, "--log-every", 1)
    train(capsys, command, tmp_path / "fp32", *tune)
    train(capsys, command, tmp_path / precision, *tune, "--precision", precision)
    losses = [[line["loss"] for line in log_of(tmp_path / name)] for name in ("fp32", precision)]
    assert losses[1] != losses[0]
    assert losses[1][0] == pytest.approx(losses[0][0], rel=0.01)
    assert losses[1][-1] < 0.9 * losses[1][0]
    norms = [line["grad_norm"] for line in log_of(tmp_path / precision)]
    assert norms.count(None) <= (8 if precision == "fp16" else 0)  # steps that only lowered the loss scale


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_schedules(schedule):
    config = TrainConfig("d", "i", steps=100, warmup=0.1, learning_rate=1.0, schedule=schedule)
    rates = [config.learning_rate_at(step) for step in range(100)]
    assert rates[:10] == pytest.approx([(n + 1) / 10 for n in range(10)])
    expected = {"linear": 0.5, "cosine": 0.5, "constant": 1.0}[schedule]
    assert rates[55] == pytest.approx(expected)
    torch_rates = {
        "cosine": lambda n: 0.5 * (1 + np.cos(np.pi * n / 90)), "linear": lambda n: 1 - n / 90, "constant": lambda n: 1
    }  # fmt: skip
    assert rates[10:] == pytest.approx([torch_rates[schedule](n) for n in range(90)])


# Which checkpoint


def point(step, relevant_novel, recall, base=0.5):
    return Point(step, 2 * relevant_novel, relevant_novel, recall, 1.0, relevant_novel, base, 0.01)


def test_the_best_within_the_budget_comes_first_and_the_rest_by_recall():
    points = [point(0, 0, 0.5), point(1, 1, 0.496), point(2, 3, 0.4), point(3, 2, 0.6), point(4, 9, 0.45)]
    assert [p.step for p in best_first(points, 0.01)] == [3, 1, 0, 4, 2]
    assert [p.step for p in best_first(points, 0.1)] == [4, 3, 1, 0, 2]
    assert [keeps_budget(p, 0.01) for p in points] == [True, True, False, True, False]
    # The Pareto set by its definition: nobody is at least as good in both and better in one.
    assert pareto(points) == [False, False, False, True, True]


def test_recall_of_what_is_known_counts_relevant_labels_beside_feedback():
    nobody = from_padded(np.full((2, 1), -1))
    split = make_split("train", ["a", "b"], ["a", "b"], np.array([0, 0, 1]), np.array([3, 8, 5]), nobody)
    # Query a: 3 (fed back too) and 7 are judged relevant, 9 is not; query b: nothing more is known.
    pairs = np.array([[0, 3], [0, 7], [0, 9]]).T
    labels = make_table(*pairs, np.array([1, 1, 0], dtype=np.int8), 10)
    queries, items = known_pairs(split, labels, "known")
    assert list(zip(queries, items, strict=True)) == [(0, 3), (0, 7), (0, 8), (1, 5)]
    of_feedback = known_pairs(split, labels, "feedback")
    assert np.array_equal(of_feedback, (split.feedback_queries, split.feedback_items))

    def search(queries, k, excluded):
        assert (len(queries), k, len(excluded)) == (4, 2, 4)
        return np.array([[7, 9], [4, 5], [3, 8], [0, 1]])

    deployed = np.array([[3, 8], [0, 1]])
    for known, expected in ((of_feedback, [[0, 1], [1, 0]]), ((queries, items), [[1 / 3, 2 / 3], [1, 0]])):
        validation = Validation(split, known, deployed, deployed, labels)
        figures, unmoved = measure(validation, [np.zeros((2, 2))] * 2, search)
        assert unmoved[:, 0].tolist() == [0, 0]
        assert np.array_equal(unmoved[:, 3], unmoved[:, 4])
        assert figures[:, 3:] == pytest.approx(np.array(expected))
        assert figures[:, :3].tolist() == [[2, 1, 2], [2, 0, 0]]


@pytest.mark.parametrize(
    ("option", "value"),
    [("--seed", -1), ("--negative-share", 2), ("--weight-decay", -1), ("--alpha", "nan"), ("--window", "1,inf"),
     ("--max-grad-norm", 0), ("--warmup", 2), ("--max-recall-drop", 2), ("--max-recall-drop", "nan")],
)  # fmt: skip
def test_numbers_that_cannot_be_are_refused_by_name(command, capsys, tmp_path, option, value):
    code, _, err = run(capsys, *command, option, value, "--out", tmp_path / "model")
    assert code == 2
    assert option in err
    assert "must be" in err or "neither may be" in err or "expected" in err or "below the second" in err
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("--negative-share", 0.5, "--draw", "plain"), "--negative-share is of states drawn by their reward"),
        (("--negative-share", 0.5, "--gamma", 1), "--negative-share is of states drawn by their reward"),
        (("--hard-negatives", 3), "--hard-negatives and --judged-negatives are of --objective supervised"),
        (("--judged-negatives", 3), "--hard-negatives and --judged-negatives are of --objective supervised"),
        (
            ("--alpha", 0.5, "--gamma", 0.2, "--objective", "supervised"),
            "--alpha: --objective supervised learns",
        ),
        (("--keep", 1, "--validation-fraction", 0), "--keep: without held-back queries"),
        (("--batch-size", 1), "--gamma 0.5: not one of --batch-size 1 states is drawn for what --labels say"),
        (("--objective", "swap", "--list-size", 40), "--list-size 40: of 40 items a query leaves out 0, and"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(command, capsys, tmp_path, given, says):
    code, _, err = run(capsys, *command, *given, "--out", tmp_path / "model")
    assert (code, says in " ".join(err.split())) == (2, True), err


def test_the_log_tells_judged_states_from_feedback_pairs(command, capsys, tmp_path):
    train(capsys, command, tmp_path / "model", *ADAPTER, "--objective", "supervised-judged", "--log-every", 1)
    for line in log_of(tmp_path / "model"):
        assert line["loss/states"] > 0
        assert line["loss/feedback"] > 0
        assert line["loss/states"] + line["loss/feedback"] == pytest.approx(line["loss"], rel=1e-4)


def test_a_query_of_unknown_words_alone_has_no_gradient():
    words = ["[UNK]", *COLOURS, *THINGS]
    tokenizer = Tokenizer(WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    weights = np.random.default_rng(0).standard_normal((len(words), 8)).astype(np.float32)
    weights[0] = 0
    static = StaticEmbedding(tokenizer, embedding_weights=weights)
    model = SentenceTransformer(modules=[static, Normalize()], device="cpu")
    tower = full_tower(model, ["red sofa", "qqq"], ["lamp"], "fp32")
    embeddings = tower.embed(np.array([0, 1]), 0)
    assert embeddings[1].tolist() == [0] * 8
    embeddings.sum().backward()
    gradient = static.embedding.weight.grad
    assert torch.isfinite(gradient).all()
    assert gradient.abs().max() < 10
    assert gradient[1:].abs().max() > 0


def test_memory_is_told_where_a_platform_tells_it(monkeypatch):
    assert 0.05 < peak_memory() < 1000
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    assert peak_memory() == 0


def test_an_uneven_batch_and_a_batch_without_rewards_are_trained(command, capsys, tmp_path):
    odd = ("--alpha", 0.5, "--gamma", 0, "--batch-size", 7)
    found, _ = train(capsys, command, tmp_path / "odd", *ADAPTER, *odd)
    assert found["points"][-1]["step"] == 12
    # Fresh policies draw what is not labelled: without a judge most of these steps have no gradient.
    alone = ("--alpha", 1, "--gamma", 0, "--batch-size", 1, "--precision", "fp16")
    whole = ("--tune", "full", "--learning-rate", 1e-3)
    found, _ = train(capsys, command, tmp_path / "alone", *whole, *alone)
    assert found["points"][-1]["step"] == 12


def test_recall_of_needs_labels_and_a_known_name(command, world, index_folder, capsys, tmp_path):
    unlabelled = ["train", "--data", world, "--index", index_folder, "--objective", "supervised", *SHORT]
    for begins, recall_of, said in (
        (command, "clicks", "--recall-of clicks"),
        (unlabelled, "known", "it needs --labels"),
    ):
        code, _, err = run(capsys, *begins, "--recall-of", recall_of, "--out", tmp_path / "model")
        assert code == 2
        assert said in err
    assert not (tmp_path / "model").exists()


def test_the_recall_of_what_is_known_takes_the_labels_of_a_run(
    command, labels, index_folder, capsys, tmp_path
):
    points = {}
    for recall_of in ("feedback", "known"):
        found, _ = train(capsys, command, tmp_path / recall_of, *ADAPTER, "--recall-of", recall_of)
        points[recall_of] = found["points"]
    # What is beyond the deployed top 3 and judged relevant is missed by the deployed lists.
    assert points["known"][0]["base_recall"] < points["feedback"][0]["base_recall"]
    same = [[p["relevant_novel"] for p in points[name]] for name in points]
    assert same[0] == same[1]  # the training itself is the same


def test_early_stop_needs_a_broken_budget_and_a_falling_recall():
    fine, low, lower, lowest = (point(n, 1, r) for n, r in enumerate((0.5, 0.4, 0.3, 0.2)))
    assert left_for_good([fine, low, lower, lowest], 0.01, 3)
    assert not left_for_good([low, lower], 0.01, 3)
    assert not left_for_good([fine, lowest, lower, low], 0.01, 3)  # recovering
    assert not left_for_good([low, fine, lower], 0.01, 3)
    assert not left_for_good([low, lower, lowest], 0.01, 0)
    assert left_for_good([fine, low, lower], 0.01, 1)
    assert not left_for_good([lowest, lower], 0.01, 1)  # recovering
    assert not left_for_good([low, low, low], 0.01, 2)  # no worse


def test_a_run_that_ruins_recall_stops_early_and_says_so(command, capsys, tmp_path, monkeypatch):
    real, calls = measure, []

    def falls(*args):
        (figures,) = real(*args)
        figures[:, 3] = figures[:, 4] - 0.01 * len(calls)
        calls.append(1)
        return [figures]

    monkeypatch.setattr("novelret.train.points.measure", falls)
    budget = ("--max-recall-drop", 0, "--patience", 2, "--eval-every", 1, "--steps", 30)
    found, err = train(capsys, command, tmp_path / "model", *ADAPTER, *budget)
    assert [p["step"] for p in found["points"] if p["share"] == 1] == [0, 1, 2]
    assert "stopped at step 2: recall left the budget 2 validations ago" in err
    assert json.loads((tmp_path / "model" / "manifest.json").read_text())["facts"]["steps"] == 2
    assert found["chosen"]["step"] == 0


def test_what_a_checkpoint_or_an_export_was_trained_on_is_known(
    command, world, index_folder, encoder, capsys, tmp_path
):
    train(capsys, command, tmp_path / "model", *ADAPTER, "--keep", 1)
    (kept,) = (tmp_path / "model" / "checkpoints").iterdir()
    export = ["export", "--model", kept, "--format", "st", "--out", tmp_path / "served"]
    assert run(capsys, *export)[0] == 0
    # However they are written.
    shouted = shutil.copytree(world, tmp_path / "shouted")
    queries = [json.loads(line) for line in (world / "queries.jsonl").read_text().splitlines()]
    write_jsonl(shouted / "queries.jsonl", [row | {"text": f" {row['text'].upper()}  "} for row in queries])
    for data in (world, shouted):
        evaluate = ["eval", "--data", data, "--index", index_folder, "--split", "train", "--base-depth", 3, "--k", 3,
                    "--model", f"kept={kept}", "--model", f"served={tmp_path / 'served'}"]  # fmt: skip
        code, _, err = run(capsys, *evaluate, "--out", tmp_path / f"report-{data.name}")
        assert code == 0, err
        for name in ("kept", "served"):
            assert f"{name} was trained on all of these" in err
    # What its start was trained on is known of an encoder, too, and who judged that.
    second = ["train", "--data", world, "--index", index_folder, "--split", "test", "--init", tmp_path / "model",
              "--objective", "supervised", "--tune", "adapter", "--steps", 2, "--base-depth", 3, "--depth", 12,
              "--validation-fraction", 0, "--device", "cpu", "--out", tmp_path / "second"]  # fmt: skip
    assert run(capsys, *second)[0] == 0
    facts = [json.loads((tmp_path / of / "manifest.json").read_text())["facts"] for of in ("model", "second")]
    assert facts[0]["judges"] == facts[1]["judges"] != []
    for split in ("train", "test"):
        words = ["eval", "--data", world, "--index", index_folder, "--split", split, "--base-depth", 3, "--k", 3,
                 "--model", f"second={tmp_path / 'second'}", "--out", tmp_path / f"of-{split}"]  # fmt: skip
        code, _, err = run(capsys, *words)
        assert (code, "second was trained on all of these" in err) == (0, True), err
    other = [
        "index",
        "--data",
        world,
        "--model",
        make_encoder(tmp_path / "other", seed=9),
        "--out",
        tmp_path / "ix",
    ]
    assert run(capsys, *other)[0] == 0
    for path in (kept, tmp_path / "served"):
        words = ["eval", "--data", world, "--index", tmp_path / "ix", "--model", f"m={path}", "--k", 3,
                 "--base-depth", 3, "--out", tmp_path / "r"]  # fmt: skip
        code, _, err = run(capsys, *words)
        assert (code, "was trained for another index" in err) == (2, True), err


def test_kept_checkpoints_load_and_the_frontier_lists_all(command, world, index_folder, capsys, tmp_path):
    found, _ = train(capsys, command, tmp_path / "model", *ADAPTER, "--keep", 2)
    points = [Point(**p) for p in found["points"]]
    best = best_first(points, 1.0)
    folders = {path.name for path in (tmp_path / "model" / "checkpoints").iterdir()}
    assert folders == {p.name for p in best[:2]}
    rows = pq.read_table(tmp_path / "model" / "frontier.parquet").to_pylist()
    assert [(row["step"], row["share"]) for row in rows] == [
        *((step, 1.0) for step in (0, 4, 8, 12)), *((12, part / 10) for part in range(1, 10)),
    ]  # fmt: skip
    assert [Point(**{name: row[name] for name in vars(best[0])}) for row in rows if row["chosen"]] == best[:1]
    assert [row["pareto"] for row in rows] == pareto(points)
    same, second = (SentenceTransformer(str(tmp_path / "model" / "checkpoints" / p.name)) for p in best[:2])
    chosen = SentenceTransformer(str(tmp_path / "model"))
    query = ["buy red sofa"]
    assert np.allclose(same.encode(query), chosen.encode(query), atol=1e-6)
    assert not np.allclose(second.encode(query), chosen.encode(query), atol=1e-6)
    assert (tmp_path / "model" / "curves.svg").read_text().startswith("<svg")


def test_blends_lie_on_the_line_from_the_start_to_the_end(command, capsys, tmp_path):
    train(capsys, command, tmp_path / "model", *ADAPTER, "--keep", 20, "--blends", 4)
    folders = tmp_path / "model" / "checkpoints"

    def matrix(name):
        (path,) = [path for path in (folders / name).glob("*_Dense/model.safetensors")]
        (found,) = load_file(path).values()
        return found

    assert {path.name for path in folders.iterdir()} == {
        *(f"step-{step}" for step in (0, 4, 8, 12)), *(f"step-12-share-{s}" for s in (0.25, 0.5, 0.75)),
    }  # fmt: skip
    assert matrix("step-0").abs().max() == 0
    for share in (0.25, 0.5, 0.75):
        assert np.allclose(matrix(f"step-12-share-{share}"), share * matrix("step-12"), atol=1e-7)


def test_few_held_back_queries_are_said_to_measure_recall_badly(command, capsys, tmp_path):
    _, err = train(capsys, command, tmp_path / "model", *ADAPTER, "--max-recall-drop", 0.001)
    assert "4 held-back queries measure the change of recall to ±" in err


# Several deployed models


@pytest.fixture(scope="module")
def second_index(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("second")
    other = make_encoder(folder / "other", dimension=24, seed=9)
    assert (
        main(["index", "--data", str(world), "--model", str(other), "--out", str(folder / "index"), "-q"])
        == 0
    )
    return folder / "index"


def test_top_lists_of_several_models_are_pooled(command, world, index_folder, second_index, capsys, tmp_path):
    from novelret.data.split import load_split

    indexes = [open_index(index_folder), open_index(second_index)]
    split = load_split(str(world), "train", indexes[0].catalog)
    pool = pooled_lists(indexes, split, 3)
    for q in range(len(split)):
        expected = set()
        for index in indexes:
            embeddings = index.query_encoder().encode_query([split.query_texts[q]])
            expected |= set(index.search(embeddings, 3, split.excluded.take([q]))[0][0].tolist())
        held = pool[q][pool[q] >= 0].tolist()
        assert set(held) == expected
        assert len(held) == len(expected)
    assert (pool < 0).any()  # some lists overlap
    both, _ = train(capsys, command, tmp_path / "both", *ADAPTER, "--index", second_index)
    alone, _ = train(capsys, command, tmp_path / "alone", *ADAPTER)
    config = json.loads((tmp_path / "both" / "manifest.json").read_text())
    assert "index 2" in config["inputs"]
    # At the start the list is the first model's own: nothing in it is new to the pool.
    assert both["points"][0]["novelty"] == alone["points"][0]["novelty"] == 0
    # eval pools the same way: what either model returns is not novel.
    report = tmp_path / "report"
    evaluate = ["eval", "--data", world, "--index", index_folder, "--index", second_index, "--split", "train",
                "--model", f"new={tmp_path / 'both'}", "--judge", f"file:{world}/judgements.tsv",
                "--missing", "irrelevant", "--base-depth", 3, "--k", 3, "--out", report]  # fmt: skip
    code, _, err = run(capsys, *evaluate)
    assert code == 0, err
    assert f"new was trained on all of these {len(split)} queries" in " ".join(err.split())
    means = json.loads((report / "metrics.json").read_text())["models"]
    embeddings = SentenceTransformer(str(tmp_path / "both"), device="cpu").encode_query(split.query_texts)
    lists = indexes[0].search(embeddings, 3, split.excluded)[0]
    brute = np.mean([len(set(lists[q].tolist()) - set(pool[q].tolist())) for q in range(len(split))])
    assert means["new"]["Novelty@3"] == pytest.approx(brute)
    assert means["base"]["Novelty@3"] == 0
    again, _ = train(capsys, ["train"], tmp_path / "again", "--config", tmp_path / "both" / "config.yaml")
    assert again["points"] == both["points"]
    # Its matrices begin at the deployed model that was finetuned against.
    untold = ("--validation-fraction", 0)
    train(capsys, command, tmp_path / "start", *ADAPTER, *untold)
    onwards = (*ADAPTER, *untold, "--index", second_index, "--init", tmp_path / "start")
    train(capsys, command, tmp_path / "more", *onwards)
    matrix = ("--format", "npz", "--out", tmp_path / "w.npz")
    code, _, err = run(capsys, "export", "--model", tmp_path / "more", *matrix)
    assert code == 0, err
    assert f"{index_folder}, {second_index}" in (tmp_path / "more" / "README.md").read_text()


def test_indexes_of_different_catalogs_are_not_pooled(command, world, encoder, capsys, tmp_path):
    from tests.conftest import make_world, write_jsonl

    other = make_world(tmp_path / "other")
    write_jsonl(other / "corpus.jsonl", [{"_id": f"i{n:02d}", "text": f"thing {n}"} for n in range(40)])
    assert (
        run(capsys, "index", "--data", other, "--model", encoder, "--out", tmp_path / "index", "-q")[0] == 0
    )
    code, _, err = run(capsys, *command, "--index", tmp_path / "index", "--out", tmp_path / "model")
    assert code == 2
    assert "its corpus is not the one" in err


def test_pooled_indexes_may_hold_the_items_in_another_order(world, encoder, index_folder, tmp_path):
    from novelret.data.split import load_split

    first = open_index(index_folder)
    order = np.random.default_rng(1).permutation(len(first))
    np.save(tmp_path / "items.npy", np.asarray(first.embeddings)[order])
    (tmp_path / "ids.txt").write_text("\n".join(first.catalog.ids_at(order)) + "\n")
    imported = ["index", "--data", world, "--embeddings", tmp_path / "items.npy", "--ids", tmp_path / "ids.txt",
                "--model", encoder, "--out", tmp_path / "shuffled", "-q"]  # fmt: skip
    assert main([str(part) for part in imported]) == 0
    second = open_index(tmp_path / "shuffled")
    assert second.catalog.ids_at([0]) != first.catalog.ids_at([0])
    # Queries that are items themselves, so that what is left out of a list has to be translated too.
    split = load_split(str(world), "train", first.catalog)
    pairs = split.feedback_queries, split.feedback_items
    split = make_split(
        "train", split.query_ids, split.query_texts, *pairs, from_padded(np.arange(len(split))[:, None])
    )
    pool = pooled_lists([first, second], split, 3)
    assert np.array_equal(pool[:, :3], base_lists(first, split, 3)[0])
    assert (pool[:, 3:] == -1).all()  # the same encoder: nothing of the second list is new


# A judge during training


def test_a_file_judge_rewards_policy_states(command, world, capsys, tmp_path):
    mixed = (*ADAPTER, "--alpha", 0.5, "--gamma", 0.5, "--log-every", 1)
    train(capsys, command, tmp_path / "without", *mixed)
    train(
        capsys,
        command,
        tmp_path / "with",
        *mixed,
        "--judge",
        f"file:{world}/judgements.tsv",
        "--missing",
        "irrelevant",
    )
    assert any(line["unknown/policy"] > 0 for line in log_of(tmp_path / "without"))
    assert all(line["unknown/policy"] == 0 for line in log_of(tmp_path / "with"))


def test_labels_of_another_split_are_told_as_such(command, capsys, tmp_path):
    code, _, err = run(capsys, *command, *ADAPTER, "--split", "test", "--out", tmp_path / "model")
    assert code == 2
    assert "queries of split test; were they made for another --split or --data?" in " ".join(err.split())


def test_without_a_relevant_label_a_judge_needs_a_draw_of_something_else(command, capsys, tmp_path, world):
    at = command.index("--labels")
    bare = [*command[:at], *command[at + 2 :], *ADAPTER, "--gamma", 0.25, "--judge",
            f"file:{world}/judgements.tsv", "--missing", "irrelevant"]  # fmt: skip
    code, _, err = run(capsys, *bare, "--alpha", 0.25, "--out", tmp_path / "model")
    assert code == 2
    assert "no labelled item beyond rank 3 is relevant" in " ".join(err.split())
    assert "or draw no labelled states (--draw plain, or --alpha and --gamma that add up to 1)" in " ".join(
        err.split()
    )
    assert not list(tmp_path.glob("model*"))
    for name, ways in {"plain": ("--alpha", 0.25, "--draw", "plain"), "policy": ("--alpha", 0.75)}.items():
        train(capsys, bare, tmp_path / name, *ways)


@pytest.fixture
def asking(command, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-of-the-trainer")
    monkeypatch.setenv("NOVELRET_STORE", str(tmp_path / "store.sqlite"))
    return [*command, *ADAPTER, "--alpha", 0.5, "--gamma", 0.25, "--log-every", 1,
            "--judge", "openai:tiny", "--prompt", "query-keyword"]  # fmt: skip


def test_an_llm_is_asked_once_per_pair_and_within_the_cap(asking, labels, capsys, tmp_path, monkeypatch):
    with LoopbackJudge() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        found, _ = train(capsys, asking, tmp_path / "model")
        assert all(line["unknown/policy"] == 0 for line in log_of(tmp_path / "model"))
        asked = sum(server.billed.values())
        assert asked == len(server.billed) > 10
        rows = pq.read_table(tmp_path / "model" / "judgements.parquet").to_pylist()
        assert len({(row["query_id"], row["item_id"]) for row in rows}) == asked
        known = {
            (r["query_id"], r["item_id"]) for r in pq.read_table(labels / "judgements.parquet").to_pylist()
        }
        assert not known & {(row["query_id"], row["item_id"]) for row in rows}  # labelled ones are not asked
        spent = json.loads((tmp_path / "model" / "manifest.json").read_text())["facts"]["asked"]
        assert spent["requests"] == asked
        # The same run again costs nothing and gives the same.
        again, _ = train(capsys, asking, tmp_path / "again")
        assert sum(server.billed.values()) == asked
        assert again["points"] == found["points"]
        monkeypatch.setenv("NOVELRET_STORE", str(tmp_path / "new.sqlite"))
        _, err = train(capsys, asking, tmp_path / "capped", "--max-requests", 7)
        assert sum(server.billed.values()) == asked + 7
        assert "--max-requests or --max-cost is reached" in err
        # A dollar buys ten thousand of the loopback judge's questions of about fifty tokens at this price.
        monkeypatch.setenv("NOVELRET_STORE", str(tmp_path / "newer.sqlite"))
        before = sum(server.billed.values())
        costs = ("--max-cost", 0.002, "--price", "1,2")
        _, err = train(capsys, asking, tmp_path / "cost", *costs)
        assert 0 < sum(server.billed.values()) - before < asked
        assert "--max-requests or --max-cost is reached" in err
        spent = json.loads((tmp_path / "cost" / "manifest.json").read_text())["facts"]["asked"]
        assert 0 < spent["cost"] <= 0.002
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert b"sk-secret-of-the-trainer" not in path.read_bytes()


def test_judging_needs_policy_states_and_a_key(command, capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for more, message in [
        ((), "--judge asks about items drawn from the policy"),
        ((*MIXED, "--objective", "swap", "--list-size", 5), "--judge asks about items drawn from the policy"),
        (("--alpha", 0.003), "--alpha 0.003: not one of --batch-size 16 states is drawn from the policy"),
        (MIXED, "OPENAI_API_KEY is not set"),
    ]:
        if message.startswith("--"):
            monkeypatch.setenv("OPENAI_API_KEY", "k")
        else:
            monkeypatch.delenv("OPENAI_API_KEY")
        code, _, err = run(capsys, *command, *more, "--judge", "openai:tiny", "--out", tmp_path / "model")
        assert (code, message in err) == (2, True), err


def test_a_judge_that_never_answers_stops_the_run_and_one_that_does_goes_on(
    asking, capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr(openai_judge, "_ATTEMPTS", 2)
    monkeypatch.setattr(openai_judge, "_FIRST_WAIT", 0.01)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    code, _, err = run(capsys, *asking, "--out", tmp_path / "model", "--quiet")
    assert code == 2
    assert "questions got no answer" in err
    assert "goes on from the last validation" in err
    assert (tmp_path / "model.partial" / "resume" / "state.json").is_file()
    assert not any(thread.name.startswith("judging") for thread in threading.enumerate())
    with LoopbackJudge() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        train(capsys, asking, tmp_path / "model")
        assert server.billed


def test_a_judge_that_nobody_can_read_is_asked_no_more(asking, capsys, tmp_path, monkeypatch):
    """No step asks as many questions as it takes to tell; all together do."""
    with LoopbackJudge(always="refusal") as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        monkeypatch.setattr(questions, "_FIRST", 12)
        _, err = train(capsys, asking, tmp_path / "model")
        assert "no more questions are asked, none of the first 12 answers is usable" in " ".join(err.split())
        most = max(Counter(line["step"] for line in log_of(tmp_path / "model")).values()) * 16
        assert 12 <= len(server.seen) <= 12 + 2 * most


def test_a_run_that_gave_up_on_its_judge_asks_no_more_after_a_kill(asking, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(questions, "_FIRST", 12)
    given_up = "no more questions are asked, none of the first 12 answers is usable"
    with LoopbackJudge(always="refusal") as server, monkeypatch.context() as patch:
        patch.setenv("OPENAI_BASE_URL", server.url)
        break_off_at(9, patch)
        code, _, err = run(capsys, *asking, "--out", tmp_path / "broken")
        assert (code, given_up in " ".join(err.split())) == (130, True)
        asked = len(server.seen)
    with LoopbackJudge() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        _, err = train(capsys, asking, tmp_path / "broken")
        assert server.seen == []
    assert " ".join(err.split()).count(given_up) == 1
    facts = json.loads((tmp_path / "broken" / "manifest.json").read_text())["facts"]
    assert facts["asked"]["requests"] == asked >= 12


def test_each_reason_to_stop_asking_is_said_and_again_by_a_run_that_goes_on(
    asking, capsys, tmp_path, monkeypatch
):
    passing = "not all was asked, the endpoint asks to wait 60 minutes; the next steps try again"
    capped = "no more questions are asked, --max-requests or --max-cost is reached"
    with LoopbackJudge(["429-for-an-hour"]) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        with monkeypatch.context() as patch:
            break_off_at(9, patch)
            code, _, err = run(capsys, *asking, "--max-requests", 20, "--out", tmp_path / "model")
        said = " ".join(err.split())
        assert (code, said.count(passing), said.count(capped)) == (130, 1, 1), err
        _, err = train(capsys, asking, tmp_path / "model", "--max-requests", 20)
        assert " ".join(err.split()).count(capped) == 1
        assert sum(server.billed.values()) == 20


def test_a_step_that_is_asked_ahead_ends_with_the_run(asking, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(openai_judge, "_ATTEMPTS", 1_000_000)

    def press(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.Judging, "answers", press)
    with LoopbackJudge(["429"] * 1_000_000) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        code, _, err = run(capsys, *asking, "--out", tmp_path / "model", "--quiet")
        assert code == 130, err
        sent = len(server.seen)
        time.sleep(0.3)
        assert len(server.seen) == sent
    assert not any(thread.name.startswith("judging") for thread in threading.enumerate())


def test_other_prompts_are_warned_of(world, index_folder, tmp_path, capsys, monkeypatch):
    with LoopbackJudge() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
        asked = ["label", "--data", world, "--index", index_folder, "--judge", "openai:tiny", "--prompt",
                 "query-keyword", "--base-depth", 3, "--depth", 12, "--answer", "word", "--quiet",
                 "--out", tmp_path / "asked", "--store", tmp_path / "s.sqlite"]  # fmt: skip
        assert run(capsys, *asked)[0] == 0
    config = TrainConfig(str(world), str(index_folder), labels=str(tmp_path / "asked"), judge="openai:tiny")
    said = []
    report = types.SimpleNamespace(warn=said.append)
    same = dataclasses.replace(config, prompt="query-keyword")
    assert judging._as_labelled(same, report) == {"answer": "word", "threshold": None}
    assert judging._as_labelled(dataclasses.replace(same, answer="grade"), report) == {}
    assert said == []
    assert judging._as_labelled(config, report) == {}
    assert "give --prompt query-keyword to ask alike" in said[0]


def test_a_judgement_file_means_in_training_what_it_meant_for_the_labels(labels, world, index_folder):
    said = []
    report = types.SimpleNamespace(warn=said.append)
    judge = f"file:{world}/judgements.tsv"
    config = TrainConfig(str(world), str(index_folder), labels=str(labels), judge=judge, prompt="json")
    assert judging._as_labelled(config, report)["missing"] == "irrelevant"
    assert said == []  # a file is not prompted


def test_a_window_beyond_the_labels_and_support_without_draws(command, capsys, tmp_path):
    more = ["--window", "1,9", "--steps", 1, "--out", tmp_path / "model"]
    _, _, err = run(capsys, *command, *ADAPTER, *more)
    assert "ends at rank 27, beyond --depth 12; the negatives are ranks 4 to 12" in " ".join(err.split())
    code, _, err = run(capsys, *command, *ADAPTER, "--support", 4, "--out", tmp_path / "none")
    assert code == 2
    assert "--support narrows the draw of policy states" in err


# Kills


def test_killed_and_resumed_is_as_undisturbed(asking, capsys, tmp_path, monkeypatch):
    """SIGKILL at random moments, asking an LLM all the while: same log, same weights, nothing asked twice."""
    with LoopbackJudge(delay=0.005) as server:
        environment = {"OPENAI_BASE_URL": server.url, "OMP_NUM_THREADS": "1"} | {
            name: os.environ[name] for name in ("OPENAI_API_KEY", "NOVELRET_STORE")
        }
        more = ["--steps", "60", "--eval-every", "6", "--keep", "1"]
        words = [*map(str, [*asking, *more]), "--quiet", "--out", str(tmp_path / "killed")]
        kills, rng, said = 0, random.Random(1), tmp_path / "said"
        while not (tmp_path / "killed").exists():
            process = start(words, environment, said, {})
            log = tmp_path / "killed.partial" / "log.jsonl"
            before = log.stat().st_size if log.exists() else 0
            began = time.monotonic()
            while process.is_alive() and time.monotonic() - began < 120:
                time.sleep(0.02)
                if kills < 4 and log.exists() and log.stat().st_size > before + 700:
                    time.sleep(rng.random() * 0.5)
                    process.kill()
                    kills += 1
                    break
            process.join()
            assert process.exitcode in (0, -signal.SIGKILL), said.read_text()
        assert kills == 4
        assert max(server.billed.values()) <= 2  # an answer under way at a kill was never delivered
        monkeypatch.setenv("NOVELRET_STORE", str(tmp_path / "other.sqlite"))
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        train(capsys, [*asking, *more], tmp_path / "whole")
    timing = ("step_time", "memory_gb", "judgements")
    logs = [
        [
            {name: value for name, value in line.items() if name not in timing}
            for line in log_of(tmp_path / name)
        ]
        for name in ("killed", "whole")
    ]
    assert logs[0] == logs[1]
    killed, whole = weights_of(tmp_path / "killed"), weights_of(tmp_path / "whole")
    assert killed.keys() == whole.keys()
    assert all(torch.equal(killed[name], whole[name]) for name in whole)


def test_what_a_judgement_file_taught_survives_a_kill(command, world, capsys, tmp_path, monkeypatch):
    # Eq. 6 draws what is judged irrelevant, which policy draws keep adding to.
    asking = [*command, *ADAPTER, *MIXED, "--reward", "eq6", "--negative-share", 0.5, "--judge",
              f"file:{world}/judgements.tsv", "--missing", "irrelevant"]  # fmt: skip
    few = tmp_path / "few"
    labels = ["label", "--data", world, "--index", command[4], "--judge", f"file:{world}/judgements.tsv",
              "--missing", "irrelevant", "--base-depth", 3, "--depth", 5, "--out", few, "--quiet"]  # fmt: skip
    assert run(capsys, *labels)[0] == 0
    asking[asking.index("--labels") + 1] = few
    train(capsys, asking, tmp_path / "whole")
    break_off_at(9, monkeypatch)
    code, _, _ = run(capsys, *asking, "--out", tmp_path / "broken")
    assert code != 0
    monkeypatch.undo()
    train(capsys, asking, tmp_path / "broken")
    broken, whole = weights_of(tmp_path / "broken"), weights_of(tmp_path / "whole")
    assert all(torch.equal(broken[name], whole[name]) for name in whole)
    assert [line["loss"] for line in log_of(tmp_path / "broken")] == [
        line["loss"] for line in log_of(tmp_path / "whole")
    ]


def test_a_run_does_not_go_on_with_other_judgements_nor_another_reward(
    command, world, capsys, tmp_path, monkeypatch
):
    judgements, reward = tmp_path / "judgements.tsv", tmp_path / "my_reward.py"
    shutil.copy(world / "judgements.tsv", judgements)
    reward.write_text("def mine(verdicts, grades, in_base):\n    return 2.0 * (verdicts == 1)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    asking = [*command, *ADAPTER, *MIXED, "--judge", f"file:{judgements}", "--missing", "irrelevant",
              "--reward", "my_reward:mine", "--out", tmp_path / "model"]  # fmt: skip
    with monkeypatch.context() as patch:
        break_off_at(9, patch)
        assert run(capsys, *asking)[0] == 130
    for path, named in ((judgements, "judgements"), (reward, "reward file")):
        before = path.read_text()
        path.write_text(before + "\n")
        code, _, err = run(capsys, *asking)
        assert (code, f"an unfinished run with other settings ({named} '" in " ".join(err.split())) == (
            2,
            True,
        )
        path.write_text(before)
    assert run(capsys, *asking)[0] == 0
    inputs = json.loads((tmp_path / "model" / "manifest.json").read_text())["inputs"]
    assert (inputs["judgements"], inputs["reward file"]) == tuple(map(fingerprint_file, (judgements, reward)))
    sys.modules.pop("my_reward")


def test_a_run_does_not_go_on_with_another_prompt_under_the_same_name(asking, capsys, tmp_path, monkeypatch):
    prompt = tmp_path / "prompt.yaml"
    prompt.write_text('user: of "{query}" and "{item}"\n')
    asking = [*asking, "--prompt", prompt, "--out", tmp_path / "model"]
    with LoopbackJudge() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        break_off_at(9, monkeypatch)
        assert run(capsys, *asking)[0] == 130
        prompt.write_text('user: is "{item}" for "{query}"\n')
        code, _, err = run(capsys, *asking)
    assert (code, "an unfinished run with other settings (prompt file '" in " ".join(err.split())) == (
        2,
        True,
    )


def test_a_log_line_that_a_kill_cut_short_is_dropped(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 0, "loss": 2.0}\n{"step": 5, "loss": 1.0}\n{"step": 6, "lo')
    with Log(tmp_path, 6, None, {}) as log:
        log({"step": 6, "loss": 0.5})
    assert [line["step"] for line in read_log(tmp_path)] == [0, 5, 6]


def test_a_loss_that_is_no_number_stops_with_its_step(command, capsys, tmp_path, monkeypatch):
    real = loop.batch_loss

    def breaks(embeddings, here, batch, material, config, items, step):
        found = real(embeddings, here, batch, material, config, items, step)
        return found if step < 9 else loop.StepLoss(found.loss * torch.nan, 0, 0)

    monkeypatch.setattr(loop, "batch_loss", breaks)
    # What was validated before is as good as it was.
    found, err = train(capsys, command, tmp_path / "model", *ADAPTER, "--no-refit")
    assert "step 9: the loss is nan; training stops there, the steps up to 8 are chosen from" in " ".join(
        err.split()
    )
    whole = [point for point in found["points"] if point["share"] == 1]
    assert [point["step"] for point in whole] == list(range(0, 9, whole[1]["step"]))
    assert len(found["points"]) > len(whole)  # blends with the last of them
    assert all(torch.isfinite(tensor).all() for tensor in weights_of(tmp_path / "model").values())
    # Where nothing was, there is nothing to choose from.
    code, out, err = run(capsys, *command, *ADAPTER, "--validation-fraction", 0, "--out", tmp_path / "unseen")
    assert (code, out) == (2, "")
    assert "step 9: the loss is nan, and nothing was validated before. Lower --learning-rate" in " ".join(
        err.split()
    )
    assert not (tmp_path / "unseen").exists()


def test_a_gradient_that_is_no_number_stops_before_it_spoils_the_weights(
    command, capsys, tmp_path, monkeypatch
):
    real = loop.batch_loss

    def breaks(embeddings, here, batch, material, config, items, step):
        found = real(embeddings, here, batch, material, config, items, step)
        if step < 9:
            return found
        return dataclasses.replace(
            found, loss=found.loss + torch.sqrt(embeddings.sum() * 0)
        )  # 0, its slope is not

    monkeypatch.setattr(loop, "batch_loss", breaks)
    _, err = train(capsys, command, tmp_path / "model", *ADAPTER, "--no-refit")
    assert "step 9: the gradient is no number; training stops there" in " ".join(err.split())
    assert all(torch.isfinite(tensor).all() for tensor in weights_of(tmp_path / "model").values())


def test_embeddings_that_are_no_numbers_give_a_loss_that_is_none():
    score = torch.full((2,), torch.nan)
    there = torch.tensor([[True, True], [False, False]])
    losses = pg_ret.contrastive(score, torch.zeros(2, 2), there, torch.ones(2), 0.05)
    assert losses[0].isnan()
    assert losses[1] == 0


@pytest.mark.parametrize("where", ["write_manifest", "drop_resumables"])
def test_a_kill_while_the_model_is_finished_costs_nothing(where, command, capsys, tmp_path, monkeypatch):
    train(capsys, command, tmp_path / "whole", *ADAPTER)
    module = write if where == "write_manifest" else trainer

    def dies(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, where, dies)
    words = (*command, *ADAPTER, "--out", tmp_path / "broken")
    assert run(capsys, *words)[0] == 130
    monkeypatch.undo()
    monkeypatch.setattr(loop, "batch_loss", lambda *_: pytest.fail("every step was done"))
    code, _, err = run(capsys, *words)
    assert code == 0, err
    broken, whole = weights_of(tmp_path / "broken"), weights_of(tmp_path / "whole")
    assert broken.keys() == whole.keys()
    assert all(torch.equal(broken[name], whole[name]) for name in whole)
    assert not list((tmp_path / "broken").rglob("resume"))


def test_lines_between_validations_take_no_pass_over_the_catalog(command, capsys, tmp_path, monkeypatch):
    real, passes = ItemMatrix.entropy, []
    monkeypatch.setattr(ItemMatrix, "entropy", lambda *args: passes.append(1) or real(*args))
    train(capsys, command, tmp_path / "model", *ADAPTER, "--log-every", 1, "--no-refit")
    lines = log_of(tmp_path / "model")
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert [line["step"] for line in lines if "entropy" in line] == [1, 4, 8, 12]
    assert len(passes) == 4


def test_without_validation_a_run_resumes_too(command, capsys, tmp_path, monkeypatch):
    alone = (*ADAPTER, "--validation-fraction", 0)
    train(capsys, command, tmp_path / "whole", *alone)
    real = checkpoint.save

    def dies(*args):
        real(*args)
        if args[5] == 8:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", dies)
    assert run(capsys, *command, *alone, "--out", tmp_path / "model")[0] == 130
    monkeypatch.undo()
    code, _, err = run(capsys, *command, *alone, "--out", tmp_path / "model")
    assert (code, "going on at step 8" in err) == (0, True)
    one, two = weights_of(tmp_path / "whole"), weights_of(tmp_path / "model")
    assert all(torch.equal(one[name], two[name]) for name in one)


# Logs


def test_tensorboard_holds_the_log(command, capsys, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(capsys, command, tmp_path / "model", *ADAPTER, "--log-every", 4)
    events = EventAccumulator(str(tmp_path / "model" / "tensorboard"))
    events.Reload()
    lines = log_of(tmp_path / "model")
    assert [(e.step, pytest.approx(e.value)) for e in events.Scalars("loss")] == [
        (line["step"], line["loss"]) for line in lines
    ]
    assert [e.step for e in events.Scalars("held-back/recall")] == [4, 8, 12]


def test_weights_and_biases_gets_the_same_where_it_is_installed(command, capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    code, _, err = run(capsys, *command, *ADAPTER, "--wandb", "mine", "--out", tmp_path / "model")
    assert (code, "pip install wandb" in err) == (2, True)
    logged, finished = [], []
    started = types.SimpleNamespace(
        log=lambda numbers, step: logged.append((step, numbers)),
        finish=lambda exit_code: finished.append(exit_code),
    )
    fake = types.ModuleType("wandb")
    fake.init = lambda project, config: started
    monkeypatch.setitem(sys.modules, "wandb", fake)
    train(capsys, command, tmp_path / "model", *ADAPTER, "--wandb", "mine", "--log-every", 6)
    assert finished == [0]
    assert [step for step, numbers in logged if "loss" in numbers] == [
        line["step"] for line in log_of(tmp_path / "model")
    ]


def test_hardly_any_label_on_what_is_drawn_is_said(world, index_folder, capsys, tmp_path):
    few = tmp_path / "few.tsv"
    few.write_text("query-id\tcorpus-id\tscore\n" + "".join(f"q00\ti{n:02d}\t1\n" for n in range(40)))
    label = ["label", "--data", world, "--index", index_folder, "--judge", f"file:{few}", "--from", "random",
             "--per-query", 30, "--base-depth", 3, "--depth", 12, "--out", tmp_path / "labels", "--quiet"]  # fmt: skip
    assert run(capsys, *label)[0] == 0
    command = [
        "train",
        "--data",
        world,
        "--index",
        index_folder,
        "--labels",
        tmp_path / "labels",
        *SHORT,
        *ADAPTER,
    ]
    _, err = train(capsys, command, tmp_path / "model", "--draw", "plain", "--validation-fraction", 0)
    assert "of the sampled states have a label" in err
    figure = float(err.split("only ")[1].split("%")[0])
    assert 0 <= figure < 1


def covered(folder):
    lines = [line for line in log_of(folder) if "covered" in line]
    assert [line["step"] for line in lines] == [1, 4, 8, 12]
    return np.array([line["covered"] for line in lines])


def test_draws_among_the_top_items_say_what_they_cover(command, capsys, tmp_path):
    train(capsys, command, tmp_path / "all", *ADAPTER, *MIXED, "--support", 40, "--log-every", 4)
    assert covered(tmp_path / "all") == pytest.approx(1, abs=1e-3)
    train(capsys, command, tmp_path / "few", *ADAPTER, *MIXED, "--support", 2, "--log-every", 4)
    assert (covered(tmp_path / "few") > 0).all()
    assert (covered(tmp_path / "few") < 0.999).all()


def test_the_panel_shows_how_it_learns():
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    console = Console(file=terminal, force_terminal=True, width=160)
    config = TrainConfig("d", "i", steps=10)
    with training_panel(config, config.steps, Reporter(console=console)) as panel:
        panel.advance(3)
        panel.show_line({"step": 3, "loss": 1.25, "reward": 0.5, "rewarded/base": 0.75})
        panel.show_points([point(0, 0, 0.5), point(2, 1.5, 0.499)])
    shown = console.file.getvalue()
    for text in ("3/10", "loss 1.25", "reward 0.5", "rewarded base 75%", "relevant novel 1.500",
                 "recall 0.4990, budget 0.4950 kept", "best so far: step 2"):  # fmt: skip
        assert text in shown
