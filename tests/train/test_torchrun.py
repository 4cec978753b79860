"""Two processes under torchrun, each holding half of the catalog, train what one process trains."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from novelret.cli import main
from novelret.errors import UserError
from novelret.progress import Reporter
from novelret.train import prepare, processes
from novelret.train.config import TrainConfig
from novelret.train.sampler import CELL
from tests.conftest import COLOURS, THINGS, write_jsonl, write_qrels
from tests.killing import start


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_processes_whose_torchrun_is_gone_do_not_wait_for_days(monkeypatch):
    port = free_port()
    environment = {
        "WORLD_SIZE": 2,
        "RANK": 1,
        "LOCAL_RANK": 1,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(processes, "_START", timedelta(seconds=1))
    with (
        pytest.raises(UserError, match=f"torchrun at 127.0.0.1:{port} did not answer"),
        processes.join("cpu"),
    ):
        pass


def test_who_has_joined_waits_for_what_the_first_builds(monkeypatch):
    """NCCL takes the address of the first from the store, which comes with its first message: after hours."""
    store = dist.HashStore()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(processes, "rendezvous", lambda *_, timeout: iter([(store, 1, 2)]))
    joined = []
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **given: joined.append(given))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    with processes.join("cpu"):
        assert joined[0]["store"] is store
        assert store.timeout == joined[0]["timeout"] == timedelta(days=7)


@pytest.fixture(scope="module")
def wide(encoder, tmp_path_factory):
    """A catalog of more than two cells, so that both processes hold a part; queries like single items."""
    folder = tmp_path_factory.mktemp("wide")
    n = 2 * CELL + 100
    words = [f"{c} {t}" for c in COLOURS for t in THINGS]
    rng = np.random.default_rng(0)
    # So long that no two are alike: what ties falls into either order, and one of the two may be relevant.
    texts = [" ".join(rng.choice(words, 9)) for _ in range(n)]
    write_jsonl(folder / "corpus.jsonl", [{"_id": f"i{k:05d}", "text": text} for k, text in enumerate(texts)])
    write_jsonl(
        folder / "queries.jsonl", [{"_id": f"q{k:02d}", "text": f"buy {words[k]}"} for k in range(40)]
    )
    pairs = [(f"q{q:02d}", f"i{i:05d}", 1) for q in range(40) for i in rng.choice(n, 300, replace=False)]
    write_qrels(folder / "qrels" / "train.tsv", pairs[::20])
    write_qrels(folder / "judgements.tsv", pairs)
    # Some queries leave items out, each a number of its own, so that the processes' batches differ in width.
    left_out = [
        (f"q{q:02d}", f"i{i:05d}", 1) for q in range(0, 40, 3) for i in rng.choice(n, q, replace=False)
    ]
    known = {(query, item) for query, item, _ in pairs}
    write_qrels(folder / "excluded" / "train.tsv", [pair for pair in left_out if pair[:2] not in known])
    common = ["--data", str(folder), "--quiet"]
    out = folder / "runs"
    for command in (
        ["index", *common, "--model", str(encoder), "--out", str(out / "index")],
        ["label", *common, "--index", str(out / "index"), "--judge", f"file:{folder / 'judgements.tsv'}",
         "--missing", "irrelevant", "--base-depth", "5", "--depth", "2000", "--out", str(out / "labels")],
        ["label", *common, "--index", str(out / "index"), "--judge", f"file:{folder / 'judgements.tsv'}",
         "--base-depth", "5", "--depth", "2000", "--out", str(out / "yeses")],
    ):  # fmt: skip
        assert main(command) == 0
    return folder


REWARDLESS = [
    "--tune",
    "adapter",
    "--gamma",
    "0",
    "--draw",
    "plain",
    "--batch-size",
    "2",
    "--learning-rate",
    "0.01",
]
CASES = {
    "policy-states": ["--tune", "adapter", "--alpha", "0.25", "--gamma", "0.5", "--learning-rate", "0.01"],
    "memory": ["--tune", "memory", "--memory-size", "15", "--learning-rate", "0.01"],
    "lists": [
        "--tune",
        "adapter",
        "--objective",
        "ca-pg-loo",
        "--list-size",
        "20",
        "--micro-batch",  # the first of which hold no list
        "5",
        "--learning-rate",
        "0.01",
    ],
    # One policy state, which the second process has no part in.
    "support": [
        "--tune",
        "adapter",
        "--alpha",
        "0.125",
        "--gamma",
        "0.5",
        "--batch-size",
        "8",
        "--support",
        "100",
    ],
    # Steps without any reward, which leave the weights where they are.
    "rewardless": REWARDLESS,
    # The same where all processes compute losses together: a step with a reward, then four without any.
    "rewardless-together": [*REWARDLESS, "--loss", "inclusion", "--seed", "4"],
    "full": ["--tune", "full", "--loss", "inclusion", "--micro-batch", "5", "--learning-rate", "1e-3"],
}


UNDER_TORCHRUN = "memory"  # the others' processes are started as it starts them, by a quicker way
LABELS = {"rewardless": "yeses", "rewardless-together": "yeses"}  # most of what is drawn has no label


def by_torchrun(arguments):
    """What the first of two processes says."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launcher, "-m", "novelret", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def by_two_processes(arguments, folder):
    """The same, by the environment that torchrun gives its processes."""
    common = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    said = [folder / f"said-{rank}" for rank in range(2)]
    runs = [
        start(arguments, common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, said[rank], {})
        for rank in range(2)
    ]
    for run in runs:
        run.join(300)
    texts = [path.read_text() for path in said]
    assert [run.exitcode for run in runs] == [0, 0], texts
    assert texts[1] == ""
    return texts[0].splitlines()[-1]  # after what it warns of


@pytest.mark.parametrize("case", CASES)
def test_two_processes_give_the_samples_loss_and_weights_of_one(wide, tmp_path, capsys, case):
    def train(name, processes):
        arguments = [
            "train", "--data", wide, "--index", wide / "runs" / "index",
            "--labels", wide / "runs" / LABELS.get(case, "labels"), "--base-depth", "5", "--depth", "2000", "--steps", "6",
            "--eval-every", "3", "--log-every", "1", "--batch-size", "21", "--validation-fraction", "0.3",
            "--max-recall-drop", "1", "--patience", "0", "--device", "cpu", *CASES[case], "--out", tmp_path / name,
            "--json", "--quiet",
        ]  # fmt: skip
        arguments = [*map(str, arguments)]
        if processes == 1:
            assert main(arguments) == 0
            said = capsys.readouterr().out
        elif case == UNDER_TORCHRUN:
            said = by_torchrun(arguments)
        else:
            said = by_two_processes(arguments, tmp_path)
        return json.loads(said), [
            json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()
        ]

    (tmp_path / "large-disk").mkdir()
    (tmp_path / "both").symlink_to(tmp_path / "large-disk" / "there")  # which is where all processes work
    alone, log = train("alone", 1)
    both, log_of_both = train("both", 2)
    assert [line["step"] for line in log_of_both] == [1, 2, 3, 4, 5, 6]
    for one, two in zip(log, log_of_both, strict=True):
        assert ("entropy" in one) == (one["step"] in (1, 3, 6))  # the first one, and where it is validated
        for name in {"loss", "reward", "entropy", "grad_norm", "labelled"} & one.keys():
            expected = one[name] if one[name] is None else pytest.approx(one[name], rel=2e-3, abs=2e-4)
            assert two[name] == expected, name
        exact = {name: one[name] for name in one if name.startswith(("rewarded/", "unknown/"))}
        assert exact == {name: two[name] for name in exact}
    blends = [(share, 1.0) for share in np.arange(1, 10) / 10]
    if case == "memory":
        blends += [(share, memory) for memory in (0.5, 0.25, 0.1) for share in np.arange(1, 11) / 10]
    assert [point["step"] for point in both["points"]] == [0, 3, 6, *[6] * len(blends)]
    found = [(point["share"], point["memory"]) for point in both["points"][3:]]
    np.testing.assert_allclose(found, blends)
    for one, two in zip(alone["points"], both["points"], strict=True):
        assert two["recall"] == pytest.approx(one["recall"], abs=0.02)
    assert (tmp_path / "both" / "refit" / "log.jsonl").exists() == (alone["chosen"]["step"] > 0)
    files = sorted((tmp_path / "alone").rglob("*.safetensors"))
    assert files
    moved = 0.0
    for path in files:
        mine, theirs = load_file(path), load_file(tmp_path / "both" / path.relative_to(tmp_path / "alone"))
        for name, tensor in mine.items():
            if name.endswith("key.bias"):
                continue  # has no gradient but rounding (softmax does not see it), which Adam blows up
            assert np.allclose(theirs[name], tensor, atol=2e-4), name
            moved = max(moved, float(tensor.abs().max()))
    assert moved > 0


def test_the_first_process_alone_passes_over_all_items_to_check_them(wide, monkeypatch):
    checked = []
    monkeypatch.setattr(prepare, "check_embeddings", lambda items, **_: checked.append(len(items)))
    config = TrainConfig(str(wide), str(wide / "runs" / "index"), labels=str(wide / "runs" / "labels"))
    for rank in (1, 0):
        assert checked == []
        prepare.open_inputs(config, processes.Processes(rank, 2, "cpu"), Reporter())
    assert checked == [2 * CELL + 100]


def test_each_process_says_what_went_wrong_in_it(monkeypatch, capsys, tmp_path):
    """On another machine a file may be missing, which the first process knows nothing of."""
    monkeypatch.setenv("RANK", "3")
    arguments = ["train", "--data", str(tmp_path / "nope"), "--index", str(tmp_path / "nope")]
    assert main([*arguments, "--labels", str(tmp_path / "nope"), "--out", str(tmp_path / "model")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: process 3: ")
    assert len(err.strip().splitlines()) == 1


def test_more_processes_than_gpus_are_refused(monkeypatch):
    for name, value in {"WORLD_SIZE": 2, "RANK": 0, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with (
        pytest.raises(UserError, match="--nproc-per-node 2: this machine has 1 GPUs"),
        processes.join("cuda"),
    ):
        pass


def test_a_device_that_is_too_small_is_named_with_a_remedy(monkeypatch, capsys, wide, tmp_path):
    def full(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr("novelret.train.trainer.run_steps", full)
    arguments = ["train", "--data", wide, "--index", wide / "runs" / "index", "--labels", wide / "runs" / "labels",
                 "--base-depth", "5", "--depth", "2000", "--device", "cpu", "--tune", "full", "--batch-size", "21",
                 "--out", tmp_path / "model", "--quiet"]  # fmt: skip
    assert main([*map(str, arguments)]) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert "cpu: its memory is too small; pass --micro-batch 5 (the same run goes on with it)" in err
