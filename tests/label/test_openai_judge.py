"""`label --judge openai:…` against a real HTTP server on loopback: money, faults, kills, keys."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import signal
import socket
import sqlite3
import time
import types
from collections import Counter
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import openai
import pyarrow.parquet as pq
import pytest

from novelret.artifacts import Manifest, put_aside
from novelret.build import IndexConfig, build_index
from novelret.cli import main
from novelret.endpoint import check_key, hide_secrets, may_be_answered
from novelret.label import judge, label
from novelret.label import questions as questions_module
from novelret.label.asking import spent_on
from novelret.label.claims import Claims
from novelret.label.cost import Price
from novelret.label.judges import endpoint
from novelret.label.judges import openai as judge_module
from novelret.label.label import LabelConfig, build_labels
from novelret.label.ledger import Ledger
from novelret.label.questions import Question, Tally
from novelret.label.store import Store, key_function
from tests.conftest import make_world
from tests.killing import start
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
    "fault", ["408", "429", "429-retry-after", "500", "cut", "malformed", "empty", "html", "slow"]
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


def test_white_space_around_the_url_is_cut_off(arguments, tmp_path, capsys, monkeypatch):
    """As a file or a secret has it."""
    with LoopbackJudge() as server:
        monkeypatch.setattr(LoopbackJudge, "url", f" http://127.0.0.1:{server.server.server_port}/v1\r\n")
        code, facts, err = ask(capsys, server, monkeypatch, arguments, "--out", tmp_path / "labels")
        assert (code, facts["pairs"]) == (0, 120), err


def test_equal_questions_that_another_process_left_are_asked_once(tmp_path, monkeypatch):
    monkeypatch.setattr(judge_module, "_OTHERS", 0)
    with closing(Store(tmp_path / "s")) as store, closing(Store(tmp_path / "s")) as other:
        theirs, ours = Claims(other), Claims(store)
        question, count = Question(b"k" * 16, [{"role": "user", "content": "x"}]), []
        theirs.take([question.key])
        asking = judge_module._Asking(
            "m",
            {},
            len,
            lambda _: (1, None),
            store,
            ours,
            Ledger(store, "openai:m"),
            judge_module.Limits(),
            Tally(),
            print,
        )
        rest = judge_module._ours(asking, iter([question, None, question, None]), count.append)
        found = [next(rest), next(rest), next(rest)]
        assert found == [None, None, None]
        theirs.__exit__(None, None, None)  # it was stopped by a cap
        assert [question for question in rest if question] == [question]
        assert sum(count) == 1
        ours.__exit__(None, None, None)


def test_what_was_spent_without_a_price_counts_at_the_price_that_is_known_now():
    facts = {"requests": 10, "prompt_tokens": 1000, "completion_tokens": 20, "cost": None}
    labels = Manifest("labels", {}, {}, "f", facts)
    assert spent_on(labels) == {"requests": 10, "cost": 0.0}
    assert spent_on(labels, Price(2, 8)) == {"requests": 10, "cost": 0.00216}
    assert spent_on(replace(labels, facts=facts | {"cost": 0.5}), Price(2, 8))["cost"] == 0.5


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


@pytest.mark.parametrize("reply", ["filtered", "length"])
def test_a_reply_without_text_is_paid_for_and_counts(arguments, tmp_path, capsys, monkeypatch, reply):
    with LoopbackJudge(always=reply) as server:
        more = ["--max-requests", 40, "--max-cost", 1, "--price", "10,30", "--concurrency", 7]
        code, facts, err = ask(capsys, server, monkeypatch, arguments, *more, "--out", tmp_path / "a")
        assert (code, facts["requests"], server.delivered) == (0, 40, 40), err
        assert facts["cost"] == pytest.approx(40 * (50 * 10 + 2 * 30) / 1e6)
        assert (facts["verdicts"]["unusable"], facts["retries"], facts["failed"]) == (40, 0, 0)
        assert "40 answers are not usable, for instance no text at all" in err
        assert {row["answer"] for row in rows_of(tmp_path / "a")} == {""}
        # The cap on dollars holds as well.
        more = ["--max-cost", 0.005, "--price", "10,30", "--out", tmp_path / "b"]
        code, facts, _ = ask(capsys, server, monkeypatch, arguments, *more)
        assert (code, facts["requests"]) == (0, server.delivered - 40)
        assert facts["cost"] == pytest.approx(facts["requests"] * 560e-6)
        assert 0 < facts["cost"] <= 0.005
        # They stand as answers until they are asked for again, all of them once.
        server.always, before = None, server.delivered
        known = facts["pairs"]
        code, facts, _ = ask(capsys, server, monkeypatch, arguments, "--out", tmp_path / "c")
        assert (facts["already_known"], facts["requests"]) == (known, 120 - known)
        code, facts, _ = ask(
            capsys, server, monkeypatch, arguments, "--retry-unusable", "--out", tmp_path / "d"
        )
        assert (code, facts["requests"], facts["verdicts"]["unusable"]) == (0, known, 0)
        assert server.delivered == before + 120


@pytest.mark.parametrize("cap", [("--max-requests", 30), ("--max-cost", 30 * 560e-6)])
def test_caps_hold_where_every_reply_is_repeated(arguments, tmp_path, capsys, monkeypatch, cap):
    with LoopbackJudge(["empty"] * 25) as server:  # paid for, but nothing to read
        more = [*cap, "--price", "10,30", "--concurrency", 8, "--out", tmp_path / "a"]
        code, facts, err = ask(capsys, server, monkeypatch, arguments, *more)
        assert (code, facts["requests"]) == (0, server.delivered), err
        assert server.delivered <= 30
        assert facts["pairs"] == max(0, server.delivered - 25)
        assert facts["cost"] == pytest.approx(server.delivered * 560e-6)
        assert f"{cap[0]} {cap[1]} reached" in err


@pytest.mark.parametrize("reply", ["length", "refusal"])
def test_answers_none_of_which_is_usable_stop_the_asking(arguments, tmp_path, capsys, monkeypatch, reply):
    with LoopbackJudge(always=reply) as server:
        more = ["--concurrency", 4, "--out", tmp_path / "a"]
        code, _, err = ask(capsys, server, monkeypatch, arguments, *more)
        assert (code, 50 <= server.delivered <= 54) == (2, True), err
        assert not (tmp_path / "a").exists()
        words = {
            "length": "one without any text; give the prompt a higher max_tokens",
            "refusal": "'I would rather not.'",
        }
        assert f"none of the first 50 answers is usable, for instance {words[reply]}" in err
        assert ("max_tokens" in err) == (reply == "length")
        # Where there is nothing more to ask, nothing was stopped.
        more = ["--depth", 5, "--store", tmp_path / "other", "--out", tmp_path / "b"]
        assert ask(capsys, server, monkeypatch, arguments, *more)[1]["stopped"] is None
        # One that can be read is hope.
        server.faults.append(None)
        more = ["--store", tmp_path / "third", "--out", tmp_path / "c"]
        assert ask(capsys, server, monkeypatch, arguments, *more)[1]["requests"] == 120


def test_what_an_endpoint_does_not_bill_costs_the_most_it_can(arguments, tmp_path, capsys, monkeypatch):
    with LoopbackJudge(always="no-usage") as server:  # 5 tokens an answer may have, at a dollar a thousand
        more = ["--max-cost", 0.05, "--price", "0,1000", "--concurrency", 1, "--out", tmp_path / "a"]
        code, facts, err = ask(capsys, server, monkeypatch, arguments, *more)
        assert (code, facts["requests"], server.delivered) == (0, 10, 10), err
        assert facts["cost"] == pytest.approx(0.05)


def test_an_endpoint_that_asks_for_an_hour_stops_the_asking(arguments, tmp_path, capsys, monkeypatch):
    with LoopbackJudge([None] * 20, always="429-for-an-hour") as server:
        more = ["--concurrency", 1, "--out", tmp_path / "a"]
        code, facts, err = ask(capsys, server, monkeypatch, arguments, *more)
        assert (code, facts["pairs"]) == (1, 20), err
        assert "stopped: the endpoint asks to wait 60 minutes; 100 pairs are not judged" in " ".join(
            err.split()
        )
        assert len(server.seen) == 21


def test_an_error_in_place_of_an_answer_is_told_in_its_own_words(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(judge_module, "_ATTEMPTS", 2)
    with LoopbackJudge(["error"] * 2) as server:
        more = ["--concurrency", 1, "--out", tmp_path / "a"]
        code, facts, err = ask(capsys, server, monkeypatch, arguments, *more)
        assert (code, facts["failed"]) == (0, 1), err
        assert "model overloaded" in (tmp_path / "a" / "failures.jsonl").read_text()


def test_labels_of_other_texts_are_refused(world, index_folder, arguments, tmp_path, capsys, monkeypatch):
    """A new export may give old ids to other queries."""
    folder = make_world(tmp_path / "data")
    judge = f"file:{folder}/judgements.tsv"
    command = ["--data", folder, "--index", index_folder, "--base-depth", 3, "--depth", 9, "--quiet"]
    label = ["label", *command, "--judge", judge, "--missing", "irrelevant", "--out", tmp_path / "labels"]
    assert main([str(part) for part in label]) == 0
    queries = [json.loads(line) for line in (folder / "queries.jsonl").read_text().splitlines()]
    texts = [query["text"] for query in queries]
    queries = [query | {"text": text} for query, text in zip(queries, [*texts[1:], texts[0]], strict=True)]
    (folder / "queries.jsonl").write_text("\n".join(map(json.dumps, queries)) + "\n")
    train = ["train", *command, "--labels", tmp_path / "labels", "--steps", 2, "--out", tmp_path / "model"]
    assert main([str(part) for part in train]) == 2
    assert "of its queries had another text when they were judged" in " ".join(
        capsys.readouterr().err.split()
    )
    again = [
        "label",
        *command,
        "--from",
        f"yes:{tmp_path / 'labels'}",
        "--judge",
        judge,
        "--out",
        tmp_path / "b",
    ]
    assert main([str(part) for part in again]) == 2


def test_retries_within_a_cap_are_made(arguments, tmp_path, capsys, monkeypatch):
    with LoopbackJudge(["500", None] * 30) as server:
        more = ["--max-requests", 25, "--concurrency", 8, "--out", tmp_path / "a"]
        code, facts, err = ask(capsys, server, monkeypatch, arguments, *more)
        assert (code, facts["requests"], facts["pairs"], server.delivered) == (0, 25, 25, 25), err


def test_unusable_answers_are_asked_again_alone(arguments, tmp_path, capsys, monkeypatch):
    with LoopbackJudge(["refusal"] * 7) as server:
        code, facts, err = ask(capsys, server, monkeypatch, arguments, "--out", tmp_path / "a")
        assert (code, facts["verdicts"]["unusable"]) == (0, 7)
        assert facts["unusable_examples"] == ["I would rather not."]
        plan = ask(capsys, server, monkeypatch, arguments, "--plan", "--retry-unusable")[1]
        assert (plan["to_ask"], plan["known"]) == (7, 113)
        server.faults.extend(["400", "refusal"])
        more = ["--retry-unusable", "--out", tmp_path / "b"]
        code, facts, err = ask(capsys, server, monkeypatch, arguments, *more)
        # What gets no answer now keeps the one it had.
        assert (code, facts["requests"], facts["failed"]) == (0, 6, 1), err
        assert (facts["verdicts"]["unusable"], facts["pairs"]) == (2, 120)
        code, facts, _ = ask(capsys, server, monkeypatch, arguments, "--out", tmp_path / "c")
        assert (code, facts["requests"], facts["verdicts"]["unusable"]) == (0, 0, 2)


@pytest.mark.parametrize("end", ["cap", "fault"])
def test_what_stays_unusable_is_asked_again_once(arguments, tmp_path, capsys, monkeypatch, end):
    with LoopbackJudge(["refusal"] * 30) as server:
        assert ask(capsys, server, monkeypatch, arguments, "--out", tmp_path / "a")[0] == 0
        more = ["--retry-unusable", "--out", tmp_path / "b", "--concurrency", 1]
        server.faults.extend(["refusal"] * 12)
        if end == "cap":
            code, facts, err = ask(capsys, server, monkeypatch, arguments, *more, "--max-requests", 12)
            assert (code, facts["requests"], facts["verdicts"]["unusable"]) == (0, 12, 30), err
        else:
            server.faults.append("401")
            assert ask(capsys, server, monkeypatch, arguments, *more)[0] == 2
            assert len(server.seen) == 120 + 13
        code, facts, err = ask(capsys, server, monkeypatch, arguments, *more)
        assert (code, facts["requests"], facts["verdicts"]["unusable"]) == (0, 18, 12), err
        # Who wants that may ask them once more.
        code, facts, err = ask(capsys, server, monkeypatch, arguments, *more, "--force")
        assert (code, facts["requests"], facts["verdicts"]["unusable"]) == (0, 12, 0), err


def test_stored_answers_are_read_in_another_way_for_free(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tests.loopback.verdict", lambda user: "Grade: 2" if "red" in user else "1")
    with LoopbackJudge() as server:
        code, facts, err = ask(
            capsys, server, monkeypatch, arguments, "--out", tmp_path / "a", "--max-requests", 45
        )
        assert (code, facts["verdicts"]["unusable"]) == (0, 45)
        assert "for instance 'Grade: 2', '1'" in err
        monkeypatch.delenv("OPENAI_API_KEY")
        reparse = ["--reparse", "--answer", "grade"]
        code, facts, err = ask(capsys, server, monkeypatch, arguments, *reparse, "--out", tmp_path / "b")
        assert (code, facts["pairs"], facts["verdicts"]["unusable"], facts["cost"]) == (0, 45, 0, None), err
        rows = rows_of(tmp_path / "b")
        assert {(row["verdict"], row["grade"]) for row in rows} == {(1, 2.0), (0, 1.0)}
        code, facts, _ = ask(
            capsys, server, monkeypatch, arguments, *reparse, "--threshold", 1, "--out", tmp_path / "c"
        )
        assert (code, facts["verdicts"]["relevant"]) == (0, 45)
        assert len(server.seen) == 45
        wrong = ["--reparse", "--answer", "smile", "--out", tmp_path / "d"]
        code, _, err = ask(capsys, server, monkeypatch, arguments, *wrong)
        assert (code, "choose from word, tag, grade, json" in err) == (2, True)
        code, _, err = ask(
            capsys, server, monkeypatch, arguments, *reparse, "--retry-unusable", "--out", tmp_path / "d"
        )
        assert (code, "pass one of them" in err) == (2, True)


def test_each_source_says_how_many_of_its_pairs_are_judged(arguments, world, tmp_path, capsys, monkeypatch):
    with LoopbackJudge() as server:
        ask(capsys, server, monkeypatch, arguments, "--out", tmp_path / "a")
        more = ["--from", "base-top", "--from", "base-novel", "--from", "feedback", "--depth", 10]
        plan = ask(capsys, server, monkeypatch, arguments, *more, "--plan")[1]
        assert plan["known_by_source"] == {"base-top": 0, "base-novel": 120, "feedback": 0}
        assert plan["pairs"]["base-novel"] == 140
        code, facts, _ = ask(capsys, server, monkeypatch, arguments, *more, "--out", tmp_path / "b")
        assert (code, facts["known_by_source"], facts["sources"]) == (
            0,
            plan["known_by_source"],
            plan["pairs"],
        )
        assert facts["requests"] == plan["to_ask"] == sum(plan["pairs"].values()) - 120
        main([*arguments, *map(str, more), "--out", str(tmp_path / "c")])
        assert "already judged: 60 of 60 from base-top, 140 of 140 from base-novel" in capsys.readouterr().err


def test_a_limit_that_only_says_later_fails_no_question(arguments, tmp_path, capsys, monkeypatch):
    # Every question is refused more often than it may fail.
    with LoopbackJudge(rpm=3000, burst=5) as server:
        monkeypatch.setattr(judge_module, "_ATTEMPTS", 3)
        code, facts, err = ask(
            capsys, server, monkeypatch, arguments, "--out", tmp_path / "labels", "--concurrency", 60
        )
        assert (code, facts["failed"], facts["pairs"]) == (0, 0, 120), err
        assert facts["retries"] > 60


@pytest.mark.parametrize("how", ["given", "told"])
def test_a_known_limit_is_kept_without_refusals(arguments, tmp_path, capsys, monkeypatch, how):
    with LoopbackJudge(rpm=3000, burst=40, tells=how == "told") as server:
        more = ["--rpm", 2900] if how == "given" else ["--concurrency", 2]
        code, facts, err = ask(capsys, server, monkeypatch, arguments, "--out", tmp_path / "labels", *more)
        assert (code, facts["pairs"]) == (0, 120), err
        assert facts["retries"] <= 8


def test_tokens_per_minute_are_kept(arguments, tmp_path, capsys, monkeypatch):
    with LoopbackJudge() as server:
        plan = ask(capsys, server, monkeypatch, arguments, "--plan")[1]
        tokens = plan["prompt_tokens"] + 120 * 5
        begun = time.monotonic()
        ask(capsys, server, monkeypatch, arguments, "--out", tmp_path / "labels", "--tpm", tokens * 60)
        # A minute's allowance is that of sixty runs: this one takes a second, but for the first request.
        assert time.monotonic() - begun > 0.7


def test_an_endpoint_that_answers_nothing_is_left_alone(arguments, tmp_path, capsys, monkeypatch):
    with LoopbackJudge(["400"] * 120) as server:
        code, _, err = ask(capsys, server, monkeypatch, arguments, "--out", tmp_path / "labels")
        assert (code, len(err.strip().splitlines())) == (2, 1), err
        assert "questions got an answer (for instance: Error code: 400" in err
        assert len(server.seen) < 90
        assert not (tmp_path / "labels").exists()
        server.faults.clear()
        code, facts, _ = ask(capsys, server, monkeypatch, arguments, "--out", tmp_path / "labels")
        assert (code, facts["pairs"]) == (0, 120)
        # Where others are answered, what is there is written, and the command goes on from there.
        server.faults.extend(["400"] * 120)
        more = ["--depth", 39, "--out", tmp_path / "deeper"]
        code, facts, err = ask(capsys, server, monkeypatch, arguments, *more)
        assert (code, facts["pairs"]) == (1, 120)
        assert "50 questions in a row got no answer" in err
        server.faults.clear()
        code, facts, err = ask(capsys, server, monkeypatch, arguments, *more)
        assert (code, facts["pairs"]) == (0, 720), err


@pytest.mark.parametrize("fault", ["html", "500", "cut", "refused"])
def test_a_dead_or_wrong_endpoint_is_named_soon(arguments, tmp_path, capsys, monkeypatch, fault):
    monkeypatch.setattr(judge_module, "_DEAD_AFTER", 0.1)
    out = ["--out", str(tmp_path / "labels")]
    with LoopbackJudge(always=fault) as server:
        url = server.url
        if fault == "refused":
            with socket.socket() as nobody:
                nobody.bind(("127.0.0.1", 0))
                url = f"http://127.0.0.1:{nobody.getsockname()[1]}/v1"
        monkeypatch.setenv("OPENAI_BASE_URL", url.replace("http://", "http://user:hunter2@"))
        code = main([*arguments, *out, "--concurrency", "4"])
        err = capsys.readouterr().err
        assert code == 2
        *_, first, last = err.strip().splitlines()
        assert first.startswith("no answer yet: ")
        assert first.endswith("; trying again")
        assert f"{url} has answered nothing at all for " in last
        assert not any(secret in err for secret in (KEY, "hunter2", "user:"))
        word = {"html": "gateway", "500": "oops", "cut": "body", "refused": "connection refused"}[fault]
        assert word in first
        assert word in last
        assert len(server.seen) < 80
        assert not (tmp_path / "labels").exists()
        assert (tmp_path / "labels.partial").is_dir()
        server.always = None
        code, facts, _ = ask(capsys, server, monkeypatch, arguments, *out)
        assert (code, facts["pairs"]) == (0, 120)


def test_an_endpoint_that_limits_or_fails_at_first_is_not_dead(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(judge_module, "_DEAD_AFTER", 0.0)
    monkeypatch.setattr(judge_module, "_ATTEMPTS", 1000)
    monkeypatch.setattr(judge_module, "_LONGEST_WAIT", 0.02)
    # Rate limits are no faults, however many come first, and whether or not they say for how long.
    for n, faults in enumerate((["429"] * 70, ["429-retry-after"] * 70, (["500"] * 15 + ["429"]) * 4)):
        with LoopbackJudge(faults) as server:
            more = ["--concurrency", 16, "--depth", 9 + n, "--out", tmp_path / str(n)]
            code, facts, err = ask(capsys, server, monkeypatch, arguments, *more)
            assert (code, facts["failed"], facts["pairs"]) == (0, 0, 120 + 20 * n), err
    # An endpoint that has answered once is alive: its faults are those of the questions.
    with LoopbackJudge([None, *["500"] * 300]) as server:
        more = ["--concurrency", 1, "--depth", 20, "--out", tmp_path / "x"]
        code, facts, err = ask(capsys, server, monkeypatch, arguments, *more)
        assert (code, facts["retries"], facts["pairs"]) == (0, 300, 340), err


@pytest.mark.parametrize("fault", ["500", "503-retry-after"])
def test_one_request_at_a_time_is_enough_to_tell_a_dead_endpoint(
    arguments, tmp_path, capsys, monkeypatch, fault
):
    monkeypatch.setattr(judge_module, "_DEAD_AFTER", 0.02)
    monkeypatch.setattr(judge_module, "_PATIENCE", 0.3)
    with LoopbackJudge(always=fault) as server:
        more = ["--concurrency", 1, "--out", tmp_path / "labels"]
        code, _, err = ask(capsys, server, monkeypatch, arguments, *more)
        assert (code, len(server.seen) < 10) == (2, True), err
        assert "has answered nothing at all for " in err


def test_an_endpoint_that_dies_midway_ends_the_asking_and_not_the_questions(
    arguments, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(judge_module, "_GONE_AFTER", 0.3)
    monkeypatch.setattr(judge_module, "_TELL_AFTER", 0.1)
    monkeypatch.setattr(judge_module, "_LONGEST_WAIT", 0.02)
    monkeypatch.setattr(judge_module, "_ATTEMPTS", 10_000)
    with LoopbackJudge([None] * 30, always="500") as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        out = ["--concurrency", "4", "--out", str(tmp_path / "labels")]
        code = main([*arguments, *out])
        err = capsys.readouterr().err
        assert (code, len(rows_of(tmp_path / "labels"))) == (1, 30), err
        assert err.count("; trying again") == 1
        assert re.search(r"no answer for \d+ s: InternalServerError", err)
        assert f"stopped: {server.url} has answered nothing for " in err
        assert "90 pairs are not judged" in err
        assert "got no answer" not in err
        server.always = None
        code, facts, err = ask(capsys, server, monkeypatch, arguments, *out)
        assert (code, facts["pairs"], facts["requests"]) == (0, 120, 90), err


def test_an_endpoint_that_takes_few_requests_at_once_is_asked_few(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(judge_module, "_FIRST_WAIT", 0.02)
    with LoopbackJudge(at_once=3, delay=0.01) as server:
        more = ["--concurrency", 32, "--out", tmp_path / "labels"]
        code, facts, err = ask(capsys, server, monkeypatch, arguments, *more)
        assert (code, facts["failed"], facts["pairs"]) == (0, 0, 120), err
        assert facts["retries"] < 120  # of 32 at once, three in ten answered


def test_what_is_answered_may_be_claimed_by_others(tmp_path):
    with closing(Store(tmp_path / "s")) as store, closing(Store(tmp_path / "s")) as other:
        questions = [Question(bytes([n]) * 16, [{"role": "user", "content": "x"}]) for n in range(40)]
        with Claims(store) as ours, Claims(other) as theirs:
            ledger, limits = Ledger(store, "openai:m"), judge_module.Limits()
            asking = judge_module._Asking(
                "m", {}, len, lambda _: (1, None), store, ours, ledger, limits, Tally(), print
            )
            given = judge_module._ours(asking, iter(questions), lambda _: None)
            first = [next(given) for _ in range(32)]
            assert theirs.take([question.key for question in first]) == set()
            for question in first[:30]:
                asking.receive(question, "Yes", None)
            next(given)
            assert theirs.take([question.key for question in first]) == {q.key for q in first[:30]}


def test_a_time_that_is_too_short_each_time_is_not_kept_to(arguments, tmp_path, capsys, monkeypatch):
    with LoopbackJudge([None], always="503-retry-after") as server:
        monkeypatch.setattr(judge_module, "_FIRST_WAIT", 0.2)
        monkeypatch.setattr(judge_module, "_PATIENCE", 3.0)
        more = ["--concurrency", 1, "--out", tmp_path / "labels"]
        code, facts, err = ask(capsys, server, monkeypatch, arguments, *more)
        assert (code, facts["pairs"]) == (1, 1), err
        assert len(server.seen) < 20  # of 60 that the times would allow


@pytest.mark.parametrize("harm", ["locked", "damaged"])
def test_a_store_that_fails_is_one_line(arguments, tmp_path, capsys, monkeypatch, harm):
    monkeypatch.setattr("novelret.database._WAIT", 0.1)
    path = tmp_path / "store.sqlite"
    with LoopbackJudge() as server, contextlib.ExitStack() as stack:
        assert ask(capsys, server, monkeypatch, arguments, "--out", tmp_path / "a")[0] == 0
        if harm == "locked":
            holder = stack.enter_context(closing(sqlite3.connect(path, isolation_level=None)))
            holder.execute("BEGIN IMMEDIATE")
        else:
            data = bytearray(path.read_bytes())
            data[4_096:] = b"x" * (len(data) - 4_096)
            path.write_bytes(data)
        more = ["--out", tmp_path / "b", "--depth", 12]
        code, _, err = ask(capsys, server, monkeypatch, arguments, *more)
        assert (code, len(err.strip().splitlines())) == (2, 1), err
        assert "--store" in err


def test_a_full_disk_stops_the_spending(arguments, tmp_path, capsys, monkeypatch):
    real, calls = Store.add, []

    def add(self, judge, answers):
        calls.append(len(answers))
        if len(calls) >= 3:
            raise sqlite3.OperationalError("database or disk is full")
        real(self, judge, answers)

    monkeypatch.setattr(Store, "add", add)
    with LoopbackJudge() as server:
        code, _, err = ask(
            capsys, server, monkeypatch, arguments, "--out", tmp_path / "labels", "--concurrency", 4
        )
        assert (code, "no space left" in err) == (2, True)
        assert len(server.seen) <= 20
        monkeypatch.undo()
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        code, facts, err = ask(capsys, server, monkeypatch, arguments, "--out", tmp_path / "labels")
        assert (code, facts["pairs"]) == (0, 120), err


def test_no_secret_of_the_endpoints_url_is_told(arguments, tmp_path, capsys, monkeypatch):
    with LoopbackJudge(["500"] * 1000) as server:
        monkeypatch.setattr(judge_module, "_LONGEST_WAIT", 0.02)
        url = server.url.replace("http://", "http://user:hunter2@") + "?api-key=s3cr3t"
        monkeypatch.setenv("OPENAI_BASE_URL", url)
        for bad in (
            ["--out", tmp_path / "labels"],
            ["--judge", "openai-batch:tiny", "--out", tmp_path / "b"],
        ):
            if bad[0] == "--judge":
                server.server.server_close()  # nothing listens any more
                monkeypatch.setattr("novelret.label.judges.openai_batch._POLL", 0.001)
                monkeypatch.setattr("novelret.label.judges.openai_batch._LOST", 2)
                monkeypatch.setattr("novelret.label.judges.openai_batch._RETRIES", 0)
            code = main([*arguments, *map(str, bad)])
            captured = capsys.readouterr()
            assert code in (0, 2)
            assert not any(secret in captured.out + captured.err for secret in (KEY, "hunter2", "s3cr3t"))
    for value in ("no url", "http://", "http://[::1"):
        monkeypatch.setenv("OPENAI_BASE_URL", value)
        code = main([*arguments, "--out", str(tmp_path / "c")])
        err = capsys.readouterr().err
        assert (code, len(err.strip().splitlines())) == (2, 1), err
    for path in tmp_path.rglob("*"):
        data = path.read_bytes() if path.is_file() else b""
        assert not any(secret in data for secret in (KEY.encode(), b"hunter2", b"s3cr3t")), path


def test_a_refused_key_is_one_line_without_the_key(arguments, tmp_path, capsys, monkeypatch):
    with LoopbackJudge(["401"] * 50) as server:
        code, _, err = ask(capsys, server, monkeypatch, arguments, "--out", tmp_path / "labels")
        assert code == 2
        assert len(err.strip().splitlines()) == 1
        assert f"{server.url}/chat/completions: " in err
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


def test_what_requests_under_way_may_cost_ends_no_run(arguments, tmp_path, capsys, monkeypatch):
    """An answer may be long and is short: a cap is reached when one more could exceed it, not before."""
    monkeypatch.setattr(judge, "parameters_for", lambda *_: {"max_tokens": 100})
    with LoopbackJudge(delay=0.005) as server:
        more = ["--price", "0,1000", "--concurrency", 16, "--max-cost"]
        code, facts, err = ask(capsys, server, monkeypatch, arguments, *more, 0.4, "--out", tmp_path / "a")
        assert (code, facts["requests"], facts["stopped"]) == (0, 120, None), err
        more = [*more, 0.151, "--from", "base-top", "--out", tmp_path / "b"]
        code, facts, err = ask(capsys, server, monkeypatch, arguments, *more)
        # 0.1 dollars at most and 0.002 in fact.
        assert (code, facts["stopped"], facts["requests"]) == (0, "--max-cost 0.151 reached", 26), err


def test_a_stopped_run_goes_on_with_a_higher_cap(arguments, tmp_path, capsys, monkeypatch):
    labels = tmp_path / "labels"
    out = ["--out", labels]

    def held():
        return sorted((path.name, path.read_bytes()) for path in labels.iterdir())

    with LoopbackJudge() as server:
        assert ask(capsys, server, monkeypatch, arguments, *out, "--max-requests", 40)[0] == 0
        first, before = rows_of(labels), held()
        # The same cap, or a lower one, is said to be reached, in one line; nothing is sent.
        for cap in (40, 30):
            code, _, err = ask(capsys, server, monkeypatch, arguments, *out, "--max-requests", cap)
            assert (code, len(err.strip().splitlines())) == (2, 1)
            assert "--max-requests 40 is reached already, with 40 requests" in err
        # Other questions are no continuation.
        for other in (["--depth", 10], ["--prompt", "query-document"], ["--from", "base-top"], ["--reparse"]):
            more = [*out, "--max-requests", 60, *other]
            code, _, err = ask(capsys, server, monkeypatch, arguments, *more)
            assert (code, "exists already" in err) == (2, True), err
        assert (len(server.seen), held()) == (40, before)
        # A run that fails leaves what is there.
        server.always = "401"
        assert ask(capsys, server, monkeypatch, arguments, *out, "--max-requests", 60)[0] == 2
        assert held() == before
        server.always, so_far = None, sum(server.billed.values())
        more = [*out, "--max-requests", 60, "--concurrency", 3]
        code, facts, err = ask(capsys, server, monkeypatch, arguments, *more)
        assert (code, facts["pairs"], facts["requests"]) == (0, 60, 20), err
        assert facts["earlier"] == {"requests": 40, "cost": 0.0}
        assert "--max-requests 60 reached; 60 pairs are not judged" in err
        assert "Run again with a higher --max-requests to go on" in err
        assert sum(server.billed.values()) == so_far + 20
        # The caps count all runs; one without a cap does the rest.
        code, facts, _ = ask(capsys, server, monkeypatch, arguments, *out, "--max-requests", 70)
        assert (code, facts["pairs"], facts["requests"]) == (0, 70, 10)
        code, facts, _ = ask(capsys, server, monkeypatch, arguments, *out)
        assert (code, facts["pairs"], facts["requests"], facts["stopped"]) == (0, 120, 50, None)
        assert {json.dumps(row) for row in first} < {json.dumps(row) for row in rows_of(labels)}
        # What is whole is not gone on from.
        code, _, err = ask(capsys, server, monkeypatch, arguments, *out, "--max-requests", 500)
        assert (code, "exists already" in err) == (2, True)
        assert set(server.billed.values()) == {1}
        assert {path.name for path in tmp_path.glob("labels*")} == {"labels"}


def test_what_another_process_went_on_from_meanwhile_is_not_gone_on_from(
    arguments, tmp_path, capsys, monkeypatch
):
    out = ["--out", tmp_path / "labels"]
    with LoopbackJudge() as server:
        assert ask(capsys, server, monkeypatch, arguments, *out, "--max-requests", 40)[0] == 0
        prepare = label._prepare

        def slowly(*given):  # and the same command, started twice, is through meanwhile
            monkeypatch.setattr(label, "_prepare", prepare)
            assert ask(capsys, server, monkeypatch, arguments, *out, "--max-requests", 60)[0] == 0
            return prepare(*given)

        monkeypatch.setattr(label, "_prepare", slowly)
        code, _, err = ask(capsys, server, monkeypatch, arguments, *out, "--max-requests", 60)
        assert (code, len(server.seen), len(rows_of(tmp_path / "labels"))) == (2, 60, 60), err
        code, _, err = ask(capsys, server, monkeypatch, arguments, *out, "--max-requests", 61)
        assert (code, len(server.seen)) == (0, 61), err


def test_a_source_that_is_named_twice_counts_once(arguments, tmp_path, capsys, monkeypatch):
    more = ["--from", "base-top", "--from", "base-top", "--per-query", 2, "--out", tmp_path / "labels"]
    with LoopbackJudge() as server:
        code, facts, err = ask(capsys, server, monkeypatch, arguments, *more)
        assert (code, facts["sources"], facts["pairs"]) == (0, {"base-top": 40}, 40), err


def test_a_short_key_is_hidden_where_it_is_a_word(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "e")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    assert hide_secrets("the model does not exist, key: e") == "the model does not exist, key: ***"
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert KEY not in hide_secrets(f"Bearer{KEY}s")


@pytest.mark.parametrize("model", ["gpt-5-mini", "openai/gpt-5-mini", "azure/openai/o3"])
def test_reasoning_models_are_known_behind_their_makers_name(model):
    assert endpoint.parameters_for(model, 5) == {"max_completion_tokens": 2_005}
    assert endpoint.parameters_for("openai/gpt-4o-mini", 5) == {"temperature": 0, "max_tokens": 5}


def test_a_higher_cap_in_dollars_goes_on(arguments, tmp_path, capsys, monkeypatch):
    more = ["--price", "10,30", "--concurrency", 1, "--out", tmp_path / "labels", "--max-cost"]
    with LoopbackJudge() as server:
        code, facts, _ = ask(capsys, server, monkeypatch, arguments, *more, 0.01)
        assert (code, facts["stopped"]) == (0, "--max-cost 0.01 reached")
        spent = facts["cost"]
        words = f"--max-cost 0.01 is reached already, with {facts['requests']} requests at ${spent:.4f}"
        code, _, err = ask(capsys, server, monkeypatch, arguments, *more, 0.01)
        assert (code, words in err) == (2, True)
        code, facts, err = ask(capsys, server, monkeypatch, arguments, *more, 0.03)
        assert (code, facts["earlier"]["cost"]) == (0, spent), err
        assert 0.02 < spent + facts["cost"] == pytest.approx(len(server.billed) * 560e-6)
        assert spent + facts["cost"] <= 0.03


def test_labels_are_not_replaced_by_fewer(arguments, tmp_path, capsys, monkeypatch):
    out = ["--out", tmp_path / "labels"]
    with LoopbackJudge() as server:
        ask(capsys, server, monkeypatch, arguments, *out, "--max-requests", 40)
        for path in tmp_path.glob("store.sqlite*"):
            path.unlink()
        code, _, err = ask(capsys, server, monkeypatch, arguments, *out, "--max-requests", 50)
        assert (code, len(rows_of(tmp_path / "labels"))) == (2, 40)
        assert "holds 40 judged pairs" in err


def test_wherever_a_cap_stops_queries_are_treated_alike(arguments, tmp_path, capsys, monkeypatch):
    def pairs(folder):
        return [(row["query_id"], row["item_id"]) for row in rows_of(folder)]

    with LoopbackJudge() as server:
        plan = ask(capsys, server, monkeypatch, arguments, "--plan", "--price", "1,2")[1]
        more = ["--concurrency", 1, "--max-requests"]
        asked = {}
        for cap in (10, 30, 70, 120):
            store = ["--store", tmp_path / f"{cap}.sqlite", "--out", tmp_path / str(cap)]
            before = len(server.seen)
            code, facts, err = ask(capsys, server, monkeypatch, arguments, *more, cap, *store)
            assert (code, facts["pairs"], facts["queries"]) == (0, cap, 20), err
            assert facts["queries_judged"] == min(cap, 20)
            if cap < 120:
                assert f"{min(cap, 20)} of 20 queries have some that are" in err
            counted = Counter(query for query, _ in pairs(tmp_path / str(cap)))
            assert len(counted) == min(cap, 20)
            assert set(counted.values()) <= {max(1, cap // 20), -(-cap // 20)}
            asked[cap] = server.seen[before:]
        # The same questions come in the same order, and in the file they stand as ever.
        assert asked[10] == asked[30][:10]
        assert asked[70] == asked[120][:70]
        every = pairs(tmp_path / "120")
        assert [query for query, _ in every] == sorted(query for query, _ in every)
        for cap in (10, 30, 70):
            some = pairs(tmp_path / str(cap))
            assert some == [pair for pair in every if pair in set(some)]
        # Neither the file's first queries nor each one's best ranks come first.
        places = {pair: n for n, pair in enumerate(every)}
        first = [places[pair] for pair in pairs(tmp_path / "10")]
        assert max(first) >= 60
        assert len({place % 6 for place in first}) >= 3
        # What a plan says does not depend on the order.
        assert plan["to_ask"] == 120
        assert facts["cost"] is None or facts["cost"] <= plan["cost"]


def test_a_plan_sends_nothing(arguments, tmp_path, capsys, monkeypatch):
    with LoopbackJudge() as server:
        code, plan, _ = ask(capsys, server, monkeypatch, arguments, "--plan", "--price", "1,2")
        assert (code, plan["to_ask"], plan["known"], len(server.seen)) == (0, 120, 0, 0)
        assert plan["cost"] > 120 * 50 / 1e6
        ask(capsys, server, monkeypatch, arguments, "--out", tmp_path / "labels", "--max-requests", 20)
        code, plan, _ = ask(capsys, server, monkeypatch, arguments, "--plan")
        assert (plan["to_ask"], plan["known"], plan["cost"]) == (100, 20, None)


def labelling(world, index_folder, tmp_path, depth, concurrency):
    """A command line for another process, to which the rest is added."""
    return [
        "label", "--data", world, "--index", index_folder, "--judge", "openai:tiny", "--prompt", "query-keyword",
        "--base-depth", 3, "--depth", depth, "--concurrency", concurrency, "--store", tmp_path / "store.sqlite",
        "--json",
    ]  # fmt: skip


def test_killed_at_any_moment_nothing_delivered_is_paid_twice(world, index_folder, tmp_path):
    rng = random.Random(0)
    concurrency, pairs = 4, 20 * 36
    with LoopbackJudge(delay=0.02) as server:
        environment = {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": server.url}
        command = [
            *labelling(world, index_folder, tmp_path, 39, concurrency),
            "--out",
            tmp_path / "labels",
            "--config",
            tmp_path / "empty.yaml",
        ]
        (tmp_path / "empty.yaml").write_text("{}")
        command, log = list(map(str, command)), tmp_path / "log"
        stored: set[bytes] = set()
        kills = 0
        for attempt in range(21):
            begun = len(server.seen)
            process = start(command, environment, log, {})
            deadline = time.time() + 180
            # Wait for its first request, then for a random moment of its asking.
            while len(server.seen) == begun and process.is_alive() and time.time() < deadline:
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.15))
            if process.is_alive():
                title = Path(f"/proc/{process.pid}/cmdline")
                assert not title.exists() or KEY.encode() not in title.read_bytes()
            os.kill(process.pid, signal.SIGINT if attempt == 10 else signal.SIGKILL)
            process.join()
            kills += process.exitcode == -signal.SIGKILL
            # Nothing that was stored before it began was asked.
            asked = {key_of_body(body) for body in server.seen[begun:]}
            assert not asked & stored
            with closing(Store(tmp_path / "store.sqlite")) as store:
                stored = store.known(key_of_body(body) for body in server.seen)
        assert kills == 20
        assert 0 < len(stored) < pairs
        process = start(command, environment, log, {})
        process.join()
        assert process.exitcode == 0, log.read_text()
        assert len(rows_of(tmp_path / "labels")) == len(server.billed) == pairs
        # A kill may cut off the requests under way; no other is billed twice.
        assert sum(n - 1 for n in server.billed.values()) <= concurrency * kills
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes()


@pytest.mark.parametrize("kill", [False, True], ids=["both finish", "one is killed"])
def test_two_runs_with_one_store_pay_for_no_pair_twice(world, index_folder, tmp_path, kill):
    concurrency, pairs = 4, 20 * 12
    with LoopbackJudge(delay=0.02) as server:
        environment = {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": server.url}
        command = [*labelling(world, index_folder, tmp_path, 15, concurrency), "--out"]
        logs = [tmp_path / "log-a", tmp_path / "log-b"]
        runs = [
            start([*map(str, command), str(tmp_path / name)], environment, log, {})
            for name, log in zip("ab", logs, strict=True)
        ]
        if kill:
            deadline = time.time() + 180
            while len(server.seen) < pairs // 4 and time.time() < deadline:
                time.sleep(0.002)
            runs[0].kill()
        for run in runs:
            run.join(300)
        for run, log in list(zip(runs, logs, strict=True))[kill:]:
            assert run.exitcode == 0, log.read_text()
        labels = [rows_of(tmp_path / name) for name in ("b" if kill else "ab")]
        assert [len(rows) for rows in labels] == [pairs] * len(labels)
        twice = sum(n - 1 for n in server.billed.values())
        assert twice <= (concurrency if kill else 0)
    assert not list(tmp_path.glob("store.sqlite-asking-*"))


def test_what_another_run_answered_a_moment_ago_is_not_asked(arguments, tmp_path, capsys, monkeypatch):
    real = Claims.take

    def late(self, keys):
        self.store.add("openai:tiny", [(key, "Yes", 1, 1) for key in keys])  # and its claims are gone
        return real(self, keys)

    monkeypatch.setattr(Claims, "take", late)
    with LoopbackJudge() as server:
        code, facts, err = ask(capsys, server, monkeypatch, arguments, "--out", tmp_path / "a")
        assert (code, facts["pairs"], len(server.seen)) == (0, 120, 0), err


def test_text_in_parts_is_put_together():
    parts = [{"type": "text", "text": "Y"}, {"type": "text", "text": "es"}]
    response = types.SimpleNamespace(
        error=None, choices=[types.SimpleNamespace(message=types.SimpleNamespace(content=parts))]
    )
    assert endpoint.text_of(response) == "Yes"
    response.choices[0].message.content = [{"type": "image"}]
    assert json.loads(endpoint.text_of(response)) == [{"type": "image"}]


@pytest.mark.parametrize("fault", ["html", "malformed"])
def test_a_cap_counts_replies_that_hold_nothing(arguments, tmp_path, capsys, monkeypatch, fault):
    with LoopbackJudge(always=fault) as server:
        ask(capsys, server, monkeypatch, arguments, "--out", tmp_path / "labels", "--max-requests", 20)
        assert len(server.seen) == 20


def test_a_cap_counts_what_killed_runs_spent(world, index_folder, tmp_path):
    concurrency, cap = 2, 120
    with LoopbackJudge(delay=0.01) as server:
        environment = {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": server.url}
        command = [
            *labelling(world, index_folder, tmp_path, 39, concurrency),
            "--out",
            tmp_path / "labels",
            "--max-requests",
        ]
        log = tmp_path / "log"
        kills = 0
        for _ in range(3):
            begun = len(server.seen)
            process = start([*map(str, command), str(cap)], environment, log, {})
            deadline = time.time() + 180
            while len(server.seen) < begun + 15 and process.is_alive() and time.time() < deadline:
                time.sleep(0.002)
            process.kill()
            process.join()
            kills += 1
        assert len(server.seen) >= 45
        assert json.loads((tmp_path / "labels.partial" / "asking.json").read_text())["requests"] > 30

        def finish(cap):
            process = start([*map(str, command), str(cap)], environment, log, {})
            process.join()
            assert process.exitcode == 0, log.read_text()
            assert not (tmp_path / "labels" / "asking.json").exists()
            return json.loads((tmp_path / "labels" / "manifest.json").read_text())["facts"]

        facts = finish(cap)
        # What was under way at a kill counts as spent, whether it was on its way or answered.
        assert cap - concurrency * kills <= len(server.seen) <= cap
        assert facts["stopped"] == f"--max-requests {cap} reached"
        assert cap == facts["requests"] + facts["earlier"]["requests"]
        more = finish(cap + 20)
        assert cap + 20 == more["requests"] + more["earlier"]["requests"]
        assert cap + 20 - concurrency * kills <= len(server.seen) <= cap + 20


@pytest.mark.parametrize("fault", ["late", "cut"])
def test_a_cap_counts_answers_that_got_lost(arguments, tmp_path, capsys, monkeypatch, fault):
    """They may be on the bill: of no question more than four, and never more than the cap in all."""
    monkeypatch.setattr(judge_module, "_FIRST_WAIT", 0.01)
    monkeypatch.setattr(judge_module, "_HOPELESS", 1000)
    with LoopbackJudge([None, *[fault] * 40]) as server:
        code, facts, err = ask(
            capsys, server, monkeypatch, arguments, "--out", tmp_path / "labels", "--max-requests", 30,
            "--timeout", 0.5, "--concurrency", 4, "--price", "1,0",
        )  # fmt: skip
        assert code == 0, err
        assert len(server.seen) == facts["requests"] == 30
        assert max(Counter(json.dumps(body) for body in server.seen).values()) <= 4
        assert facts["stopped"] == "--max-requests 30 reached"
        told = facts["prompt_tokens"] / 1e6  # of the one that arrived
        assert facts["cost"] > 20 * told


def test_a_request_ends_however_slowly_its_answer_trickles(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(judge_module, "_FIRST_WAIT", 0.01)
    with LoopbackJudge(["trickle"]) as server:
        begun = time.monotonic()
        more = ["--out", tmp_path / "labels", "--timeout", 4]  # a busy machine answers the others in time
        code, facts, err = ask(capsys, server, monkeypatch, arguments, *more)
        assert (code, facts["pairs"], facts["requests"]) == (0, 120, 121), err
        assert time.monotonic() - begun < 25  # the whole answer takes 30 seconds


def test_sigterm_keeps_what_is_under_way(world, index_folder, tmp_path):
    with LoopbackJudge(delay=1.0) as server:
        environment = {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": server.url}
        command = [*labelling(world, index_folder, tmp_path, 39, 8), "--out", tmp_path / "labels"]
        process = start([*map(str, command)], environment, tmp_path / "log", {})
        deadline = time.time() + 180
        while len(server.seen) < 12 and time.time() < deadline:
            time.sleep(0.01)
        process.terminate()
        process.join()
        assert process.exitcode == 130, (tmp_path / "log").read_text()
    with closing(Store(tmp_path / "store.sqlite")) as store:
        stored = store.connection.execute("SELECT count(*) FROM answers").fetchone()[0]
    assert stored == len(server.seen) == 16


def test_no_key_gets_into_what_is_kept(arguments, tmp_path, capsys, monkeypatch):
    """A gateway may put it into its answers."""
    with LoopbackJudge(always="echo") as server:
        code, facts, err = ask(
            capsys, server, monkeypatch, arguments, "--out", tmp_path / "labels", "--max-requests", 20
        )
        assert (code, facts["verdicts"]["unusable"]) == (0, 20)
    assert "Bearer ***" in err
    for path in [*tmp_path.rglob("*")]:
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


def test_answers_that_turn_useless_stop_the_asking(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(questions_module, "_USELESS", 30)
    with LoopbackJudge([None] * 20 + ["refusal"] * 100) as server:
        more = ["--out", tmp_path / "labels", "--concurrency", 1]
        code, facts, _ = ask(capsys, server, monkeypatch, arguments, *more)
        assert (code, len(server.seen)) == (1, 50)
        assert facts["stopped"].startswith("but for 20, none of the last 50 answers is usable")
        assert (facts["verdicts"]["unusable"], facts["pairs"]) == (30, 50)


def test_labels_of_nothing_are_none(arguments, tmp_path, capsys, monkeypatch):
    with LoopbackJudge(always="malformed") as server:
        code, _, err = ask(
            capsys, server, monkeypatch, arguments, "--out", tmp_path / "labels", "--max-requests", 20
        )
    assert code == 2
    assert "nothing is judged, --max-requests 20 reached (the last fault: malformed answer" in err
    assert not (tmp_path / "labels").exists()


def test_a_cap_holds_where_a_run_is_broken_off_after_the_asking(arguments, tmp_path, capsys, monkeypatch):
    def press(*_):
        raise KeyboardInterrupt

    more = ["--out", tmp_path / "labels", "--max-requests", 20]
    with LoopbackJudge() as server:
        with monkeypatch.context() as patch:
            patch.setattr(label, "fingerprint_file", press)
            code, _, _ = ask(capsys, server, monkeypatch, arguments, *more)
            assert (code, len(server.seen)) == (130, 20)
        code, facts, err = ask(capsys, server, monkeypatch, arguments, *more)
        assert (code, len(server.seen)) == (0, 20), err
        assert facts["earlier"]["requests"] == 20
        assert not (tmp_path / "labels" / "asking.json").exists()
        # As a kill leaves it between two renames, when more is asked in place of what is there.
        aside = put_aside(tmp_path / "labels")
        (tmp_path / "labels").rename(aside)
        code, facts, err = ask(capsys, server, monkeypatch, arguments, *more[:-1], 30)
        assert (code, len(server.seen)) == (0, 30), err
        assert not aside.exists()


def key_of_body(body):
    parameters = {name: value for name, value in body.items() if name not in ("model", "messages")}
    return key_function(f"openai:{body['model']}", parameters)(body["messages"])


def test_memory_of_questions_is_bounded(monkeypatch, arguments, tmp_path, capsys):
    monkeypatch.setattr(questions_module, "CHUNK", 7)  # many chunks give the same labels
    with LoopbackJudge() as server:
        code, facts, _ = ask(capsys, server, monkeypatch, arguments, "--out", tmp_path / "labels")
        assert (code, facts["pairs"], facts["requests"]) == (0, 120, 120)
        assert set(server.billed.values()) == {1}


@pytest.mark.parametrize("slow", ["server", "disk"])
def test_equal_questions_are_asked_once(encoder, tmp_path, capsys, monkeypatch, slow):
    """Items and queries with the same texts under other ids: one question each, every pair judged."""
    world = make_world(tmp_path / "data")
    lines = (world / "corpus.jsonl").read_text().splitlines()
    twins = [{**json.loads(line), "_id": f"twin-{n}"} for n, line in enumerate(lines)]
    with (world / "corpus.jsonl").open("a") as file:
        file.write("".join(json.dumps(twin) + "\n" for twin in twins))
    queries = [json.loads(line) for line in (world / "queries.jsonl").read_text().splitlines()]
    for query in queries:
        query["text"] = "buy sofa" if query["_id"] < "q10" else query["text"]
    (world / "queries.jsonl").write_text("".join(json.dumps(query) + "\n" for query in queries))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(questions_module, "CHUNK", 10)
    build_index(IndexConfig(str(world), str(encoder), device="cpu"), tmp_path / "index")
    arguments = [
        "label", "--data", str(world), "--index", str(tmp_path / "index"), "--judge", "openai:tiny", "--prompt",
        "query-keyword", "--base-depth", "1", "--depth", "60", "--store", str(tmp_path / "store"),
    ]  # fmt: skip
    if slow == "disk":
        add = Store.add
        monkeypatch.setattr(Store, "add", lambda self, *rows: (time.sleep(0.01), add(self, *rows)))
    with LoopbackJudge(delay=0.02 if slow == "server" else 0) as server:
        planned = ask(capsys, server, monkeypatch, arguments, "--plan")[1]["to_ask"]
        code, facts, err = ask(capsys, server, monkeypatch, arguments, "--out", tmp_path / "labels")
        assert (code, facts["pairs"]) == (0, 20 * 59), err
        assert set(server.billed.values()) == {1}
        assert facts["requests"] == len(server.billed) == planned < 20 * 59 / 1.4


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


def test_a_text_that_is_refused_fails_alone_once_the_key_is_known(arguments, tmp_path, capsys, monkeypatch):
    """Some endpoints answer 403 to a text that they find harmful, and to a key that may not ask."""
    with LoopbackJudge([*[None] * 9, "403"]) as server:
        one = (*arguments, "--concurrency", "1", "--out")
        code, facts, err = ask(capsys, server, monkeypatch, one, tmp_path / "labels")
        assert (code, facts["failed"], facts["pairs"]) == (0, 1, 119), err
        assert "this text is not allowed" in err
        server.faults.append("403")  # the first thing that a run hears: it may be about the key
        code, _, err = ask(capsys, server, monkeypatch, one, tmp_path / "labels", "--force")
        assert (code, len(err.strip().splitlines())) == (2, 1)
        assert len(rows_of(tmp_path / "labels")) == 119
    with LoopbackJudge(["403"]) as server:
        code, _, err = ask(capsys, server, monkeypatch, one, tmp_path / "new", "--depth", 12)
        assert (code, len(err.strip().splitlines()), len(server.seen)) == (2, 1, 1)


def test_a_limit_that_names_no_time_fails_no_question(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(judge_module, "_ATTEMPTS", 3)
    monkeypatch.setattr(judge_module, "_LONGEST_WAIT", 0.1)
    with LoopbackJudge(["429"] * 12) as server:
        code, facts, err = ask(
            capsys, server, monkeypatch, arguments, "--concurrency", 1, "--out", tmp_path / "labels"
        )
        assert (code, facts["failed"], facts["pairs"], facts["retries"]) == (0, 0, 120, 12), err


def test_what_a_gateway_gave_up_on_may_be_paid_for(arguments, tmp_path, capsys, monkeypatch):
    with LoopbackJudge(["504"]) as server:
        code, facts, err = ask(
            capsys, server, monkeypatch, arguments, "--concurrency", 1, "--out", tmp_path / "labels"
        )
        assert (code, facts["pairs"], facts["requests"]) == (0, 120, 121), err


def test_a_gateway_that_names_a_time_is_not_paid_without_end(arguments, tmp_path, capsys, monkeypatch):
    with LoopbackJudge([None, *["504-retry-after"] * 4]) as server:
        more = ["--concurrency", 1, "--out", tmp_path / "labels"]
        code, facts, err = ask(capsys, server, monkeypatch, arguments, *more)
        assert (code, facts["failed"], facts["pairs"], facts["requests"]) == (0, 1, 119, 123), err


def test_what_never_left_this_machine_is_not_paid_for(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(judge_module, "_DEAD_AFTER", 0.1)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://judge.invalid/v1")
    caps = ("--max-requests", "120", "--out", str(tmp_path / "labels"))
    assert main([*arguments, *caps, "--quiet"]) == 2
    assert "has answered nothing at all" in capsys.readouterr().err
    monkeypatch.delenv("HTTP_PROXY")
    with LoopbackJudge() as server:
        code, facts, err = ask(capsys, server, monkeypatch, arguments, *caps)
        assert (code, facts["pairs"]) == (0, 120), err
    error = openai.APIConnectionError(request=None)
    for name, paid in [("UnsupportedProtocol", False), ("ProxyError", False), ("ReadError", True)]:
        error.__cause__ = type(name, (Exception,), {})()
        assert may_be_answered(error) == paid


def test_an_empty_url_is_none(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", " ")
    check_key()
    assert openai.OpenAI(api_key="k").base_url == "https://api.openai.com/v1/"


def test_a_notebook_may_label(arguments, world, index_folder, tmp_path, monkeypatch):
    """Its cells run inside of an event loop."""
    with LoopbackJudge() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        config = LabelConfig(
            str(world), str(index_folder), "openai:tiny", prompt="query-keyword", base_depth=3, depth=9,
            store=str(tmp_path / "store.sqlite"),
        )  # fmt: skip

        async def cell() -> None:
            build_labels(config, tmp_path / "labels")

        asyncio.run(cell())
        assert len(rows_of(tmp_path / "labels")) == len(server.billed) == 120
