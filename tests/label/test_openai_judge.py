"""`label --judge openai:…` against a real HTTP server on loopback: money, faults, kills, keys."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time

import pyarrow.parquet as pq
import pytest

from novelret.cli import main
from novelret.label import questions as questions_module
from novelret.label.judges import openai as judge_module
from tests.loopback import LoopbackJudge

KEY = "sk-very-secret-0123456789"


@pytest.fixture
def arguments(world, index_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(judge_module, "_FIRST_WAIT", 0.01)
    return [
        "label", "--data", str(world), "--index", str(index_folder), "--judge", "openai:tiny",
        "--prompt", "query-keyword", "--base-depth", "3", "--depth", "9", "--store", str(tmp_path / "store.sqlite"),
    ]  # fmt: skip


def ask(capsys, server, monkeypatch, arguments, *more):
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    code = main([*arguments, *map(str, more), "--json", "--quiet"])
    captured = capsys.readouterr()
    return code, (json.loads(captured.out) if captured.out else None), captured.err


def rows_of(folder):
    return pq.read_table(folder / "judgements.parquet").to_pylist()


def expected_verdict(row, world):
    texts = {}
    for name in ("corpus", "queries"):
        for line in (world / f"{name}.jsonl").read_text().splitlines():
            entry = json.loads(line)
            texts[entry["_id"]] = entry["text"]
    return int(bool(set(texts[row["query_id"]].split()) & set(texts[row["item_id"]].split())))


def test_every_pair_is_judged_and_billed_once(arguments, world, tmp_path, capsys, monkeypatch):
    with LoopbackJudge() as server:
        code, facts, err = ask(capsys, server, monkeypatch, arguments, "--out", tmp_path / "labels")
        assert code == 0, err
        rows = rows_of(tmp_path / "labels")
        assert len(rows) == 20 * 6 == facts["pairs"] == facts["requests"]
        assert all(row["verdict"] == expected_verdict(row, world) for row in rows)
        assert set(server.billed.values()) == {1}
        assert facts["prompt_tokens"] == 50 * 120
        # What is known is never paid for again: another output, --force, a deeper list.
        code, again, _ = ask(capsys, server, monkeypatch, arguments, "--out", tmp_path / "again")
        assert (code, again["requests"], again["already_known"]) == (0, 0, 120)
        code, deeper, _ = ask(
            capsys, server, monkeypatch, arguments, "--depth", 11, "--out", tmp_path / "deeper"
        )
        assert (code, deeper["requests"], deeper["pairs"]) == (0, 40, 160)
        assert set(server.billed.values()) == {1}
        assert server.seen[0]["messages"][0]["content"].startswith(
            "You are an expert in understanding user intent"
        )
        assert server.seen[0]["temperature"] == 0


@pytest.mark.parametrize(
    "fault", ["429", "429-retry-after", "500", "cut", "malformed", "empty", "html", "slow"]
)
def test_faults_that_pass_are_tried_again(arguments, tmp_path, capsys, monkeypatch, fault):
    with LoopbackJudge([fault] * 10) as server:
        code, facts, err = ask(
            capsys, server, monkeypatch, arguments, "--out", tmp_path / "labels", "--concurrency", 4
        )
        assert code == 0, err
        assert (facts["pairs"], facts["failed"]) == (120, 0)
        assert facts["retries"] == (0 if fault == "slow" else 10)
        assert set(server.billed.values()) == {1}


def test_what_cannot_be_answered_is_listed_and_asked_again_alone(arguments, tmp_path, capsys, monkeypatch):
    with LoopbackJudge(["400"] * 3) as server:
        code, facts, err = ask(capsys, server, monkeypatch, arguments, "--out", tmp_path / "labels")
        assert (code, facts["failed"], facts["pairs"]) == (0, 3, 117)
        assert "3 questions got no answer" in err
        failures = [
            json.loads(line) for line in (tmp_path / "labels" / "failures.jsonl").read_text().splitlines()
        ]
        assert len(failures) == 3
        assert "content filtered" in failures[0]["reason"]
        code, facts, _ = ask(capsys, server, monkeypatch, arguments, "--out", tmp_path / "labels", "--force")
        assert (code, facts["requests"], facts["pairs"]) == (0, 3, 120)


def test_a_refusal_is_an_answer_that_is_not_usable(arguments, tmp_path, capsys, monkeypatch):
    with LoopbackJudge(["refusal"]) as server:
        code, facts, err = ask(capsys, server, monkeypatch, arguments, "--out", tmp_path / "labels")
        assert (code, facts["verdicts"]["unusable"]) == (0, 1)
        assert "1 answers are not usable, for instance 'I would rather not.'" in err
        code, facts, _ = ask(capsys, server, monkeypatch, arguments, "--out", tmp_path / "b")
        assert facts["requests"] == 0


def test_a_refused_key_is_one_line_without_the_key(arguments, tmp_path, capsys, monkeypatch):
    with LoopbackJudge(["401"] * 50) as server:
        code, _, err = ask(capsys, server, monkeypatch, arguments, "--out", tmp_path / "labels")
        assert code == 2
        assert len(err.strip().splitlines()) == 1
        assert "Incorrect API key" in err
        assert KEY not in err


def test_caps_stop_cleanly(arguments, tmp_path, capsys, monkeypatch):
    with LoopbackJudge() as server:
        code, facts, err = ask(
            capsys, server, monkeypatch, arguments, "--out", tmp_path / "a", "--max-requests", 25
        )
        assert (code, facts["requests"], sum(server.billed.values())) == (0, 25, 25)
        assert "--max-requests 25 reached" in err
        code, facts, err = ask(
            capsys,
            server,
            monkeypatch,
            arguments,
            "--out",
            tmp_path / "b",
            "--max-cost",
            0.01,
            "--price",
            "10,30",
        )
        assert code == 0
        assert facts["requests"] > 0
        assert facts["cost"] <= 0.01
        code, _, err = ask(capsys, server, monkeypatch, arguments, "--out", tmp_path / "c", "--max-cost", 1)
        assert code == 2
        assert "the price of tiny is not known" in err


def test_a_plan_sends_nothing(arguments, tmp_path, capsys, monkeypatch):
    with LoopbackJudge() as server:
        code, plan, _ = ask(capsys, server, monkeypatch, arguments, "--plan", "--price", "1,2")
        assert (code, plan["to_ask"], plan["known"], len(server.seen)) == (0, 120, 0, 0)
        assert plan["cost"] > 120 * 50 / 1e6
        ask(capsys, server, monkeypatch, arguments, "--out", tmp_path / "labels", "--max-requests", 20)
        code, plan, _ = ask(capsys, server, monkeypatch, arguments, "--plan")
        assert (plan["to_ask"], plan["known"], plan["cost"]) == (100, 20, None)


def test_killed_at_any_moment_nothing_delivered_is_paid_twice(world, index_folder, tmp_path):
    rng = random.Random(0)
    with LoopbackJudge(delay=0.02) as server:
        environment = {**os.environ, "OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": server.url}
        command = [
            sys.executable, "-m", "novelret", "label", "--data", world, "--index", index_folder, "--judge",
            "openai:tiny", "--prompt", "query-keyword", "--base-depth", "3", "--depth", "30", "--concurrency", "4",
            "--store", tmp_path / "store.sqlite", "--out", tmp_path / "labels", "--json",
        ]  # fmt: skip
        kills = 0
        for attempt in range(6):
            process = subprocess.Popen(
                list(map(str, command)), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
            begun = len(server.seen)
            deadline = time.time() + 60
            # Wait for its first request, then for a random moment of its asking.
            while len(server.seen) == begun and process.poll() is None and time.time() < deadline:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.4))
            process.send_signal(signal.SIGINT if attempt == 3 else signal.SIGKILL)
            out, err = process.communicate()
            assert KEY.encode() not in out + err
            kills += process.returncode != 0
        assert kills >= 3
        done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, check=True)
        facts = json.loads(done.stdout)
        assert facts["pairs"] == 20 * 27
        # A kill may cut off the requests under way, at most four each time; no other is billed twice.
        twice = sum(n - 1 for n in server.billed.values())
        assert twice <= 4 * 6
        assert len(server.billed) == 20 * 27
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes()


def test_memory_of_questions_is_bounded(monkeypatch, arguments, tmp_path, capsys):
    monkeypatch.setattr(questions_module, "CHUNK", 7)  # many chunks give the same labels
    with LoopbackJudge() as server:
        code, facts, _ = ask(capsys, server, monkeypatch, arguments, "--out", tmp_path / "labels")
        assert (code, facts["pairs"], facts["requests"]) == (0, 120, 120)
        assert set(server.billed.values()) == {1}


def test_eval_asks_for_what_no_one_has_judged_yet(
    arguments, world, index_folder, tmp_path, capsys, monkeypatch
):
    store = arguments[-1]
    with LoopbackJudge() as server:
        ask(capsys, server, monkeypatch, arguments, "--out", tmp_path / "labels")
        model = [
            "train", "--data", world, "--index", index_folder, "--labels", tmp_path / "labels", "--tune", "adapter",
            "--base-depth", 3, "--depth", 9, "--steps", 10, "--learning-rate", 0.05, "--max-recall-drop", 1,
            "--out", tmp_path / "model",
        ]  # fmt: skip
        code, _, err = ask(capsys, server, monkeypatch, list(map(str, model)))
        assert code == 0, err
        before = len(server.seen)
        evaluation = [
            "eval", "--data", str(world), "--index", str(index_folder), "--model", f"new={tmp_path / 'model'}",
            "--judge", "openai:tiny", "--prompt", "query-keyword", "--store", store, "--base-depth", "3",
            "--k", "2,5", "--out",
        ]  # fmt: skip
        code, found, err = ask(capsys, server, monkeypatch, [*evaluation, str(tmp_path / "report")])
        assert code == 0, err
        assert found["models"]["new"]["Judged@5"] == 1
        assert 0 < found["models"]["base"]["Precision@5"] < 1
        assert len(server.seen) > before
        assert "new was trained on labels of openai:tiny, which now judges it" in err
        rows = rows_of(tmp_path / "report")
        assert len({(row["query_id"], row["item_id"]) for row in rows}) == len(rows)
        assert all(row["verdict"] == expected_verdict(row, world) for row in rows)
        before = len(server.seen)
        code, again, _ = ask(capsys, server, monkeypatch, [*evaluation, str(tmp_path / "again")])
        assert (code, again["models"], len(server.seen)) == (0, found["models"], before)
        assert set(server.billed.values()) == {1}
