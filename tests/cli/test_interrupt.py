"""Ctrl-C in a process of its own: one line says what is kept, and the same command goes on from there."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from novelret.cli import main
from tests.killing import start
from tests.loopback import LoopbackJudge

KEPT = "error: interrupted; what is finished is kept, the same command goes on from there"


def interrupted(
    command: list[object], said: Path, *moments: Callable[[], bool], **environment: str
) -> list[str]:
    """Run a command and press Ctrl-C at each of the moments; the lines it said."""
    process = start([*map(str, command)], environment, said, {})
    try:
        deadline = time.time() + 180
        for has_come in moments:
            while not has_come() and process.is_alive() and time.time() < deadline:
                time.sleep(0.01)
            assert process.is_alive(), said.read_text()
            os.kill(process.pid, signal.SIGINT)
        process.join(180)
    finally:
        process.kill()
    assert process.exitcode == 130, said.read_text()
    return said.read_text().strip().splitlines()


def test_label_says_what_is_kept_and_goes_on(world, index_folder, tmp_path, capsys, monkeypatch):
    command = ["label", "--data", world, "--index", index_folder, "--judge", "openai:tiny", "--prompt",
               "query-keyword", "--base-depth", 3, "--depth", 12, "--concurrency", 2,
               "--store", tmp_path / "store.sqlite", "--out", tmp_path / "labels"]  # fmt: skip
    with LoopbackJudge(delay=0.05) as server:
        endpoint = {"OPENAI_API_KEY": "sk-secret", "OPENAI_BASE_URL": server.url}
        lines = interrupted(command, tmp_path / "said", lambda: len(server.seen) > 10, **endpoint)
        assert lines[-1] == KEPT
        assert 10 < len(server.seen) < 180
        server.delay = 0
        for name, value in endpoint.items():
            monkeypatch.setenv(name, value)
        assert main([*map(str, command), "--json", "--quiet"]) == 0
        assert json.loads(capsys.readouterr().out)["pairs"] == len(server.seen) == 180


def test_what_is_left_at_once_is_on_the_bill(world, index_folder, tmp_path):
    """Ctrl-C for the second time leaves requests under way, which may be answered all the same."""
    command = ["label", "--data", world, "--index", index_folder, "--judge", "openai:tiny", "--prompt",
               "query-keyword", "--base-depth", 3, "--depth", 12, "--concurrency", 8,
               "--store", tmp_path / "store.sqlite", "--out", tmp_path / "labels"]  # fmt: skip
    said = tmp_path / "said"
    with LoopbackJudge(delay=60) as server:
        endpoint = {"OPENAI_API_KEY": "sk-secret", "OPENAI_BASE_URL": server.url}
        interrupted(
            command,
            said,
            lambda: len(server.seen) == 8,
            lambda: "Ctrl-C again leaves at once" in said.read_text(),
            **endpoint,
        )
    spent = json.loads((tmp_path / "labels.partial" / "asking.json").read_text())
    assert spent["requests"] == len(server.seen) == 8


def test_train_says_what_is_kept_and_goes_on(world, index_folder, tmp_path, capsys):
    judge = f"file:{world / 'judgements.tsv'}"
    common = ["--data", world, "--index", index_folder, "--base-depth", 3, "--depth", 12]
    label = ["label", *common, "--judge", judge, "--missing", "irrelevant", "--out", tmp_path / "labels"]
    assert main([*map(str, label), "--quiet"]) == 0
    command = ["train", *common, "--labels", tmp_path / "labels", "--tune", "adapter", "--steps", 1_000_000,
               "--batch-size", 8, "--eval-every", 20, "--validation-fraction", 0.2, "--device", "cpu",
               "--max-recall-drop", 1, "--out", tmp_path / "model"]  # fmt: skip
    log = tmp_path / "model.partial" / "log.jsonl"

    def steps() -> int:
        lines = log.read_text().splitlines(keepends=True) if log.exists() else []
        whole = [line for line in lines if line.endswith("\n")]
        return json.loads(whole[-1])["step"] if whole else 0

    assert interrupted([*command, "--quiet"], tmp_path / "quiet", lambda: steps() > 40) == [KEPT]
    assert not (tmp_path / "model").exists()
    before = steps()
    lines = interrupted(command, tmp_path / "said", lambda: steps() > before)
    assert lines[-1] == KEPT
    assert any("going on at step " in line for line in lines)


def test_a_recipe_says_it_once_and_stops(world, encoder, tmp_path, capsys, monkeypatch):
    def press(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("novelret.build.build_index", press)
    monkeypatch.chdir(tmp_path)
    settings = ["--set", f"data={world}", "--set", f"index.model={encoder}"]
    assert main(["recipe", "run", "default", *settings, "--quiet"]) == 130
    assert capsys.readouterr().err.strip().splitlines() == [KEPT]
