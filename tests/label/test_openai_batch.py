"""`label --judge openai-batch:…` against files and batches on loopback: nothing is paid for twice, ever."""

from __future__ import annotations

import json
import random
import re
import sqlite3
import time
from contextlib import closing

import openai
import pyarrow.parquet as pq
import pytest

from novelret.cli import main
from novelret.label import judge, ledger
from novelret.label.judges import openai_batch
from novelret.label.ledger import Ledger, Spending, Submission
from novelret.label.questions import Feed
from novelret.label.store import Store
from novelret.progress import Reporter
from tests import loopback
from tests.killing import start
from tests.loopback import LoopbackJudge

KEY = "sk-very-secret-0123456789"


@pytest.fixture
def arguments(world, index_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(openai_batch, "_POLL", 0.02)
    monkeypatch.setattr(openai_batch, "_PAUSE", 0.01)
    return [
        "label", "--data", str(world), "--index", str(index_folder), "--judge", "openai-batch:tiny",
        "--prompt", "query-keyword", "--base-depth", "3", "--depth", "9", "--store", str(tmp_path / "store.sqlite"),
    ]  # fmt: skip


@pytest.fixture
def ask(capsys, monkeypatch, arguments, tmp_path):
    def run(server, *more, out="labels"):
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        code = main([*arguments, *map(str, more), "--out", str(tmp_path / out), "--json", "--quiet"])
        captured = capsys.readouterr()
        assert KEY not in captured.out + captured.err
        return code, (json.loads(captured.out) if captured.out else None), captured.err

    return run


def rows_of(folder):
    return pq.read_table(folder / "judgements.parquet").to_pylist()


def test_every_pair_is_judged_once_in_files_within_the_limits(ask, tmp_path, monkeypatch):
    monkeypatch.setattr(openai_batch, "MAX_REQUESTS", 50)
    monkeypatch.setattr(openai_batch, "MAX_BYTES", 20_000)
    with LoopbackJudge(batch_delay=0.1) as server:
        code, facts, err = ask(server, "--price", "1,2")
        assert code == 0, err
        assert (facts["pairs"], facts["requests"], len(server.billed)) == (120, 120, 120)
        assert set(server.billed.values()) == {1}
        inputs = [server.files[batch["input_file_id"]] for batch in server.batches.values()]
        assert len(inputs) >= 3
        assert all(len(data) <= 20_000 and data.count(b"\n") <= 50 for data in inputs)
        assert max(len(data) for data in inputs) > 10_000
        assert facts["cost"] == pytest.approx(120 * (50 + 2 * 2) / 1e6)
        assert server.seen[0]["temperature"] == 0
        # The same question asked the other way is known already, and the other way round.
        code, facts, _ = ask(server, "--judge", "openai:tiny", "--depth", 11, out="b")
        assert (code, facts["requests"], facts["already_known"]) == (0, 40, 120)
        code, facts, _ = ask(server, "--depth", 11, out="c")
        assert (code, facts["requests"], facts["already_known"]) == (0, 0, 160)
    same = {(r["query_id"], r["item_id"]): r["verdict"] for r in rows_of(tmp_path / "labels")}
    assert len(same) == 120
    assert set(same.values()) == {0, 1}


def test_submit_leave_come_back_collect(ask, tmp_path):
    with LoopbackJudge(batch_delay=60) as server:
        code, facts, _ = ask(server, "--no-wait")
        assert (code, facts) == (3, {"labels": None, "batches": 1, "requests_under_way": 120})
        assert not (tmp_path / "labels").exists()
        code, facts, _ = ask(server, "--no-wait")
        assert (code, facts["requests_under_way"], len(server.batches)) == (3, 120, 1)
        # More pairs, half of them under way: only the rest is submitted.
        plan = ask(server, "--plan", "--depth", 11)[1]
        assert (plan["in_batches"], plan["to_ask"], plan["known"]) == (120, 40, 0)
        code, facts, _ = ask(server, "--no-wait", "--depth", 11, out="deeper")
        assert (code, facts["requests_under_way"], len(server.batches)) == (3, 160, 2)
        for batch in server.batches.values():
            batch["due"] = 0
        code, facts, err = ask(server, "--no-wait")
        assert (code, facts["pairs"], facts["failed"]) == (0, 120, 0), err
        code, facts, _ = ask(server, "--no-wait", "--depth", 11, out="deeper")
        assert (code, facts["pairs"], len(server.batches)) == (0, 160, 2)
        assert set(server.billed.values()) == {1}


def test_what_lies_in_a_batch_is_not_asked_directly(ask, tmp_path):
    with LoopbackJudge(batch_delay=60) as server:
        ask(server, "--no-wait", out="batch")
        code, facts, err = ask(server, "--judge", "openai:tiny", "--depth", 11)
        assert (code, facts["pairs"], facts["requests"], len(server.seen)) == (1, 40, 40, 40), err
        assert "120 questions lie in batches under way, to be collected by the command" in " ".join(
            err.split()
        )
        for batch in server.batches.values():
            batch["due"] = 0
        assert ask(server, "--no-wait", out="batch")[1]["pairs"] == 120
        code, facts, err = ask(server, "--judge", "openai:tiny", "--depth", 11)
        assert (code, facts["pairs"], facts["requests"]) == (0, 160, 0), err
        assert set(server.billed.values()) == {1}


def test_what_is_asked_directly_lies_in_no_batch(ask, arguments, tmp_path):
    with LoopbackJudge(delay=0.03) as server:
        environment = {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": server.url}
        direct = [
            *arguments,
            "--judge",
            "openai:tiny",
            "--concurrency",
            "3",
            "--out",
            str(tmp_path / "direct"),
        ]
        process = start(direct, environment, tmp_path / "log", {})
        deadline = time.time() + 180
        while len(server.seen) < 20 and process.is_alive() and time.time() < deadline:
            time.sleep(0.002)
        code, facts, err = ask(server)
        process.join()
        # What the batch holds by then is left to it; then the direct labels are not whole.
        assert (code, process.exitcode in (0, 1)) == (0, True), err + (tmp_path / "log").read_text()
        assert (facts["pairs"], len(server.billed), len(server.batches)) == (120, 120, 1)
        assert set(server.billed.values()) == {1}


def test_equal_questions_lie_in_no_file_twice(ask, monkeypatch):
    """Met again so much later that those of before are long in a file."""
    real = Feed.unanswered
    monkeypatch.setattr(Feed, "unanswered", lambda *a: (q for _ in range(2) for q in real(*a)))
    with LoopbackJudge() as server:
        code, facts, err = ask(server)
        assert (code, facts["requests"], set(server.billed.values())) == (0, 120, {1}), err


def test_expired_and_failed_requests_are_submitted_again_alone(ask, tmp_path):
    with LoopbackJudge(batch_faults=["expired", "errors"]) as server:
        code, facts, err = ask(server)
        assert code == 0, err
        sizes = [server.files[b["input_file_id"]].count(b"\n") for b in server.batches.values()]
        # 60 expired; of these 20 were answered, 20 refused for good and 20 failed for now.
        assert sizes == [120, 60, 20]
        assert (facts["pairs"], facts["failed"], facts["retries"]) == (100, 20, 80)
        assert set(server.billed.values()) == {1}
        failures = [json.loads(line) for line in (tmp_path / "labels" / "failures.jsonl").open()]
        assert len(failures) == 20
        assert failures[0]["reason"] == "content filtered"
        code, facts, _ = ask(server, "--force")
        assert (code, facts["pairs"], facts["requests"]) == (0, 120, 20)
        assert set(server.billed.values()) == {1}


def test_what_expires_again_and_again_is_listed(ask):
    with LoopbackJudge(batch_faults=["expired"] * 3) as server:
        code, facts, err = ask(server)
        assert (code, facts["pairs"], facts["failed"], len(server.batches)) == (0, 105, 15, 3)
        assert "no answer in 3 batches" in err
        code, facts, _ = ask(server, "--force")
        assert (code, facts["pairs"], facts["requests"]) == (0, 120, 15)


def test_failures_are_remembered_while_others_are_under_way(ask, monkeypatch):
    monkeypatch.setattr(openai_batch, "MAX_REQUESTS", 60)
    with LoopbackJudge(batch_faults=["errors", "errors"]) as server:
        ask(server, "--no-wait")
        server.batch_delay = 60
        code, facts, _ = ask(server, "--no-wait")  # collects both; what failed for now is under way again
        assert (code, facts["requests_under_way"]) == (3, 40)
        for batch in server.batches.values():
            batch["due"] = 0
        code, facts, _ = ask(server, "--no-wait")
        assert (code, facts["pairs"], facts["failed"], len(server.batches)) == (0, 80, 40, 3)


def test_a_lost_answer_to_a_submission_does_not_submit_twice(ask):
    with LoopbackJudge(batch_faults=["create-cut", None]) as server:
        code, facts, err = ask(server)
        assert (code, facts["pairs"], len(server.batches)) == (0, 120, 1), err
        assert set(server.billed.values()) == {1}
    with LoopbackJudge(batch_faults=["create-500"] * 2) as server:
        code, facts, err = ask(server, "--depth", 12, out="b")
        assert (code, facts["requests"], len(server.batches)) == (0, 60, 1), err


def test_files_after_one_that_could_not_be_sent_are_sent_later(ask, monkeypatch):
    """The answer to a submission is lost, and so is the look whether it arrived."""
    monkeypatch.setattr(openai_batch, "MAX_REQUESTS", 50)
    monkeypatch.setattr(openai_batch, "_POLL", 0.02)
    find, lost = openai_batch._find, []

    def away(run, submission):
        if not lost:
            lost.append(submission)
            raise openai.APIConnectionError(request=None)
        return find(run, submission)

    monkeypatch.setattr(openai_batch, "_find", away)
    with LoopbackJudge(batch_faults=["create-cut"]) as server:
        code, facts, err = ask(server)
        assert (code, facts["pairs"], len(server.batches), len(lost)) == (0, 120, 3, 1), err
        assert set(server.billed.values()) == {1}


def test_a_reason_that_holds_half_an_emoji_does_not_block_the_store(ask):
    with LoopbackJudge(batch_faults=["errors"]) as server:
        server.filtered = "not allowed: grey settee \ud83d"
        code, facts, err = ask(server)
        assert (code, facts["pairs"], facts["failed"]) == (0, 80, 40), err
        assert facts["failure_example"].endswith("not allowed: grey settee ?")


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_kill_around_a_submission_is_made_good(ask, monkeypatch, moment):
    real = Ledger.record if moment == "after" else Ledger.begin

    def killed(self, *arguments):
        if moment == "before":
            real(self, *arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(openai_batch, "MAX_REQUESTS", 50)
    with LoopbackJudge() as server, monkeypatch.context() as patched:
        patched.setattr(Ledger, real.__name__, killed)
        code, _, _ = ask(server)
        assert (code, len(server.batches)) == (130, 1 if moment == "after" else 0)
        patched.undo()
        monkeypatch.setattr(openai_batch, "_POLL", 0.02)
        for _ in range(3):  # older than others: not on the list's first page
            server.batches[f"other_{len(server.batches)}"] = {"id": f"other_{len(server.batches)}", "status": "completed",
                "object": "batch", "endpoint": "", "input_file_id": "", "completion_window": "", "created_at": 0}  # fmt: skip
        code, facts, err = ask(server)
        assert (code, facts["pairs"]) == (0, 120), err
        assert set(server.billed.values()) == {1}
        ours = [b for b in server.batches if b.startswith("batch_")]
        assert len(ours) == 3


@pytest.mark.parametrize("made_at", ["here", "elsewhere"])
def test_a_kill_before_an_endpoint_without_batches_was_reached(ask, monkeypatch, made_at):
    """Nothing is held for ever there; what may lie at another endpoint is."""
    real = Ledger.begin

    def killed(self, *arguments):
        real(self, *arguments)
        raise KeyboardInterrupt

    with LoopbackJudge(batches=False) as server, LoopbackJudge() as other:
        with monkeypatch.context() as patched:
            patched.setattr(Ledger, "begin", killed)
            assert ask(server if made_at == "here" else other)[0] == 130
        code, _, err = ask(server)
        assert (code, len(err.strip().splitlines())) == (2, 1)
        code, facts, _ = ask(server, "--judge", "openai:tiny", "--plan")
        if made_at == "here":
            assert f"{server.url}/files: Error code: 404" in err
            assert "--judge openai:tiny" in err
            assert (code, facts["to_ask"]) == (0, 120)
        else:
            assert f"were being submitted to {other.url} when that was interrupted" in err
            assert ask(other)[0] == 0
            assert set(other.billed.values()) == {1}


def test_another_process_that_submits_for_long_is_waited_for(ask, tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "_LOCK_WAIT", 0.02)
    path = tmp_path / "store.sqlite.lock"
    with LoopbackJudge() as server, closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        code, _, err = ask(server, "--no-wait")
        assert (code, len(err.strip().splitlines())) == (2, 1)
        assert "another novelret submits batches with this store" in err
        looks = []

        def sleep(_):
            looks.append(len(server.batches))
            if len(looks) == 3:
                other.execute("COMMIT")

        monkeypatch.setattr(openai_batch.time, "sleep", sleep)
        code, facts, err = ask(server)
        assert (code, facts["pairs"], looks[:3]) == (0, 120, [0, 0, 0]), err


def test_a_crowded_endpoint_is_waited_for(ask, monkeypatch):
    monkeypatch.setattr(openai_batch, "MAX_REQUESTS", 60)
    with LoopbackJudge(batch_faults=[None, "crowded"], batch_delay=0.3) as server:
        code, facts, err = ask(server)
        assert (code, facts["pairs"]) == (0, 120), err
        made = [batch["made"] for batch in server.batches.values()]
        assert len(made) == 3
        assert made[2] - made[0] > 0.3  # not before the first was done
        assert set(server.billed.values()) == {1}


def test_batches_become_smaller_until_they_fit(ask):
    with LoopbackJudge(batch_delay=0.1) as server:
        server.room = 40
        code, facts, err = ask(server)
        assert (code, facts["pairs"], facts["requests"], facts["stopped"]) == (0, 120, 120, None), err
        assert sizes_of(server) == [120, 60, 30, 30, 30, 30]
        assert set(server.billed.values()) == {1}
    with LoopbackJudge() as server:
        server.room = 0
        code, _, err = ask(server, "--depth", 15, out="b")
        assert (code, len(err.strip().splitlines())) == (2, 1)
        assert "was refused: token_limit_exceeded" in err
        assert sizes_of(server) == [120, 60, 30, 15, 7, 3, 1]
        server.room = 60
        for _ in range(2):  # a refusal is seen when the command is run again
            assert ask(server, "--depth", 15, "--no-wait", out="b")[0] == 3
        code, facts, _ = ask(server, "--depth", 15, out="b")
        assert (code, facts["pairs"], facts["requests"]) == (0, 240, 120)
        assert sizes_of(server)[7:] == [120, 60, 60]


def sizes_of(server):
    return [server.files[batch["input_file_id"]].count(b"\n") for batch in server.batches.values()]


def test_a_fault_after_a_batch_was_collected_leaves_nothing_unasked(ask, tmp_path, monkeypatch):
    """What the caps held back has room now, whatever the look at another run's batch came to."""
    monkeypatch.setattr(judge, "parameters_for", lambda *_: {"max_tokens": 100})
    monkeypatch.setattr(openai_batch, "_RETRIES", 0)
    with LoopbackJudge() as server, closing(Store(tmp_path / "store.sqlite")) as store:
        other = Ledger(store, "openai:tiny")

        def sleep(_):
            if "batch_theirs" not in server.batches:
                other.begin(Submission("theirs", None, 1, 0.0, "their run", None), [b"theirs"])
                other.record("theirs", "batch_theirs")
                server.batches["batch_theirs"] = {
                    "id": "batch_theirs", "object": "batch", "status": "in_progress", "due": time.time() + 3600,
                    "metadata": {"novelret": "theirs"}, "fault": "look-500", "made": 0,
                }  # fmt: skip

        monkeypatch.setattr(openai_batch.time, "sleep", sleep)
        code, facts, err = ask(server, "--price", "0,1000", "--max-cost", 1)
        assert server.batches["batch_theirs"]["fault"] is None
        assert (code, facts["requests"], facts["stopped"]) == (0, 120, None), err


def test_a_cancelled_batch_ends_the_asking(ask, monkeypatch):
    with LoopbackJudge(batch_delay=60) as server:
        assert ask(server, "--no-wait", "--max-requests", 100)[1]["requests_under_way"] == 100
        server.batches["batch_0"]["status"] = "cancelling"
        assert ask(server, "--no-wait")[1]["requests_under_way"] == 100
        server.batches["batch_0"] |= {"status": "in_progress", "fault": "cancelled", "due": 0}
        code, facts, err = ask(server)
        assert (code, facts["pairs"], facts["requests"], len(server.batches)) == (1, 50, 50, 1), err
        assert facts["stopped"] == "batch batch_0 was cancelled at the endpoint"
        assert "was cancelled at the endpoint; 70 pairs are not judged" in " ".join(err.split())
        server.batch_delay = 0
        code, facts, err = ask(server)  # goes on
        assert (code, facts["pairs"], facts["requests"], facts["stopped"]) == (0, 120, 70, None), err
        assert set(server.billed.values()) == {1}
    monkeypatch.setattr(openai_batch, "MAX_REQUESTS", 50)
    with LoopbackJudge(batch_faults=["cancelled"], batch_delay=0.1) as server:  # the others are collected
        code, facts, err = ask(server, "--depth", 15, out="b")
        assert (code, facts["requests"], sizes_of(server)) == (1, 95, [50, 50, 20]), err
        assert facts["stopped"] == "batch batch_0 was cancelled at the endpoint"


@pytest.mark.parametrize("fault", ["bad", "crowded", "cancelled"])
def test_what_went_wrong_with_another_runs_batch_is_told_to_that_run(ask, fault):
    with LoopbackJudge(batch_faults=[fault]) as server:
        assert ask(server, "--no-wait", "--prompt", "query-document", out="theirs")[0] == 3
        code, facts, err = ask(server)
        assert (code, facts["pairs"], facts["requests"], len(server.batches)) == (0, 120, 120, 2), err
        code, facts, err = ask(server, "--prompt", "query-document", out="theirs")
        if fault == "bad":
            assert (code, "was refused: model_not_found" in err) == (2, True)
        elif fault == "crowded":
            assert (code, facts["pairs"], sizes_of(server)) == (0, 120, [120, 120, 60, 60]), err
        else:
            assert (code, facts["pairs"], facts["stopped"] is None) == (1, 60, False), err


def test_questions_of_another_runs_refused_batch_are_asked(ask):
    with LoopbackJudge(batch_faults=["bad"]) as server:
        assert ask(server, "--no-wait", out="theirs")[0] == 3
        code, facts, err = ask(server, "--no-wait", "--depth", 11)
        assert (code, facts["requests_under_way"]) == (3, 120), err  # the other 40 are answered
        code, facts, err = ask(server, "--no-wait", "--depth", 11)
        assert (code, facts["pairs"], sizes_of(server)) == (0, 160, [120, 40, 120]), err
        code, facts, err = ask(server, out="theirs")
        assert (code, facts["pairs"], len(server.batches)) == (0, 120, 3), err


def test_another_runs_file_that_breaks_off_stops_only_that_run(ask, monkeypatch):
    said = []
    monkeypatch.setattr(Reporter, "note", lambda self, text: said.append(text))
    with LoopbackJudge() as server:
        assert ask(server, "--no-wait", "--prompt", "query-document", out="theirs")[0] == 3
        server.shown("batch_0")
        name = server.batches["batch_0"]["output_file_id"]
        server.files[name] = server.files[name][:-9]
        code, facts, err = ask(server)
        assert (code, facts["pairs"], facts["requests"]) == (0, 120, 120), err
        assert [text for text in said if "of another run" in text] == [
            f"a batch of another run is left to that run: OddReply: file {name} breaks off"
        ]
        code, _, err = ask(server, "--no-wait", "--prompt", "query-document", out="theirs")
        assert (code, f"file {name} breaks off" in err) == (2, True)


def test_refusals_are_one_line_and_leave_nothing_under_way(ask):
    for fault, words in [("bad", "model_not_found"), ("create-refused", "no such model")]:
        with LoopbackJudge(batch_faults=[fault]) as server:
            code, _, err = ask(server)
            assert (code, len(err.strip().splitlines())) == (2, 1)
            assert words in err
            assert ask(server, "--plan")[1]["to_ask"] == 120
    with LoopbackJudge() as server:
        code, facts, _ = ask(server)
        assert (code, facts["pairs"], len(server.batches)) == (0, 120, 1)


def test_another_endpoint_does_not_know_the_batch(ask):
    with LoopbackJudge(batch_delay=60) as server:
        ask(server, "--no-wait")
        first = server.url
    with LoopbackJudge() as server:
        code, _, err = ask(server)
        assert (code, len(err.strip().splitlines())) == (2, 1)
        assert f"{server.url} does not know batch_0, submitted before to {first} with 120 questions" in err
        # It is in nobody else's way.
        code, facts, err = ask(server, "--prompt", "query-document", out="other")
        assert (code, facts["pairs"], facts["requests"]) == (0, 120, 120), err


def test_caps_count_what_is_under_way(ask):
    with LoopbackJudge(batch_delay=60) as server:
        code, facts, _ = ask(server, "--no-wait", "--max-requests", 30)
        assert (code, facts["requests_under_way"]) == (3, 30)
        code, facts, _ = ask(server, "--no-wait", "--max-requests", 40)
        assert (code, facts["requests_under_way"]) == (3, 40)
        for batch in server.batches.values():
            batch["due"] = 0
        code, facts, err = ask(server, "--max-requests", 40)
        assert (code, facts["pairs"], facts["requests"]) == (0, 40, 40)
        assert "--max-requests 40 reached; 80 pairs are not judged" in err
    with LoopbackJudge() as server:
        code, facts, _ = ask(server, "--max-cost", 0.004, "--price", "1,2", out="b")
        assert code == 0
        assert 0 < facts["requests"] < 80
        assert facts["cost"] <= 0.004


def test_each_run_pays_for_what_it_submitted_whoever_collects_it(ask, tmp_path):
    with LoopbackJudge() as server:
        one = ["--max-requests", 70, "--price", "10,30"]
        assert ask(server, "--no-wait", *one, out="a")[1]["requests_under_way"] == 70
        # Another run collects that too; its own cap counts its own.
        code, facts, err = ask(server, "--from", "base-top", "--max-requests", 40, out="b")
        assert (code, facts["pairs"], facts["requests"], facts["earlier"]["requests"]) == (0, 40, 40, 0), err
        code, facts, err = ask(server, *one, out="a")
        assert (code, facts["pairs"], facts["requests"]) == (0, 70, 70), err
        assert facts["cost"] == pytest.approx(70 * 560e-6)
        assert facts["prompt_tokens"] == 70 * 50
        assert set(server.billed.values()) == {1}
        assert len(server.billed) == 110
        # It was counted once.
        code, facts, _ = ask(server, "--max-requests", 75, out="a")
        assert (code, facts["requests"], facts["earlier"]["requests"]) == (0, 5, 70)


def test_batches_that_an_older_novelret_submitted_are_collected(ask, tmp_path):
    with LoopbackJudge() as server:
        ask(server, "--no-wait")
        with closing(sqlite3.connect(tmp_path / "store.sqlite")) as store:
            store.executescript(
                "ALTER TABLE submissions DROP COLUMN run; ALTER TABLE submissions DROP COLUMN endpoint; DROP TABLE spent;"
            )
        code, facts, err = ask(server)
        assert (code, facts["pairs"], facts["requests"], len(server.batches)) == (0, 120, 120, 1), err


def test_a_kill_while_waiting_forgets_no_spending(arguments, tmp_path):
    patches = {
        "novelret.label.judges.openai_batch": {"MAX_REQUESTS": 60, "_POLL": 0.02},
        "novelret.label.asking": {"_NOTED": 3600.0},
    }
    with LoopbackJudge(batch_delay=60) as server:
        environment = {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": server.url}
        process = start(
            [*arguments, "--out", str(tmp_path / "labels")], environment, tmp_path / "log", patches
        )
        note, deadline = tmp_path / "labels.partial" / "asking.json", time.time() + 180
        while not note.exists() and process.is_alive() and time.time() < deadline:
            if len(server.batches) == 2:
                server.batches["batch_0"]["due"] = 0
            time.sleep(0.01)
        process.kill()
        process.join()
        assert json.loads(note.read_text())["requests"] == 60


def test_what_no_cap_has_room_for_comes_with_the_next_batch(ask, monkeypatch):
    """An answer may be long and is short: the money of what cost less is spent as well."""
    monkeypatch.setattr(judge, "parameters_for", lambda *_: {"max_tokens": 100})
    with LoopbackJudge() as server:
        more = ["--price", "0,1000", "--max-cost"]
        code, facts, err = ask(server, *more, 1)  # 0.1 dollars at most and 0.002 in fact
        assert (code, facts["requests"], facts["stopped"]) == (0, 120, None), err
        assert len(server.batches) > 5
        code, facts, _ = ask(server, *more, 0.151, "--from", "base-top", out="b")
        assert (code, facts["stopped"], facts["requests"]) == (0, "--max-cost 0.151 reached", 26)
        assert set(server.billed.values()) == {1}


def test_a_higher_cap_goes_on_with_what_is_not_judged(ask):
    with LoopbackJudge() as server:
        code, facts, _ = ask(server, "--max-requests", 30)
        assert (code, facts["pairs"], facts["stopped"]) == (0, 30, "--max-requests 30 reached")
        code, _, err = ask(server, "--max-requests", 30)
        assert (code, "--max-requests 30 is reached already" in err) == (2, True)
        server.batch_delay = 60
        code, facts, _ = ask(server, "--max-requests", 50, "--no-wait")
        assert (code, facts["requests_under_way"]) == (3, 20)
        for batch in server.batches.values():
            batch["due"] = 0
        code, facts, err = ask(server, "--max-requests", 50, "--no-wait")
        assert (code, facts["pairs"], facts["requests"], facts["earlier"]["requests"]) == (0, 50, 20, 30), err
        assert set(server.billed.values()) == {1}


def test_replies_without_text_are_answers(ask, monkeypatch):
    monkeypatch.setattr("tests.loopback.verdict", lambda user: None if "red" in user else "Yes")
    with LoopbackJudge() as server:
        code, facts, err = ask(server, "--price", "1,2")
        assert (code, facts["pairs"], facts["requests"], len(server.batches)) == (0, 120, 120, 1), err
        assert 0 < facts["verdicts"]["unusable"] < 120
        assert set(server.billed.values()) == {1}


def test_answers_none_of_which_is_usable_stop_further_batches(ask, monkeypatch):
    monkeypatch.setattr("tests.loopback.verdict", lambda user: "Perhaps.")
    with LoopbackJudge(batch_faults=["expired"]) as server:
        code, _, err = ask(server)
        assert (code, server.billed.total(), len(server.batches)) == (2, 60, 1), err
        assert "none of the first 50 answers is usable, for instance 'Perhaps.'" in err


def test_answers_none_of_which_is_usable_are_an_error_where_all_were_asked_for(ask, monkeypatch):
    monkeypatch.setattr("tests.loopback.verdict", lambda user: "Perhaps.")
    with LoopbackJudge() as server:
        code, _, err = ask(server)
        assert (code, set(server.billed.values())) == (2, {1}), err
        assert "none of the first 50 answers is usable, for instance 'Perhaps.'" in err


def test_an_answer_may_hold_any_character(ask, tmp_path, monkeypatch):
    answer = "Yes\u2028because\x85it\u2029fits\x0b\x1c"
    monkeypatch.setattr("tests.loopback.verdict", lambda user: answer)
    with LoopbackJudge() as server:
        _write_as_it_is(server)
        code, facts, err = ask(server)
        assert (code, facts["requests"], facts["retries"]) == (0, 120, 0), err
        assert {row["answer"] for row in rows_of(tmp_path / "labels")} == {answer}
        assert set(server.billed.values()) == {1}


def test_lines_that_cannot_be_read_are_paid_for(ask):
    with LoopbackJudge() as server:
        _write_as_it_is(server, broken=5)
        code, facts, err = ask(server, "--max-requests", 120, "--price", "0,1000")
        assert (code, facts["requests"], facts["pairs"], len(server.billed)) == (0, 120, 115, 120), err
        assert facts["cost"] == pytest.approx((115 * 2 + 5 * 5) * 1000 / 1e6)
        assert facts["stopped"] == "--max-requests 120 reached"


def _write_as_it_is(server, broken=0):
    """Have batch files written without escapes, as some endpoints do, and some of their lines cut in half."""
    real = server.work_off

    def work_off(batch):
        real(batch)
        lines = [json.loads(line) for line in server.files[batch["output_file_id"]].split(b"\n") if line]
        texts = [json.dumps(line, ensure_ascii=False) for line in lines]
        texts[:broken] = [text[: len(text) // 2] for text in texts[:broken]]
        server.files[batch["output_file_id"]] = "\n".join(texts).encode()

    server.work_off = work_off


def test_what_an_endpoint_does_not_bill_costs_the_most_it_can(ask, monkeypatch):
    real = loopback.completion

    def without_usage(choices):
        return json.dumps({name: part for name, part in json.loads(real(choices)).items() if name != "usage"})

    monkeypatch.setattr(loopback, "completion", without_usage)
    with LoopbackJudge() as server:  # an answer may have five tokens
        tokens = ask(server, "--plan")[1]["prompt_tokens"]
        code, facts, err = ask(server, "--price", "1,1000")
        assert (code, facts["requests"]) == (0, 120), err
        assert facts["cost"] == pytest.approx(tokens / 1e6 + 120 * 5 * 1000 / 1e6, abs=1e-6)


def test_unusable_answers_are_asked_again_once(ask, monkeypatch):
    monkeypatch.setattr("tests.loopback.verdict", lambda user: "No" if "red" in user else "Perhaps.")
    with LoopbackJudge() as server:
        code, facts, _ = ask(server)
        unusable = facts["verdicts"]["unusable"]
        assert (code, facts["unusable_examples"]) == (0, ["Perhaps."])
        assert 0 < facts["verdicts"]["not relevant"] == 120 - unusable < 120
        code, facts, _ = ask(server, "--retry-unusable", "--force")
        assert (code, facts["requests"], sorted(set(server.billed.values()))) == (0, unusable, [1, 2])
        monkeypatch.setattr("tests.loopback.verdict", lambda user: "Yes")
        code, facts, _ = ask(server, "--retry-unusable", "--force")
        assert (code, facts["verdicts"]["relevant"], server.billed.total()) == (
            0,
            unusable,
            120 + 2 * unusable,
        )
        code, facts, _ = ask(server, "--retry-unusable", "--force")
        assert (code, facts["requests"]) == (0, 0)


def test_killed_at_random_moments_no_pair_is_submitted_twice(world, index_folder, tmp_path):
    rng = random.Random(1)
    patches = {"novelret.label.judges.openai_batch": {"MAX_REQUESTS": 60, "_POLL": 0.05}}
    with LoopbackJudge(batch_delay=0.2) as server:
        environment = {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": server.url}
        command = [
            "label", "--data", world, "--index", index_folder, "--judge", "openai-batch:tiny", "--prompt", "query-keyword",
            "--base-depth", 3, "--depth", 30, "--store", tmp_path / "store.sqlite", "--out", tmp_path / "labels",
        ]  # fmt: skip
        command, log, kills = list(map(str, command)), tmp_path / "log", 0
        for _ in range(10):
            process = start(command, environment, log, patches)
            begun, deadline = len(server.files), time.time() + 180
            while len(server.files) == begun and process.is_alive() and time.time() < deadline:
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.15))
            process.kill()
            process.join()
            kills += process.exitcode == -9
        assert kills >= 5
        process = start([*command, "--force"], environment, log, patches)
        process.join()
        assert process.exitcode == 0, log.read_text()
        assert len(rows_of(tmp_path / "labels")) == 20 * 27
        assert set(server.billed.values()) == {1}
        assert len(server.billed) == 20 * 27
        lines = [server.files[b["input_file_id"]].splitlines() for b in server.batches.values()]
        asked = [json.loads(line)["custom_id"] for part in lines for line in part]
        assert len(asked) == len(set(asked)) == 20 * 27
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes()


def test_a_batch_whose_answers_are_gone_does_not_block_the_store(ask, tmp_path):
    with LoopbackJudge(batch_delay=60) as server:
        assert ask(server, "--no-wait", "--price", "1,2")[0] == 3
        batch = next(iter(server.batches.values()))
        batch["due"] = 0
        server.shown("batch_0")
        del server.files[batch["output_file_id"]]
        code, _, err = ask(server, "--price", "1,2", "--max-requests", 200)
        assert code == 2
        assert "the endpoint no longer holds the answers of batch batch_0" in err
        server.batch_delay = 0
        # They are paid for, so the cap counts them, and it is for the user to have them asked again.
        code, facts, err = ask(server, "--price", "1,2", "--max-requests", 200)
        assert (code, facts["pairs"], facts["stopped"]) == (0, 80, "--max-requests 200 reached"), err
        code, facts, err = ask(server, "--price", "1,2", "--max-requests", 240, "--force")
        assert (code, facts["pairs"]) == (0, 120), err


def test_what_breaks_off_or_is_no_batch_is_looked_at_again(ask):
    with LoopbackJudge() as server:
        server.html_pages = 2
        server.cut_files.extend(["in", "after", "in", "after"])
        code, facts, err = ask(server)
        assert (code, facts["pairs"], facts["requests"]) == (0, 120, 120), err
        assert (len(server.cut_files), server.html_pages, len(server.batches)) == (0, 0, 1)
        assert set(server.billed.values()) == {1}


def test_room_that_another_process_makes_is_noticed(ask, tmp_path, monkeypatch):
    monkeypatch.setattr(openai_batch, "_POLL", 0.0)
    with (
        LoopbackJudge(batch_faults=["crowded"]) as server,
        closing(Store(tmp_path / "store.sqlite")) as store,
    ):
        other = Ledger(store, "openai:tiny")
        other.begin(Submission("theirs", "batch_theirs", 1, 0.0, "their run", None), [b"theirs"])
        server.batches["batch_theirs"] = {
            "id": "batch_theirs", "object": "batch", "status": "in_progress", "due": time.time() + 3600,
            "metadata": {"novelret": "theirs"}, "fault": None, "made": 0,
        }  # fmt: skip
        looks = []

        def sleep(_):
            looks.append(len(server.batches))
            assert len(looks) < 50
            if len(looks) == 5:
                other.settle("theirs", [b"theirs"], {}, "their run", Spending(1, 1, 1, 0.0))

        monkeypatch.setattr(openai_batch.time, "sleep", sleep)
        code, facts, err = ask(server)
        assert (code, facts["pairs"]) == (0, 120), err
        assert looks[:5] == [2] * 5


def test_answers_to_another_prompt_say_nothing_about_this_one(ask, tmp_path):
    with LoopbackJudge(batch_delay=60) as server:
        assert ask(server, "--no-wait", "--prompt", "query-document", out="other")[0] == 3
        batch = server.batches["batch_0"]
        batch["due"] = 0
        server.shown("batch_0")
        name = batch["output_file_id"]
        server.files[name] = re.sub(rb'"content": "[^"]*"', b'"content": "Who knows"', server.files[name])
        server.batch_delay = 0
        code, facts, err = ask(server)
        assert (code, facts["pairs"], facts["verdicts"]["unusable"]) == (0, 120, 0), err
