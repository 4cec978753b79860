"""`novelret compare` as a user types it, against lists computed here."""

from __future__ import annotations

import io
import json
import shutil

import numpy as np
import pytest
from rich.console import Console

from novelret import encode
from novelret.cli.compare import lists_table
from novelret.data.split import load_split
from novelret.index import open_index
from tests.cli.test_chain import fails, result, run
from tests.conftest import make_encoder, write_jsonl, write_qrels

L = 5


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_encoder(tmp_path_factory.mktemp("model") / "new", seed=3)


@pytest.fixture
def common(world, index_folder, model):
    return ["compare", "--data", world, "--index", index_folder, "--model", f"new={model}", "--base-depth", L,
            "--k", 3, "--device", "cpu"]  # fmt: skip


@pytest.fixture(scope="module")
def truth(world, index_folder, model):
    """Lists of L item ids per query and side by plain numpy, the judgements, and the feedback."""
    index = open_index(index_folder)
    split = load_split(str(world), "test", index.catalog)
    ids = np.array(index.catalog.ids.to_pylist())
    lists = {}
    for name, encoder in (("base", index.query_encoder()), ("new", encode.load_encoder(model))):
        scores = np.round(encode.encode_queries(encoder, split.query_texts) @ index.embeddings.T, 6)
        order = [
            sorted(range(len(ids)), key=lambda i, of=of: (of[i], ids[i]), reverse=True)[:L] for of in scores
        ]
        lists[name] = {query: ids[row].tolist() for query, row in zip(split.query_ids, order, strict=True)}
    judged = {tuple(line.split("\t")[:2]) for line in (world / "judgements.tsv").read_text().splitlines()[1:]}
    feedback = {
        (split.query_ids[q], ids[i])
        for q, i in zip(split.feedback_queries, split.feedback_items, strict=True)
    }
    return lists, judged, feedback


def test_shows_the_queries_that_gained_most(common, world, truth, capsys):
    lists, judged, feedback = truth
    judgements = ["--judgements", world / "judgements.tsv", "--missing", "irrelevant"]
    found = result(capsys, *common, *judgements, "--queries", 4)["queries"]
    gain = {
        query: sum(item not in lists["base"][query] and (query, item) in judged for item in row)
        for query, row in lists["new"].items()
    }
    assert [query["gain"] for query in found] == sorted(gain.values(), reverse=True)[:4]
    for query in found:
        name = query["id"]
        assert query["gain"] == gain[name]
        base, new = lists["base"][name], lists["new"][name]
        assert [hit["id"] for hit in query["results"]["base"]] == base[:3]
        shown = new[:3] + [item for item in new[3:] if item not in base]
        assert [hit["id"] for hit in query["results"]["new"]] == shown
        for hit in query["results"]["new"]:
            assert hit["rank"] == new.index(hit["id"]) + 1
            assert hit["novel"] == (hit["id"] not in base)
            assert hit["base_rank"] == (base.index(hit["id"]) + 1 if hit["id"] in base else None)
            assert hit["relevant"] == ((name, hit["id"]) in judged)
            assert hit["feedback"] == ((name, hit["id"]) in feedback)
        of_feedback = [item for query_id, item in feedback if query_id == name]
        recall = {side: np.mean([item in lists[side][name] for item in of_feedback]) for side in lists}
        assert query["recall_change"] == pytest.approx(recall["new"] - recall["base"])


@pytest.mark.parametrize("missing", ["irrelevant", "unknown"])
def test_a_report_marks_what_its_file_of_judgements_marked(
    common, world, index_folder, model, capsys, tmp_path, missing
):
    judge = ["--judge", f"file:{world / 'judgements.tsv'}", "--missing", missing]
    common = [*common, "--queries", 4]
    expected = result(
        capsys, *common, "--judgements", world / "judgements.tsv", "--missing", missing
    )["queries"]  # fmt: skip
    result(
        capsys, "eval", "--data", world, "--index", index_folder, "--model", f"new={model}", *judge,
        "--base-depth", L, "--k", L, "--device", "cpu", "--out", tmp_path / "report",
    )  # fmt: skip
    # The report's qrels hold the noes: nothing is said about what is missing in them.
    found = result(capsys, *common, "--judgements", tmp_path / "report")["queries"]
    assert found == expected
    marks = {hit["relevant"] for query in found for hit in query["results"]["new"]}
    assert marks == ({True, False} if missing == "irrelevant" else {True, None})
    result(
        capsys, "eval", "--data", world, "--index", index_folder, "--model", f"new={model}",
        "--base-depth", L, "--k", L, "--device", "cpu", "--out", tmp_path / "no-judge",
    )  # fmt: skip
    message = fails(capsys, *common, "--judgements", tmp_path / "no-judge")
    assert "holds no judgements; give LABELS, a REPORT made with --judge, or qrels" in message


def test_shows_the_queries_that_lost_most_and_those_asked_for(common, capsys):
    lost = result(capsys, *common, "--most", "lost", "--queries", 50)["queries"]
    changes = [query["recall_change"] for query in lost]
    assert changes == sorted(changes)
    assert max(changes) < 0
    assert all(hit["relevant"] is None for query in lost for hit in query["results"]["new"])
    asked = result(capsys, *common, "--query-id", "q07", "--query-id", "q03")["queries"]
    assert [query["id"] for query in asked] == ["q03", "q07"]


def test_a_query_that_is_asked_for_needs_no_judgement_and_keeps_its_own(
    common, world, truth, tmp_path, capsys
):
    judged = truth[1]
    of_others = sorted(pair for pair in judged if pair[0] != "q03")
    write_qrels(tmp_path / "others.tsv", [(*pair, 1) for pair in of_others])
    asked = ["--query-id", "q03", "--query-id", "q07", "--judgements", tmp_path / "others.tsv"]
    for missing, verdict in (("unknown", None), ("irrelevant", False)):
        without, own = result(capsys, *common, *asked, "--missing", missing)["queries"]
        assert {hit["relevant"] for hit in without["results"]["new"]} == {verdict}
        for hit in own["results"]["new"]:
            assert hit["relevant"] == (True if ("q07", hit["id"]) in judged else verdict)
    assert result(capsys, *common, *asked[:2], *asked[4:])["queries"][0]["id"] == "q03"


def test_verdicts_on_another_text_of_a_query_are_refused(common, world, index_folder, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(world, data)
    labels = ["label", "--data", data, "--index", index_folder, "--judge", f"file:{world}/judgements.tsv",
              "--split", "test", "--base-depth", 3, "--depth", 9, "--out", tmp_path / "labels"]  # fmt: skip
    result(capsys, *labels)
    rows = [json.loads(line) for line in (data / "queries.jsonl").read_text().splitlines()]
    write_jsonl(data / "queries.jsonl", [row | {"text": "changed"} for row in rows])
    command = ["compare", "--data", data, *common[3:], "--judgements", tmp_path / "labels"]
    assert "of its queries had another text when they were judged" in fails(capsys, *command)


def test_terminal_marks_what_is_novel_and_relevant(common, world, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    code, out, _ = run(capsys, *common, "--judgements", world / "judgements.tsv", "--queries", 1)
    assert code == 0
    assert "+✓ " in out
    assert ">5" in out
    assert "RelevantNovel@5" in out


def test_no_text_gives_the_terminal_orders():
    console = Console(width=80, force_terminal=True, file=io.StringIO())
    hit = {"text": "a \x1b]0;title\x07\x1b[2Jsofa [red]", "novel": False, "score": 1.0, "base_rank": 1}
    console.print(lists_table({"base": [hit]}, 5))
    said = console.file.getvalue()
    assert "sofa [red]" in said
    assert "\x1b]" not in said
    assert "\x1b[2J" not in said


def test_judgements_of_another_split_are_refused(common, world, index_folder, tmp_path, capsys):
    labels = ["label", "--data", world, "--index", index_folder, "--judge", f"file:{world}/judgements.tsv",
              "--split", "train", "--base-depth", 3, "--depth", 9, "--out", tmp_path / "labels"]  # fmt: skip
    result(capsys, *labels)
    message = fails(capsys, *common, "--judgements", tmp_path / "labels")
    assert "judges no query of split test" in message


def test_bad_input_has_one_line_each(common, index_folder, capsys):
    cases = {
        "--query-id q99: is no query of split test": ["--query-id", "q99"],
        "--most best: unknown; choose from gained, lost": ["--most", "best"],
        "--missing none: unknown; choose from unknown, irrelevant": ["--missing", "none"],
        "--queries 0: must be at least 1": ["--queries", 0],
        "--k 41: must be from 1 to the catalog's 40 items": ["--k", 41],
        "holds no judgements": ["--judgements", index_folder],
        "/no/such.tsv: no such file": ["--judgements", "/no/such.tsv"],
        "'base' is the deployed model": ["--model", "base=/x"],
        "base: 'base' is the deployed model; give another name": ["--model", index_folder.parent / "base"],
    }
    (index_folder.parent / "base").mkdir(exist_ok=True)
    for message, arguments in cases.items():
        assert message in fails(capsys, *common, *arguments)
