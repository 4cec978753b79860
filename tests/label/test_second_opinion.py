"""Asking a second time about the yeses: whom it is asked of, what it costs, whose word counts in training."""

from __future__ import annotations

import json
import random
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from novelret.artifacts import read_manifest
from novelret.cli import main
from novelret.data.split import load_split
from novelret.index import open_index
from novelret.label.candidates import gather_candidates
from novelret.label.labels import SCHEMA, join_labels, open_labels
from novelret.label.table import IRRELEVANT, RELEVANT, UNKNOWN, join_tables, make_table
from novelret.progress import Reporter
from tests.commands import fails, result, run
from tests.conftest import make_encoder, make_world, write_qrels
from tests.loopback import LoopbackJudge

TRAIN = ("--tune", "adapter", "--base-depth", 3, "--depth", 12, "--steps", 12, "--batch-size", 16,
         "--learning-rate", 0.05, "--max-recall-drop", 1, "--validation-fraction", 0, "--device", "cpu")  # fmt: skip


def verdicts_of(folder) -> dict[tuple[str, str], int]:
    rows = pq.read_table(folder / "judgements.parquet").to_pylist()
    return {(row["query_id"], row["item_id"]): row["verdict"] for row in rows}


@pytest.fixture(scope="module")
def truth(world) -> set[tuple[str, str]]:
    lines = (world / "judgements.tsv").read_text().splitlines()[1:]
    return {tuple(line.split("\t")[:2]) for line in lines}


@pytest.fixture(scope="module")
def made(world, index_folder, truth, tmp_path_factory):
    """LABELS of a judge that says yes too often, of people, and of the people asked about its yeses alone."""
    out = tmp_path_factory.mktemp("second")
    label = ["label", "--data", world, "--index", index_folder, "--missing", "irrelevant", "--base-depth", 3,
             "--depth", 12, "--quiet", "--judge"]  # fmt: skip
    people = f"file:{world}/judgements.tsv"
    assert main(list(map(str, [*label, people, "--out", out / "people"]))) == 0
    wrong = [pair for pair, verdict in verdicts_of(out / "people").items() if not verdict]
    false = random.Random(0).sample(wrong, 30)
    write_qrels(out / "noisy.tsv", [(*pair, 1) for pair in sorted(truth) + false])
    assert main(list(map(str, [*label, f"file:{out}/noisy.tsv", "--out", out / "noisy"]))) == 0
    assert (
        main(list(map(str, [*label, people, "--from", f"yes:{out}/noisy", "--out", out / "confirmed"]))) == 0
    )
    return out


@pytest.fixture
def label(world, index_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-second")
    monkeypatch.setenv("NOVELRET_STORE", str(tmp_path / "store.sqlite"))
    return ["label", "--data", world, "--index", index_folder, "--base-depth", 3, "--depth", 12]


@pytest.fixture
def train(world, index_folder):
    return ["train", "--data", world, "--index", index_folder, *TRAIN]


def gather(world, index_folder, *sources, report=None):
    index = open_index(index_folder)
    split = load_split(str(world), "train", index.catalog)
    found = gather_candidates(
        index, split, sources, base_depth=3, depth=12, per_query=None, seed=0, device="cpu",
        report=report or Reporter(),
    )  # fmt: skip
    items = index.catalog.ids_at(found.item_rows.tolist())
    return found, [(split.query_ids[q], item) for q, item in zip(found.query_rows, items, strict=True)]


# Candidates


def test_the_candidates_are_the_yeses_and_nothing_else(made, world, index_folder):
    found, pairs = gather(world, index_folder, f"yes:{made}/noisy")
    yes = {pair for pair, verdict in verdicts_of(made / "noisy").items() if verdict == RELEVANT}
    assert len(pairs) == len(set(pairs)) == len(yes) > 30
    assert set(pairs) == yes
    assert found.counts() == {f"yes:{made}/noisy": len(yes)}


def test_yeses_stand_beside_other_sources_each_pair_once(made, world, index_folder):
    found, pairs = gather(world, index_folder, "base-top", f"yes:{made}/noisy", f"yes:{made}/people")
    counts = found.counts()
    assert len(pairs) == len(set(pairs)) == sum(counts.values())
    # People's yeses are among the noisy judge's, which therefore gave them all; base-top is disjoint from both.
    assert list(counts.values()) == [60, len(verdicts_of(made / "confirmed")), 0]


def test_yeses_of_other_queries_are_left_out_and_said(made, world, index_folder, tmp_path):
    shutil.copytree(made / "noisy", tmp_path / "noisy")
    table = pq.read_table(tmp_path / "noisy" / "judgements.parquet")
    ids = ["gone" if query == "q00" else query for query in table["query_id"].to_pylist()]
    gone = sum(q == "gone" and v == 1 for q, v in zip(ids, table["verdict"].to_pylist(), strict=True))
    table = table.set_column(0, "query_id", pa.array(ids))
    pq.write_table(table, tmp_path / "noisy" / "judgements.parquet")
    report = Reporter()
    _, pairs = gather(world, index_folder, f"yes:{tmp_path}/noisy", report=report)
    assert gone > 0
    assert len(pairs) == len(verdicts_of(made / "confirmed")) - gone
    assert f"{gone} pairs that it calls relevant are not of this split's queries" in report.warnings[0]


# The order of the word


def test_the_last_word_counts_and_no_word_changes_nothing():
    rows = np.zeros(4, dtype=np.int64)
    first = make_table(rows, np.array([1, 2, 3, 4]), np.array([1, 1, 0, 1], dtype=np.int8), 10)
    graded = np.array([0, 3, np.nan], dtype=np.float32)
    second = make_table(
        rows[:3], np.array([1, 3, 4]), np.array([0, 1, UNKNOWN], dtype=np.int8), 10, grades=graded
    )
    asked = np.array([1, 2, 3, 4, 5])
    joined = join_tables(first, second)
    assert joined.lookup(np.zeros(5, dtype=np.int64), asked).tolist() == [0, 1, 1, 1, UNKNOWN]
    grades = joined.lookup_grades(np.zeros(5, dtype=np.int64), asked)
    assert np.array_equal(grades, [0, 1, 3, 1, np.nan], equal_nan=True)
    back = join_tables(second, first)
    assert back.lookup(np.zeros(5, dtype=np.int64), asked).tolist() == [1, 1, 0, 1, UNKNOWN]
    assert (np.diff(joined.keys) > 0).all()


def test_several_labels_are_joined_in_the_order_given(made, world, index_folder, tmp_path):
    index = open_index(index_folder)
    split = load_split(str(world), "train", index.catalog)
    names = ("noisy", "confirmed", "people")
    noisy, confirmed, people = (open_labels(made / name, index) for name in names)
    joined = join_labels([noisy, confirmed], split, index.catalog)
    expected = verdicts_of(made / "noisy") | verdicts_of(made / "confirmed")
    found = {
        (split.query_ids[q], index.catalog.ids_at([int(i)])[0]): v
        for q, i, v in zip(joined.query_rows, joined.item_rows, joined.verdicts, strict=True)
    }
    assert found == expected == verdicts_of(made / "people")
    again = join_labels([people, noisy], split, index.catalog)
    assert int((again.verdicts == RELEVANT).sum()) == int((joined.verdicts == RELEVANT).sum()) + 30
    # A second answer that cannot be read is no refusal.
    shutil.copytree(made / "confirmed", tmp_path / "unusable")
    rows = pq.read_table(tmp_path / "unusable" / "judgements.parquet").to_pylist()
    unread = next(row for row in rows if row["verdict"] == IRRELEVANT)
    unread["verdict"], unread["grade"] = UNKNOWN, None
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), tmp_path / "unusable" / "judgements.parquet")
    kept = join_labels([noisy, open_labels(tmp_path / "unusable", index)], split, index.catalog)
    row, item = split.query_ids.index(unread["query_id"]), index.catalog.rows_of([unread["item_id"]])
    assert kept.lookup(np.array([row]), item).tolist() == [RELEVANT]
    assert joined.lookup(np.array([row]), item).tolist() == [IRRELEVANT]


# As a user types it


def test_what_the_second_judge_refutes_is_not_trained_on(made, train, capsys, tmp_path):
    def trained(name, *labels):
        flags = [word for folder in labels for word in ("--labels", made / folder)]
        result(capsys, *train, *flags, "--out", tmp_path / name)
        return read_manifest(tmp_path / name, "model")

    people, noisy = trained("a", "people"), trained("b", "noisy")
    confirmed = trained("c", "noisy", "confirmed")
    # Only the 30 false yeses tell the labels apart: with them refuted, the weights are those of true labels.
    assert confirmed.fingerprint == people.fingerprint != noisy.fingerprint
    inputs = {name: read_manifest(made / name, "labels").fingerprint for name in ("noisy", "confirmed")}
    assert confirmed.inputs["labels"] == inputs["noisy"]
    assert confirmed.inputs["labels 2"] == inputs["confirmed"]
    assert noisy.inputs.keys() == people.inputs.keys() == confirmed.inputs.keys() - {"labels 2"}
    # The resolved settings and a recipe's list are taken back.
    config = yaml.safe_load((tmp_path / "c" / "config.yaml").read_text())
    assert config["labels"] == [str(made / "noisy"), str(made / "confirmed")]
    result(capsys, "train", "--config", tmp_path / "c" / "config.yaml", "--out", tmp_path / "d")
    assert read_manifest(tmp_path / "d", "model").fingerprint == confirmed.fingerprint
    stages = {"train": {name.replace("_", "-"): value for name, value in config.items()}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(stages))
    result(capsys, "train", "--config", tmp_path / "recipe.yaml", "--out", tmp_path / "e")
    assert read_manifest(tmp_path / "e", "model").fingerprint == confirmed.fingerprint
    judges = read_manifest(tmp_path / "c", "model").facts["judges"]
    card = (tmp_path / "c" / "README.md").read_text()
    assert len(judges) == 2
    for folder, judge in zip(("noisy", "confirmed"), judges, strict=True):
        assert f"{made / folder} (judge: {judge})" in card


def test_no_labels_in_a_resolved_configuration_stay_none(train, capsys, tmp_path):
    result(capsys, *train, "--objective", "supervised", "--out", tmp_path / "a")
    assert yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())["labels"] is None
    result(capsys, "train", "--config", tmp_path / "a" / "config.yaml", "--out", tmp_path / "b")
    assert read_manifest(tmp_path / "b", "model").facts["judges"] == []
    assert "| labels | none |" in (tmp_path / "b" / "README.md").read_text()


def test_an_llm_is_asked_about_the_yeses_alone(
    made, label, train, world, index_folder, capsys, tmp_path, monkeypatch
):
    yes = {pair for pair, verdict in verdicts_of(made / "noisy").items() if verdict == RELEVANT}
    asks = [*label, "--judge", "openai:tiny", "--prompt", "query-keyword", "--from", f"yes:{made}/noisy"]
    with LoopbackJudge() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        planned = result(capsys, *asks, "--plan")
        assert (planned["to_ask"], len(server.seen)) == (len(yes), 0)
        facts = result(capsys, *asks, "--out", tmp_path / "llm")
        assert facts["requests"] == len(yes) == len(server.seen)
        assert set(verdicts_of(tmp_path / "llm")) == yes
        model = tmp_path / "model"
        both = ("--labels", made / "noisy", "--labels", tmp_path / "llm")
        result(capsys, *train, *both, "--out", model)
        # Whoever had a say in the labels is warned of as their judge, by either way to ask it.
        evaluate = ["eval", "--data", world, "--index", index_folder, "--model", f"new={model}",
                    "--prompt", "query-keyword", "--base-depth", 3, "--k", 3]  # fmt: skip
        code, _, err = run(capsys, *evaluate, "--judge", "openai:tiny", "--out", tmp_path / "report")
        assert (code, err.count("new was trained on labels of openai:tiny, which now judges it")) == (0, 1)
        code, _, err = run(capsys, *evaluate, "--judge", "openai:other", "--out", tmp_path / "fair")
        assert (code, "which now judges it" in err) == (0, False)
    # The report says how all of it was made, the first labels before those that confirm them.
    html = (tmp_path / "report" / "report.html").read_text()
    first, second = (html.index(f"--out {folder}") for folder in (made / "noisy", tmp_path / "llm"))
    assert first < second < html.index(f"--labels {made}/noisy --labels {tmp_path}/llm")


def test_the_same_question_again_is_said_to_be_worth_nothing(made, label, capsys, tmp_path, monkeypatch):
    pointless = "the same answers come again, at no cost, and nothing is learned"
    with LoopbackJudge() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        asks = [*label, "--prompt", "query-keyword"]
        first = [*asks, "--judge", "openai:tiny", "--out", tmp_path / "first"]
        assert result(capsys, *first)["requests"] == 180
        again = [*asks, "--from", f"yes:{tmp_path}/first"]
        code, out, err = run(
            capsys, *again, "--judge", "openai:tiny", "--out", tmp_path / "same", "--json", "--quiet"
        )
        assert (code, err.count(pointless), json.loads(out)["requests"]) == (0, 1, 0)
        # The plan says so as well, and a batch is no other judge.
        code, _, err = run(capsys, *again, "--judge", "openai-batch:tiny", "--plan", "--quiet")
        assert (code, pointless in err) == (0, True)
        others = (
            ("--judge", "openai:other"),
            ("--judge", "openai:tiny", "--prompt", "query-document"),
            ("--judge", "openai:tiny", "--answer", "json"),  # the same answers, read in another way
        )
        for other in others:
            code, _, err = run(capsys, *again, *other, "--plan", "--quiet")
            assert (code, pointless in err) == (0, False), err
    # A file is known by what it holds.
    shutil.copy(made / "noisy.tsv", tmp_path / "copy.tsv")
    code, _, err = run(
        capsys, *label, "--judge", f"file:{tmp_path}/copy.tsv", "--from", f"yes:{made}/noisy", "--out", tmp_path / "f"
    )  # fmt: skip
    assert (code, pointless in err) == (0, True)


def test_wrong_use_is_one_line(made, label, train, world, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    assert "--threshold 2: the prompt asks for yes or no" in fails(
        capsys, *label, "--judge", "openai:tiny", "--threshold", 2, "--out", tmp_path / "out"
    )
    people = ["--judge", f"file:{world}/judgements.tsv", "--out", tmp_path / "out"]
    assert "no such folder; make it with `novelret label`" in fails(
        capsys, *label, *people, "--from", f"yes:{tmp_path}/none"
    )
    assert "choose from base-novel, base-top, feedback, random, model:PATH, pairs:QRELS, yes:LABELS" in fails(
        capsys, *label, *people, "--from", "yes"
    )
    assert "split test relevant; it was labelled with" in fails(
        capsys, *label, *people, "--from", f"yes:{made}/noisy", "--split", "test"
    )
    write_qrels(tmp_path / "no.tsv", [("q00", "i30", 0)])
    no = ["--judge", f"file:{tmp_path}/no.tsv", "--missing", "irrelevant", "--out", tmp_path / "no"]
    assert run(capsys, *label, *no)[0] == 0
    assert "there is no yes to ask about again" in fails(
        capsys, *label, *people, "--from", f"yes:{tmp_path}/no"
    )
    message = fails(
        capsys, *train, "--labels", made / "confirmed", "--labels", made / "noisy", "--out", tmp_path / "out"
    )
    assert f"give --labels {made}/confirmed last" in message
    other, encoder = make_world(tmp_path / "other"), make_encoder(tmp_path / "encoder", seed=3)
    index = ["--data", other, "--index", tmp_path / "index"]
    made_index = run(capsys, "index", "--data", other, "--model", encoder, "--out", tmp_path / "index")
    assert made_index[0] == 0
    assert "was labelled with another index" in fails(
        capsys, "label", *index, *people, "--base-depth", 3, "--depth", 12, "--from", f"yes:{made}/noisy"
    )
    assert not (tmp_path / "out").exists()
