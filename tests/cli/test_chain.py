"""The four verbs as a user types them, on a tiny world: index, label, train, eval, search."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from safetensors import SafetensorError
from sentence_transformers import SentenceTransformer

from novelret.cli import main
from novelret.index import open_index
from novelret.label.prompts import MAX_TEXT
from tests.commands import fails, result, run
from tests.conftest import make_encoder, make_world, write_jsonl

TRAIN = ("--tune", "adapter", "--base-depth", 3, "--depth", 12, "--steps", 20, "--batch-size", 16,
         "--learning-rate", 0.02, "--max-recall-drop", 1)  # fmt: skip


@pytest.fixture(scope="module")
def chain(world, encoder, tmp_path_factory):
    """index → label → train (two objectives) → eval, once for the module."""
    out = tmp_path_factory.mktemp("chain")
    judge = f"file:{world / 'judgements.tsv'}"
    data = ["--data", str(world)]
    index = ["--index", str(out / "index")]
    commands = [
        ["index", *data, "--model", str(encoder), "--out", str(out / "index"), "--device", "cpu"],
        ["label", *data, *index, "--judge", judge, "--missing", "irrelevant", "--base-depth", "3", "--depth", "12",
         "--out", str(out / "labels")],
        *(
            ["train", *data, *index, "--labels", str(out / "labels"), "--objective", objective,
             "--out", str(out / objective), "--validation-fraction", "0.2", *map(str, TRAIN)]
            for objective in ("supervised", "supervised-judged", "pg-ret")
        ),
        ["eval", *data, *index, "--model", f"new={out / 'pg-ret'}", "--model", f"old={out / 'supervised'}",
         "--judge", judge, "--missing", "irrelevant", "--base-depth", "3", "--k", "2,5", "--out", str(out / "report")],
    ]  # fmt: skip
    before = None
    for command in commands:
        assert main([*command, "--quiet"]) == 0
        if command[0] == "index":
            before = (out / "index" / "embeddings.npy").read_bytes()
    # 1. The item side is frozen: bit-identical after every later stage.
    assert (out / "index" / "embeddings.npy").read_bytes() == before
    return out


def test_labels_hold_the_novel_ranks_and_the_judges_word(chain, world):
    rows = pq.read_table(chain / "labels" / "judgements.parquet").to_pylist()
    truth = {tuple(line.split("\t")[:2]) for line in (world / "judgements.tsv").read_text().splitlines()[1:]}
    assert len(rows) == 20 * 9
    assert all(row["verdict"] == ((row["query_id"], row["item_id"]) in truth) for row in rows)


def test_model_loads_alone_and_works_against_the_index(chain):
    model = SentenceTransformer(str(chain / "pg-ret"), device="cpu")
    index = open_index(chain / "index")
    embeddings = model.encode(["buy red sofa"])
    assert embeddings.shape == (1, index.dimension)
    assert np.isclose(np.linalg.norm(embeddings), 1, atol=1e-5)
    base = index.query_encoder().encode(["buy red sofa"])
    assert not np.allclose(base, embeddings)


def test_metrics_have_the_promised_shape(chain):
    metrics = json.loads((chain / "report" / "metrics.json").read_text())
    assert (metrics["k"], metrics["base_depth"], metrics["queries"]) == ([2, 5], 3, 20)
    assert set(metrics["models"]) == {"base", "new", "old"}
    base = metrics["models"]["base"]
    assert base["Novelty@2"] == 0
    assert base["Novelty@5"] == 2  # ranks 4 and 5 lie beyond L = 3
    assert {"Recall@5", "Precision@2", "Judged@2", "RelevantNovel@5"} <= set(base)
    html = (chain / "report" / "report.html").read_text()
    assert "<svg" in html
    assert "http://" not in html.replace("http://www.w3.org/2000/svg", "")  # a name, never fetched
    assert "https://" not in html
    rows = pq.read_table(chain / "report" / "per_query.parquet")
    assert rows.num_rows == 3 * 20
    run_file = (chain / "report" / "runs" / "new.trec").read_text().splitlines()
    assert len(run_file) == 20 * 5
    assert run_file[0].split()[1] == "Q0"


def test_a_written_run_reads_back_to_the_same_figures(chain, world, capsys, tmp_path):
    judge = f"file:{world / 'judgements.tsv'}"
    metrics = result(
        capsys, "eval", "--data", world, "--index", chain / "index", "--judge", judge, "--missing", "irrelevant",
        "--run", f"again={chain / 'report' / 'runs' / 'new.trec'}", "--base-depth", 3, "--k", "2,5",
        "--out", tmp_path / "report",
    )["models"]  # fmt: skip
    first = json.loads((chain / "report" / "metrics.json").read_text())["models"]["new"]
    assert metrics["again"] == pytest.approx(first, abs=1e-12)


def test_training_log_has_the_promised_names(chain):
    lines = [json.loads(line) for line in (chain / "pg-ret" / "log.jsonl").read_text().splitlines()]
    validated = range(2, 21, 2)
    assert [line["step"] for line in lines] == sorted({1, 11, *validated})
    assert [line["step"] for line in lines if "entropy" in line] == [1, *validated]
    names = {"loss", "reward", "reward_std", "rewarded/base", "unknown/feedback", "entropy", "step_time"}
    assert names <= set(lines[-1])
    assert all(line["rewarded/base"] == 1 for line in lines)


def test_resolved_configuration_runs_again_and_flags_override_it(chain, capsys, tmp_path):
    config = yaml.safe_load((chain / "pg-ret" / "config.yaml").read_text())
    assert config["objective"] == "pg-ret"
    again = result(capsys, "train", "--config", chain / "pg-ret" / "config.yaml", "--out", tmp_path / "again")
    assert [p["recall"] for p in again["points"]] == [
        p["recall"] for p in json.loads((chain / "pg-ret" / "validation.json").read_text())
    ]
    fewer = result(
        capsys,
        "train",
        "--config",
        chain / "pg-ret" / "config.yaml",
        "--steps",
        4,
        "--out",
        tmp_path / "fewer",
    )
    assert fewer["points"][-1]["step"] == 4


def test_same_seed_same_weights_other_seed_others(chain, world, capsys, tmp_path):
    def train(name, seed):
        result(
            capsys, "train", "--data", world, "--index", chain / "index", "--labels", chain / "labels", *TRAIN,
            "--seed", seed, "--validation-fraction", 0, "--out", tmp_path / name,
        )  # fmt: skip
        return json.loads((tmp_path / name / "manifest.json").read_text())["fingerprint"]

    assert train("a", 1) == train("b", 1) != train("c", 2)


def test_a_run_that_gains_nothing_says_so(chain, world, capsys, tmp_path):
    code, _, err = run(
        capsys, "train", "--data", world, "--index", chain / "index", "--labels", chain / "labels", *TRAIN,
        "--learning-rate", 1e-12, "--out", tmp_path / "model", "--quiet",
    )  # fmt: skip
    assert code == 0
    assert "the saved encoder is the one it started from" in " ".join(err.split())


def test_search_marks_novel_items(chain, world, capsys):
    found = result(
        capsys, "search", "--data", world, "--index", chain / "index", "--model", f"new={chain / 'pg-ret'}",
        "--base-depth", 2, "--k", 6, "buy red sofa",
    )["results"]  # fmt: skip
    assert [hit["novel"] for hit in found["base"]] == [False] * 2 + [True] * 4
    base_ids = [hit["id"] for hit in found["base"]][:2]
    assert all(hit["novel"] == (hit["id"] not in base_ids) for hit in found["new"])
    code, out, _ = run(
        capsys, "search", "--data", world, "--index", chain / "index", "--base-depth", 5, "buy red sofa"
    )
    assert code == 0
    assert "score" in out


def test_unfinished_training_is_not_dropped_silently(chain, world, capsys, tmp_path, monkeypatch):
    from novelret.train import loop

    arguments = [
        "train", "--data", world, "--index", chain / "index", "--labels", chain / "labels", *TRAIN,
        "--eval-every", 5, "--validation-fraction", 0.2, "--out", tmp_path / "model",
    ]  # fmt: skip
    whole = result(capsys, *arguments[:-1], tmp_path / "undisturbed")
    real_step, calls = loop._step, []

    def dies(*args):
        calls.append(1)
        if len(calls) == 13:
            raise KeyboardInterrupt
        return real_step(*args)

    monkeypatch.setattr(loop, "_step", dies)
    assert run(capsys, *arguments)[0] == 130
    assert not (tmp_path / "model").exists()
    monkeypatch.setattr(loop, "_step", real_step)
    message = fails(capsys, *arguments, "--learning-rate", 0.5)
    assert "learning_rate 0.02 → 0.5" in message
    resumed = result(capsys, *arguments)
    assert resumed["points"] == whole["points"]
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("model", "undisturbed")]
    loss = [[json.loads(line)["loss"] for line in log] for log in logs]
    assert loss[0] == loss[1]


# Bad input: each its own clear line, exit code 2, nothing overwritten.


def test_wrong_pairings_are_refused(chain, world, encoder, capsys, tmp_path):
    other = make_world(tmp_path / "other")
    write_jsonl(other / "corpus.jsonl", [{"_id": f"i{n:02d}", "text": f"thing {n}"} for n in range(40)])
    common = ["--data", world, "--index", chain / "index"]
    assert "its corpus is not the one" in fails(
        capsys, "eval", "--data", other, "--index", chain / "index", "--out", tmp_path / "r"
    )
    assert main(
        ["index", "--data", str(other), "--model", str(encoder), "--out", str(tmp_path / "index2"), "--quiet"]
    ) == 0  # fmt: skip
    capsys.readouterr()
    second = ["--data", other, "--index", tmp_path / "index2"]
    assert "was labelled with another index" in fails(
        capsys, "train", *second, "--labels", chain / "labels", *TRAIN, "--out", tmp_path / "m"
    )
    assert "was trained for another index" in fails(
        capsys,
        "eval",
        *second,
        "--model",
        f"x={chain / 'pg-ret'}",
        "--k",
        5,
        "--base-depth",
        5,
        "--out",
        tmp_path / "r",
    )
    wide = make_encoder(tmp_path / "wide", dimension=32)
    assert "gives 32 dimensions" in fails(
        capsys, "eval", *common, "--model", f"x={wide}", "--k", 5, "--base-depth", 5, "--out", tmp_path / "r"
    )
    assert "they must be one deployed pair" in fails(
        capsys, "index", "--data", world, "--model", encoder, "--query-model", wide, "--out", tmp_path / "i"
    )
    assert "is an INDEX, expected LABELS" in fails(
        capsys, "train", *common, "--labels", chain / "index", *TRAIN, "--out", tmp_path / "m"
    )
    assert "is LABELS, expected an INDEX" in fails(
        capsys, "eval", "--data", world, "--index", chain / "labels", "--k", 5, "--out", tmp_path / "r"
    )
    assert not any((tmp_path / name).exists() for name in ("r", "m", "i"))


# A name too long fails as whoever runs the tests, /proc on Linux alone, a folder without rights not as root.
UNWRITABLE = {
    "x" * 300: "cannot be written (File name too long)",
    "file/below": "a file stands in its way",
    "/proc/no/such": "cannot be written (No such file or directory)",
    "read-only/below": "cannot be written (Permission denied)",
}


@pytest.mark.parametrize("out", UNWRITABLE)
def test_an_output_that_cannot_be_written_is_one_line(
    chain, world, encoder, capsys, tmp_path, monkeypatch, out
):
    if out.startswith("/proc") and not Path("/proc/self").exists():
        pytest.skip("no /proc here")
    if out.startswith("read-only") and os.geteuid() == 0:
        pytest.skip("root writes everywhere")
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("x")
    Path("read-only").mkdir(mode=0o555)
    data = ["--data", world, "--index", chain / "index"]
    commands = [
        ["index", "--data", world, "--model", encoder],
        ["label", *data, "--judge", f"file:{world / 'judgements.tsv'}", "--base-depth", 3, "--depth", 12],
        ["eval", *data, "--k", 5, "--base-depth", 5],
        ["export", "--model", encoder],
    ]
    for command in commands:
        message = fails(capsys, *command, "--out", out, "--quiet")
        assert UNWRITABLE[out] in message, (command, message)
        assert message.startswith(f"error: {out}: "), (command, message)
    # One file each, whose folder is not made for a copy.
    message = fails(capsys, "export", "--model", chain / "pg-ret", "--format", "npz", "--out", f"{out}.npz")
    assert f"{out}.npz: cannot be written (" in message
    assert f"{out}.yaml: cannot be written (" in fails(capsys, "recipe", "cp", "default", f"{out}.yaml")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "read-only"]


def test_a_recipe_is_not_copied_onto_itself(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(capsys, "recipe", "cp", "default", "my.yaml") == (0, "", "")
    text = Path("my.yaml").read_text()
    assert "my.yaml: cannot be written" in fails(capsys, "recipe", "cp", "my.yaml", "my.yaml", "--force")
    assert "my.yaml: cannot be written" not in fails(capsys, "recipe", "cp", "default", "my.yaml")
    assert Path("my.yaml").read_text() == text
    assert "no/my.yaml: cannot be written (No such file or directory)" in fails(
        capsys, "recipe", "cp", "default", "no/my.yaml"
    )


def test_arguments_that_are_no_utf_8_are_one_line(world, index_folder, capsys, tmp_path):
    label = ["label", "--data", world, "--index", index_folder, "--judge", f"file:{world}/judgements.tsv"]
    search = ["search", "--data", world, "--index", index_folder, "--base-depth", 5]
    for arguments in ([*label, "--out", f"{tmp_path}/a\udce9"], [*search, "caf\udce9"]):
        assert "is not UTF-8; type it anew" in fails(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []
    assert run(capsys, *search, "café")[0] == 0


def test_a_terminal_that_cannot_show_a_sign_shows_another(world, index_folder):
    search = ["search", "--data", world, "--index", index_folder, "--base-depth", 5, "sofà ≥ 3"]
    command = [sys.executable, "-m", "novelret", *map(str, search)]
    environment = os.environ | {"PYTHONIOENCODING": "latin-1"}
    done = subprocess.run(command, env=environment, capture_output=True)
    assert (done.returncode, b"Traceback" in done.stderr) == (0, False)
    assert "sofà ? 3" in done.stdout.decode("latin-1")


def test_a_demo_does_not_go_into_a_file(capsys, tmp_path):
    (tmp_path / "file").write_text("x")
    assert "holds something else than a demo" in fails(capsys, "demo", "--out", tmp_path / "file")


def test_bad_options_each_have_their_line(chain, world, encoder, capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    out = ["--out", tmp_path / "out"]
    common = ["--data", world, "--index", chain / "index"]
    train = ["train", *common, "--labels", chain / "labels", *out]
    cases = {
        "--k 41: the catalog holds 40 items": ["eval", *common, "--k", "41", *out],
        "--base-depth 41": ["eval", *common, "--base-depth", "41", "--k", "5", *out],
        "--depth 41: more than the catalog's 40": ["label", *common, "--judge", f"file:{world}/judgements.tsv",
                                                   "--depth", "41", "--base-depth", 3, *out],
        "--from model:: names no path": ["label", *common, "--judge", f"file:{world}/judgements.tsv", "--from",
                                        "model:", "--base-depth", 3, "--depth", 9, *out],
        "--data: is empty; give a folder": ["index", "--data", "", "--model", encoder, *out],
        "give another, as NAME=PATH": ["eval", *common, "--model", "a model", "--k", 5, "--base-depth", 5, *out],
        "--judge oracle: unknown": ["label", *common, "--judge", "oracle", *out],
        "no such prompt": ["label", *common, "--judge", "openai:m", "--prompt", "poem", *out],
        "OPENAI_API_KEY is not set": ["label", *common, "--judge", "openai:m", *out],
        "--objective best: unknown": [*train, "--objective", "best"],
        "--loss huge: unknown": [*train, "--loss", "huge"],
        "--reward eq9: expected": [*train, *TRAIN, "--reward", "eq9"],
        "nor their sum above 1": [*train, *TRAIN, "--alpha", "0.6"],
        "needs --labels": ["train", *common, *TRAIN, *out],
        "holds no sentence-transformers model": ["index", "--data", world, "--model", world, *out],
        "no such model folder": ["index", "--data", world, "--model", "/no/such/model", *out],
        "nameless: is no folder here": ["eval", *common, "--model", "nameless", "--k", 5, "--base-depth", 5, *out],
        "no such folder; make it with `novelret index`": ["eval", "--data", world, "--index", tmp_path / "x", *out],
        "expected float32 or float16": ["index", "--data", world, "--model", encoder, "--dtype", "int4", *out],
        "faiss does not take it (": ["index", "--data", world, "--model", encoder, "--factory", "Best", *out],
        "unknown option 'colour'": ["index", "--config", tmp_path / "bad.yaml", *out],
        "'seed' stands outside the commands' sections": ["train", "--config", tmp_path / "beside.yaml", *out],
        "'model' and 'models' are one option": ["eval", "--config", tmp_path / "twice.yaml", *out],
    }  # fmt: skip
    (tmp_path / "bad.yaml").write_text("colour: red\n")
    (tmp_path / "beside.yaml").write_text("seed: 1\ntrain:\n  steps: 2\n")
    (tmp_path / "twice.yaml").write_text("model: [a=x]\nmodels: [b=y]\n")
    if "OPENAI" in str(cases):
        monkeypatch.setenv("NOVELRET_STORE", str(tmp_path / "store.sqlite"))
    judge = ["--judge", f"file:{world}/judgements.tsv"]
    for arguments in (
        ["index", "--data", world, "--model", encoder, *out],
        ["label", *common, *judge, "--base-depth", 3, "--depth", 9, *out],
        [*train, *TRAIN],
        ["eval", *common, *judge, "--k", 5, "--base-depth", 3, *out],
        ["search", *common, "a sofa", "--base-depth", 3],
    ):
        said = fails(capsys, *arguments, "--device", "gpu")
        assert said.endswith("--device gpu: unknown; choose from auto, cpu, cuda and cuda:NUMBER")
    for message, arguments in cases.items():
        if "prompt" in message:
            monkeypatch.setenv("OPENAI_API_KEY", "k")
        else:
            monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        assert message in fails(capsys, *arguments)
    assert not (tmp_path / "out").exists()


def test_an_existing_output_is_kept_without_force(chain, world, encoder, capsys, tmp_path):
    shutil.copytree(chain / "report", tmp_path / "report")
    arguments = ["eval", "--data", world, "--index", chain / "index", "--k", 5, "--base-depth", 5]
    assert "exists already" in fails(capsys, *arguments, "--out", tmp_path / "report")
    assert len(json.loads((tmp_path / "report" / "metrics.json").read_text())["models"]) == 3
    assert run(capsys, *arguments, "--out", tmp_path / "report", "--force")[0] == 0
    assert len(json.loads((tmp_path / "report" / "metrics.json").read_text())["models"]) == 1
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    assert "was not made by novelret" in fails(capsys, *arguments, "--out", tmp_path / "mine", "--force")


FULL = [
    OSError(errno.ENOSPC, "No space left on device", "report"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    sqlite3.OperationalError("database or disk is full"),
]


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
def test_a_full_disk_is_one_line(chain, world, capsys, tmp_path, monkeypatch, error):
    from novelret.evaluate import evaluate

    def full(*_):
        raise error

    monkeypatch.setattr(evaluate, "_write", full)
    message = fails(
        capsys, "eval", "--data", world, "--index", chain / "index", "--k", 5, "--base-depth", 5,
        "--out", tmp_path / "report",
    )  # fmt: skip
    assert "no space left on the device" in message
    assert not (tmp_path / "report").exists()


def test_help_says_what_of_a_text_is_judged_and_what_price_is_meant(capsys):
    for command in ("label", "train", "eval"):
        _, out, _ = run(capsys, command, "--help")
        said = " ".join(out.replace("│", " ").split())
        assert f"sees the first {MAX_TEXT:,} characters of a query and of an item" in said
        assert "also for batches" in said


def test_help_is_there_for_every_command(capsys):
    for command in ("index", "label", "train", "eval", "search", "compare", "demo"):
        code, out, _ = run(capsys, command, "--help")
        assert code == 0
        assert "examples:" in out
        assert f"novelret {command}" in out


def test_force_replaces_neither_an_input_nor_another_kind(chain, world, capsys, tmp_path):
    copy = shutil.copytree(chain, tmp_path / "chain")
    before = {path: path.read_bytes() for path in copy.rglob("manifest.json")}
    data, index, labels = ["--data", world], ["--index", copy / "index"], copy / "labels"
    judge = ["--judge", f"file:{world}/judgements.tsv", "--base-depth", 3, "--depth", 12]
    train = ["train", *data, *index, "--labels", labels, *TRAIN]
    wrong = [
        ([*train, "--out", copy / "index"], "is an INDEX, which --force does not replace by a MODEL"),
        ([*train, "--init", copy / "pg-ret", "--out", copy / "pg-ret"], "which this command reads"),
        (["label", *data, *index, *judge, "--out", copy / "pg-ret"], "is a MODEL"),
        (
            ["label", *data, *index, *judge, "--from", f"yes:{labels}", "--out", labels],
            f"holds yes:{labels}, which this command reads",
        ),
        (["eval", *data, *index, "--model", f"x={copy / 'pg-ret'}", "--out", copy / "pg-ret"], "is a MODEL"),
        (["export", "--model", copy / "pg-ret", "--format", "st", "--out", copy / "pg-ret"], "is a MODEL"),
    ]
    for command, words in wrong:
        assert words in fails(capsys, *command, "--force")
    assert {path: path.read_bytes() for path in copy.rglob("manifest.json")} == before
    # A broken one is nothing that could be lost.
    (copy / "supervised" / "manifest.json").write_text("{")
    assert run(capsys, *train, "--out", copy / "supervised", "--force", "--quiet")[0] == 0


def test_a_config_file_is_named_for_what_is_wrong_in_it(capsys, tmp_path):
    config = tmp_path / "train.yaml"
    command = ["train", "--config", config, "--data", "d", "--index", "i", "--out", tmp_path / "m"]
    config.write_text("steps: twenty\n")
    assert fails(capsys, *command).startswith(
        f"error: {config}: steps: 'twenty': Input should be a valid integer"
    )
    config.write_text("steps: 20\nseed: 1\nsteps: 30\n")
    assert f"('steps' stands there twice in \"{config}\", line 3" in fails(capsys, *command)
    config.write_text("steps: 20\nlabels: one\ntrust: false\n")  # these fit
    assert "i: no such folder" in fails(capsys, *command)
    config.write_text("train: &one {steps: 20}\nother: {<<: *one, steps: 3}\n")  # as do keys from elsewhere
    assert "i: no such folder" in fails(capsys, *command)


def test_a_result_that_nobody_reads_is_no_failure(chain, world):
    """`novelret … | head -1`: the reading side goes away."""
    search = ["search", "--data", world, "--index", chain / "index", "--base-depth", "5", "buy red sofa"]
    for command in (["recipe", "ls"], [*search, "--json"]):
        process = subprocess.Popen(
            [sys.executable, "-m", "novelret", *map(str, command)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        process.stdout.close()
        said = process.stderr.read()
        assert (process.wait(), said) == (0, b"")


def test_a_model_needs_no_name(chain, world, capsys, tmp_path):
    found = result(capsys, "eval", "--data", world, "--index", chain / "index", "--model", chain / "pg-ret",
                   "--base-depth", 3, "--k", 5, "--out", tmp_path / "report")  # fmt: skip
    assert set(found["models"]) == {"base", "pg-ret"}
