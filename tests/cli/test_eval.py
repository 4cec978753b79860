"""`novelret eval` as a user types it: human labels, the frontier, traffic, tables, and bad input."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import types
from dataclasses import replace

import ir_measures
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from rich.console import Console
from rich.table import Table

from novelret.cli import main
from novelret.cli.options import print_whole
from novelret.evaluate.config import EvalConfig
from novelret.evaluate.evaluate import _warn_of_weak_figures
from novelret.evaluate.weights import bucket_of
from novelret.label.judges import openai_batch
from tests.cli.test_chain import fails, result, run
from tests.conftest import make_encoder, write_qrels
from tests.loopback import LoopbackJudge


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two random query encoders of the index's dimension, in one folder."""
    folder = tmp_path_factory.mktemp("models")
    return folder, [make_encoder(folder / name, seed=seed) for name, seed in (("a", 3), ("b", 4))]


@pytest.fixture
def common(world, index_folder):
    judge = f"file:{world / 'judgements.tsv'}"
    return ["eval", "--data", world, "--index", index_folder, "--judge", judge, "--missing", "irrelevant",
            "--base-depth", 5, "--k", "2,5", "--device", "cpu"]  # fmt: skip


def lists_of(report, name) -> dict[str, list[str]]:
    lists: dict[str, list[str]] = {}
    for line in (report / "runs" / f"{name}.trec").read_text().splitlines():
        query, _, item, *_ = line.split()
        lists.setdefault(query, []).append(item)
    return lists


def truth_of(world) -> set[tuple[str, ...]]:
    return {tuple(line.split("\t")[:2]) for line in (world / "judgements.tsv").read_text().splitlines()[1:]}


def test_people_who_labelled_everything_overrule_the_judge(common, world, models, capsys, tmp_path):
    first = result(capsys, *common, "--model", f"new={models[1][0]}", "--out", tmp_path / "first")
    lists, base = (lists_of(tmp_path / "first", name) for name in ("new", "base"))
    # People call relevant exactly what the judge does not.
    truth = truth_of(world)
    rows = sorted(
        {(q, i, int((q, i) not in truth)) for of in (lists, base) for q, row in of.items() for i in row}
    )
    write_qrels(tmp_path / "human.tsv", rows)
    found = result(
        capsys,
        *common,
        "--model",
        f"new={models[1][0]}",
        "--human",
        tmp_path / "human.tsv",
        "--out",
        tmp_path / "r",
    )
    assert found["models"] == first["models"]  # the raw figures stay what they are
    people = found["human"]["new"]
    assert people["Precision@5"]["value"] == pytest.approx(1 - found["models"]["new"]["Precision@5"])
    novel_irrelevant = found["models"]["new"]["Novelty@5"] - found["models"]["new"]["RelevantNovel@5"]
    assert people["RelevantNovel@5"]["value"] == pytest.approx(novel_irrelevant)
    assert people["Precision@5"]["pairs"] == 20 * 5
    assert people["Precision@5"]["low"] < people["Precision@5"]["value"] < people["Precision@5"]["high"]
    saved = json.loads((tmp_path / "r" / "metrics.json").read_text())
    assert saved["human"] == found["human"]
    assert people["Precision@5"]["relevant"] == round(100 * people["Precision@5"]["value"])
    # The same judgements in the other forms of qrels.
    write(tmp_path / "human.trec", "".join(f"{query} 0 {item} {score}\n" for query, item, score in rows))
    columns = zip(*rows, strict=True)
    table = pa.table(dict(zip(("query-id", "corpus-id", "score"), columns, strict=True)))
    pq.write_table(table, tmp_path / "human.parquet")
    for name in ("human.trec", "human.parquet"):
        again = result(
            capsys, *common, "--model", f"new={models[1][0]}", "--human", tmp_path / name, "--out", tmp_path / f"r-{name}"
        )  # fmt: skip
        assert again["human"] == found["human"]


def test_people_who_contradict_each_other_or_give_grades_are_told_of(common, world, models, capsys, tmp_path):
    arguments = [*common, "--model", f"new={models[1][0]}"]
    first = result(capsys, *arguments, "--out", tmp_path / "first")
    truth = truth_of(world)
    pairs = sorted({(q, i) for q, row in lists_of(tmp_path / "first", "new").items() for i in row})
    # Grades, of which 1 is a no: without a word about that, all is relevant.
    write_qrels(tmp_path / "grades.tsv", [(*pair, 1 + (pair in truth)) for pair in pairs])
    grades = [*arguments, "--human", tmp_path / "grades.tsv"]
    code, _, err = run(capsys, *grades, "--out", tmp_path / "a")
    assert (code, "holds scores up to 2, and every one above 0 counts as relevant" in err) == (0, True)
    code, _, err = run(capsys, *grades, "--human-threshold", 2, "--out", tmp_path / "b")
    assert (code, "above 0 counts" in err) == (0, False)
    figure = json.loads((tmp_path / "b" / "metrics.json").read_text())["human"]["new"]["Precision@5"]
    assert figure["value"] == pytest.approx(first["models"]["new"]["Precision@5"])
    # A second annotator who says no to everything.
    lines = [(*pair, int(pair in truth)) for pair in pairs]
    write_qrels(tmp_path / "two.tsv", lines + [(*pair, 0) for pair in pairs])
    code, _, err = run(capsys, *arguments, "--human", tmp_path / "two.tsv", "--out", tmp_path / "c")
    said = (
        f"two.tsv: {sum(of for *_, of in lines)} pairs called relevant in one line and irrelevant in another"
    )
    assert (code, said in err) == (0, True)


def test_a_sample_is_drawn_labelled_and_read_back(common, world, models, capsys, tmp_path):
    arguments = [*common, "--model", f"new={models[1][0]}"]
    result(capsys, *arguments, "--human-sample", 120, "--out", tmp_path / "first")
    drawn = [line.split("\t") for line in (tmp_path / "first" / "to_label.tsv").read_text().splitlines()]
    assert drawn[0] == ["query-id", "corpus-id", "score", "query", "item"]
    pairs = {(q, i) for q, i, *_ in drawn[1:]}
    lists, base = (lists_of(tmp_path / "first", name) for name in ("new", "base"))
    assert len(pairs) == 120
    assert pairs <= {(q, i) for of in (lists, base) for q, row in of.items() for i in row}
    assert all(line[2] == "" and line[3].startswith("buy ") and line[4] for line in drawn[1:])
    # An empty table is refused; a filled one, with gaps, is used.
    assert "fill in the scores" in fails(
        capsys, *arguments, "--human", tmp_path / "first" / "to_label.tsv", "--out", tmp_path / "second"
    )
    truth = truth_of(world)
    filled = [
        [q, i, "" if n % 10 == 0 else str(int((q, i) in truth)), *rest]
        for n, (q, i, _, *rest) in enumerate(drawn[1:])
    ]
    text = "".join("\t".join(line) + "\n" for line in [drawn[0], *filled])
    (tmp_path / "first" / "labelled.tsv").write_text(text)
    found = result(
        capsys, *arguments, "--human", tmp_path / "first" / "labelled.tsv", "--out", tmp_path / "second"
    )
    in_new = sum(line[2] != "" and line[1] in lists[line[0]] for line in filled)
    figure = found["human"]["new"]["Precision@5"]
    assert figure["pairs"] == in_new
    # The judge is the truth here, so correction changes nothing.
    assert figure["value"] == pytest.approx(found["models"]["new"]["Precision@5"])
    assert figure["trust"] == pytest.approx(1)
    message = fails(
        capsys,
        *arguments,
        "--human",
        tmp_path / "first" / "labelled.tsv",
        "--out",
        tmp_path / "first",
        "--force",
    )
    assert "which this command reads" in message
    assert (tmp_path / "first" / "labelled.tsv").read_text() == text


def test_a_plan_says_what_the_judge_would_be_asked(common, models, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    arguments = [*asks_endpoint(common, tmp_path / "store.sqlite"), "--model", f"new={models[1][0]}"]
    with LoopbackJudge() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        plan = result(capsys, *arguments, "--price", "1,2", "--plan")
        assert server.seen == []
        result(capsys, *arguments, "--out", tmp_path / "report")
        assert plan["to_ask"] == len(server.seen) > 100
        assert plan["cost"] > 0
        again = result(capsys, *arguments, "--plan")
        assert (again["to_ask"], again["known"]) == (0, plan["to_ask"])
        lists, base = (lists_of(tmp_path / "report", name) for name in ("new", "base"))
        assert plan["pairs"] == {
            "eval": len({(q, i) for of in (lists, base) for q, row in of.items() for i in row})
        }
        asked = len(server.seen)
        unasked = [*arguments, "--store", tmp_path / "new.sqlite", "--out", tmp_path / "capped"]
        result(capsys, *unasked, "--price", "1,2", "--max-cost", plan["cost"] / 8)
        assert asked < len(server.seen) < 1.5 * asked
        # At a higher cap it goes on, and the cap counts what was paid before.
        price = ("--price", "1,2", "--max-cost")
        assert "is reached already" in fails(capsys, *unasked, *price, plan["cost"] / 8)
        before = len(server.seen)
        result(capsys, *unasked, *price, 0.3 * plan["cost"])
        assert before < len(server.seen) < 2 * asked
        spent = json.loads((tmp_path / "capped" / "manifest.json").read_text())["facts"]["asked"]
        assert spent["requests"] + spent["earlier"]["requests"] == len(server.seen) - asked
        assert spent["cost"] + spent["earlier"]["cost"] <= 0.3 * plan["cost"]
        result(capsys, *unasked)
        assert len(server.seen) == 2 * asked
        assert "exists already" in fails(capsys, *unasked)
    assert "--plan: there is nothing to ask" in fails(capsys, *common[:5], "--plan")
    assert "--out is missing" in fails(capsys, *common[:5])


def test_counts_that_few_verdicts_stand_behind_are_marked_as_bounds(
    common, models, capsys, tmp_path, monkeypatch
):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    arguments = [*asks_endpoint(common, tmp_path / "store.sqlite"), "--model", f"new={models[1][0]}"]
    folder = tmp_path / "report"
    with LoopbackJudge() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        code, out, err = run(capsys, *arguments, "--max-requests", 40, "--out", folder)
        assert code == 0, err
        found = json.loads((folder / "metrics.json").read_text())
        lists, base = (lists_of(folder, name) for name in ("new", "base"))
        judged = {
            (query, item)
            for query, _, item, _ in map(
                str.split, (folder / "qrels" / "judged.trec").read_text().splitlines()
            )
        }
        novel = {q: [i for i in items if i not in base[q]] for q, items in lists.items()}
        new_pairs = [(query, item) for query, items in novel.items() for item in items]
        share = sum(pair in judged for pair in new_pairs) / len(new_pairs)
        new = found["models"]["new"]
        assert new["NovelJudged@5"] == pytest.approx(share)
        assert f"judged {share:.1%} of the novel items in the top 5 of new" in " ".join(err.split())
        assert any("lower bounds" in warning for warning in found["warnings"])
        # In the terminal, the page and the tables: a bound, without a test or an interval.
        with (folder / "metrics.csv").open(newline="") as file:
            rows = {(row["model"], row["metric"]): row for row in csv.DictReader(file)}
        row = rows["new", "RelevantNovel@5"]
        assert [row[name] for name in ("bound", "low", "high", "p", "p_holm", "mark")] == ["≥", *[""] * 5]
        assert rows["new", "Novelty@5"]["bound"] == "" != rows["new", "Novelty@5"]["low"]
        bound = f"≥{new['RelevantNovel@5']:.2f}"
        assert f"{bound} " in out
        assert f"RelevantNovel@5 ({bound})" in out
        assert "≥: a lower bound" in out
        page, table = ((folder / name).read_text() for name in ("report.html", "table.md"))
        assert f"<td>{bound}</td>" in page
        assert f"<td>≥{new['MergedDensity']:.2f}</td>" in page
        assert f"| {bound} |" in table
        assert rf"$\geq${new['RelevantNovel@5']:.2f} &" in (folder / "table.tex").read_text()

        code, out, err = run(capsys, *arguments, "--out", folder)
        assert code == 0, err
        whole = json.loads((folder / "metrics.json").read_text())
        assert whole["models"]["new"]["NovelJudged@5"] == whole["judged"] == 1
        assert not any("lower bound" in text for text in (out, err, *whole["warnings"]))
        assert "≥" not in (folder / "report.html").read_text()


def asks_endpoint(common, store):
    """The arguments with an LLM as the judge instead of a file."""
    without = [part for part in common if not str(part).startswith("file:")]
    without[without.index("--judge") + 1 : without.index("--judge") + 1] = ["openai:tiny"]
    return [*without, "--prompt", "query-keyword", "--store", store]


def test_answers_are_read_and_asked_for_as_told(common, models, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.setattr("tests.loopback.verdict", lambda user: "2" if "red" in user else "1")
    arguments = [*asks_endpoint(common, tmp_path / "store.sqlite"), "--model", f"new={models[1][0]}"]
    with LoopbackJudge() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        grades = [*arguments, "--answer", "grade"]
        strict = result(capsys, *grades, "--concurrency", 1, "--out", tmp_path / "strict")
        asked = len(server.seen)
        lax = result(capsys, *grades, "--threshold", 1, "--out", tmp_path / "lax")
        assert len(server.seen) == asked  # the same answers, read in another way
        at = f"Precision@{max(strict['k'])}"
        assert 0 < strict["models"]["new"][at] < 1 == lax["models"]["new"][at]
        wrong = (*grades, "--out", tmp_path / "wrong", "--model", "other=/nowhere")
        for option, value in (
            ("--answer", "smile"),
            ("--rpm", 0),
            ("--concurrency", 0),
            ("--prompt", "poem"),
        ):
            assert option.strip("-") in fails(capsys, *wrong, option, value)  # before any model is opened


def test_answers_that_cannot_be_read_are_asked_again(common, models, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    arguments = [*asks_endpoint(common, tmp_path / "store.sqlite"), "--model", f"new={models[1][0]}"]
    with LoopbackJudge(["refusal"] * 7) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        code, _, err = run(capsys, *arguments, "--out", tmp_path / "a")
        assert code == 0
        # What is advised are options of this command.
        advised = re.search(r"7 answers are not usable.*", " ".join(err.split())).group()
        for option in re.findall(r"--[a-z-]+", advised):
            assert main(["eval", option]) == 2
            assert "No such option" not in capsys.readouterr().err
        before = len(server.seen)
        assert result(capsys, *arguments, "--plan", "--retry-unusable")["to_ask"] == 7
        whole = result(capsys, *arguments, "--retry-unusable", "--out", tmp_path / "b")
        assert len(server.seen) == before + 7
        assert whole["judged"] == 1


def test_batches_are_left_and_collected(common, models, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.setattr(openai_batch, "_POLL", 0.02)
    arguments = [*asks_endpoint(common, tmp_path / "store.sqlite"), "--model", f"new={models[1][0]}"]
    batches = ["openai-batch:tiny" if part == "openai:tiny" else part for part in arguments]
    with LoopbackJudge(batch_delay=60) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        leave = [*batches, "--no-wait", "--out", tmp_path / "report"]
        code, out, _ = run(capsys, *leave, "--json", "--quiet")
        waiting = json.loads(out)
        assert code == 3
        assert waiting["report"] is None
        assert waiting["requests_under_way"] > 100
        assert not (tmp_path / "report").exists()
        for batch in server.batches.values():
            batch["due"] = 0
        collected = result(capsys, *leave)
        assert len(server.seen) == waiting["requests_under_way"]  # none was asked twice
        single = result(capsys, *arguments, "--out", tmp_path / "single")
        assert (single["models"], len(server.seen)) == (collected["models"], waiting["requests_under_way"])


def test_frontier_of_a_folder_of_models(common, models, capsys, tmp_path):
    found = result(
        capsys, *common, "--model", f"sweep={models[0]}", "--max-recall-drop", 1, "--out", tmp_path / "report"
    )
    frontier = found["frontier"]
    assert [point["model"] for point in frontier["points"]] == ["base", "sweep-a", "sweep-b"]
    assert (frontier["k"], frontier["points"][0]["novelty"]) == (5, 0)
    gains = {name: of["RelevantNovel@5"] for name, of in found["models"].items()}
    assert frontier["selected"] == max(gains, key=gains.get) != "base"
    strict = result(
        capsys, *common, "--model", f"sweep={models[0]}", "--max-recall-drop", 0, "--out", tmp_path / "strict"
    )
    floor = strict["models"]["base"]["Recall@5"]
    inside = [name for name, of in strict["models"].items() if of["Recall@5"] >= floor and gains[name] > 0]
    assert strict["frontier"]["selected"] in (inside or [None])
    pairs = {pair["metric"]: pair for pair in found["pairs"]}
    assert {(pair["first"], pair["second"]) for pair in found["pairs"]} == {("sweep-a", "sweep-b")}
    for metric in ("RelevantNovel@5", "Recall@5", "MergedDensity"):
        expected = found["models"]["sweep-a"][metric] - found["models"]["sweep-b"][metric]
        assert pairs[metric]["difference"] == pytest.approx(expected)
    code, out, _ = run(capsys, *common, "--model", f"sweep={models[0]}", "--out", tmp_path / "seen")
    assert code == 0
    assert "selected:" in out


def test_tables_hold_the_figures_with_intervals_and_marks(common, models, capsys, tmp_path):
    found = result(capsys, *common, "--model", f"a_1={models[1][0]}", "--out", tmp_path / "report")
    with (tmp_path / "report" / "metrics.csv").open(newline="") as file:
        rows = {(row["model"], row["metric"]): row for row in csv.DictReader(file)}
    assert {key: float(row["value"]) for key, row in rows.items()} == {
        (model, metric): value for model, of in found["models"].items() for metric, value in of.items()
    }
    row = rows["a_1", "Novelty@5"]
    assert float(row["low"]) <= float(row["value"]) <= float(row["high"])
    assert (float(row["p_holm"]) < 0.01) == (row["mark"] == "**")
    assert row["mark"] == "**"
    figure = f"{found['models']['a_1']['Novelty@5']:.2f}"
    markdown, latex = ((tmp_path / "report" / name).read_text() for name in ("table.md", "table.tex"))
    assert f"{figure}\\*\\* [" in markdown
    assert f"{figure}$^{{**}}$" in latex
    assert r"a\_1 &" in latex
    table = [line for line in latex.splitlines() if line.endswith(r"\\")]
    assert len({line.count("&") for line in table}) == 1  # every row as wide as the head
    assert len({line.count("|") for line in markdown.splitlines() if line.startswith("|")}) == 1


def test_written_qrels_and_runs_give_the_same_figures_elsewhere(common, models, capsys, tmp_path):
    found = result(capsys, *common, "--model", f"new={models[1][0]}", "--out", tmp_path / "report")
    qrels = list(ir_measures.read_trec_qrels(str(tmp_path / "report" / "qrels" / "feedback.trec")))
    lists = list(ir_measures.read_trec_run(str(tmp_path / "report" / "runs" / "new.trec")))
    measures = {"Recall@5": ir_measures.R @ 5, "nDCG@5": ir_measures.nDCG @ 5}
    theirs = ir_measures.calc_aggregate(list(measures.values()), qrels, lists)
    for name, measure in measures.items():
        assert found["models"]["new"][name] == pytest.approx(theirs[measure], abs=1e-9)
    judged = list(ir_measures.read_trec_qrels(str(tmp_path / "report" / "qrels" / "judged.trec")))
    precision = ir_measures.calc_aggregate([ir_measures.P @ 5], judged, lists)[ir_measures.P @ 5]
    assert found["models"]["new"]["Precision@5"] == pytest.approx(precision, abs=1e-9)


@pytest.mark.parametrize("missing", ["irrelevant", "unknown"])
def test_written_verdicts_give_precision_and_judged_elsewhere(
    common, world, models, capsys, tmp_path, missing
):
    """A file of a few yeses, none for some queries: what its silence means is written out."""
    lines = (world / "judgements.tsv").read_text().splitlines()[1:]
    few = [line for line in lines if line[:3] not in ("q01", "q03", "q39")][::3]
    (tmp_path / "few.tsv").write_text("".join(f"{line}\n" for line in few))
    judge = ["--judge", f"file:{tmp_path / 'few.tsv'}", "--missing", missing]
    found = result(
        capsys, *common, *judge, "--model", f"new={models[1][0]}", "--out", tmp_path / "report"
    )["models"]  # fmt: skip
    qrels = list(ir_measures.read_trec_qrels(str(tmp_path / "report" / "qrels" / "judged.trec")))
    verdicts = {(judged.query_id, judged.doc_id): judged.relevance for judged in qrels}
    assert len(verdicts) == len(qrels)
    assert {pair for pair, yes in verdicts.items() if yes} <= {tuple(line.split("\t")[:2]) for line in few}
    for name in ("base", "new"):
        lists = lists_of(tmp_path / "report", name)
        for k in (2, 5):
            seen = {query: [verdicts.get((query, item)) for item in of[:k]] for query, of in lists.items()}
            judged = {query: [yes for yes in of if yes is not None] for query, of in seen.items()}
            precision = [sum(of) / len(of) for of in judged.values() if of]
            assert found[name][f"Precision@{k}"] == pytest.approx(sum(precision) / len(precision))
            share = sum(len(of) for of in judged.values()) / (k * len(lists))
            assert found[name][f"Judged@{k}"] == pytest.approx(share)
        if missing == "irrelevant":
            measures = {"Precision": ir_measures.P, "Judged": ir_measures.Judged}
            run_file = list(ir_measures.read_trec_run(str(tmp_path / "report" / "runs" / f"{name}.trec")))
            for what, measure in measures.items():
                theirs = ir_measures.calc_aggregate([measure @ 5], qrels, run_file)[measure @ 5]
                assert found[name][f"{what}@5"] == pytest.approx(theirs, abs=1e-9)
    assert (found["new"]["Judged@5"] == 1) == (missing == "irrelevant")


def test_buckets_of_traffic_and_the_merge_budget(common, world, models, capsys, tmp_path):
    queries = [line.split("\t")[0] for line in (world / "qrels" / "test.tsv").read_text().splitlines()[1:]]
    queries = sorted(set(queries))
    frequency = {query: 100 if n == 0 else 20 if n < 6 else 7 for n, query in enumerate(queries)}
    (tmp_path / "weights.tsv").write_text(
        "query-id\tweight\n" + "".join(f"{q}\t{w}\n" for q, w in frequency.items())
    )
    found = result(
        capsys, *common, "--model", f"new={models[1][0]}", "--weights", tmp_path / "weights.tsv",
        "--merge-budget", 1, "--out", tmp_path / "report",
    )  # fmt: skip
    # Brute force over the written lists.
    lists, base, truth = (
        lists_of(tmp_path / "report", "new"),
        lists_of(tmp_path / "report", "base"),
        truth_of(world),
    )
    density, added = {}, {}
    for query in queries:
        new = [item for item in lists[query] if item not in base[query][:5]][:1]
        added[query] = len(new)
        density[query] = sum((query, item) in truth for item in base[query][:5] + new)
    buckets = {bucket["name"]: bucket for bucket in found["buckets"]}
    names = {100: "head", 20: "torso", 7: "tail"}
    for weight, name in names.items():
        inside = [query for query in queries if frequency[query] == weight]
        figures = buckets[name]["models"]["new"]
        assert buckets[name]["queries"] == len(inside)
        assert figures["MergedDensity"] == pytest.approx(sum(density[q] for q in inside) / len(inside))
        assert figures["MergedAdded"] == pytest.approx(sum(added[q] for q in inside) / len(inside))
        assert figures["MergedCoverage"] == pytest.approx(sum(density[q] > 0 for q in inside) / len(inside))
    total = sum(frequency.values())
    weighted = sum(frequency[q] * density[q] for q in queries) / total
    assert buckets["all by traffic"]["models"]["new"]["MergedDensity"] == pytest.approx(weighted)
    assert buckets["head"]["models"]["base"]["MergedAdded"] == 0
    assert found["models"]["new"]["MergedAdded"] == pytest.approx(sum(added.values()) / len(queries))


def test_weights_lie_in_the_queries_file_too(common, world, capsys, tmp_path):
    import shutil

    data = tmp_path / "data"
    shutil.copytree(world, data)
    lines = (data / "queries.jsonl").read_text().splitlines()
    (data / "queries.jsonl").write_text(
        "".join(f'{line[:-1]}, "weight": {n}}}\n' for n, line in enumerate(lines))
    )
    arguments = [data if part == world else part for part in common]
    found = result(capsys, *arguments, "--out", tmp_path / "report")
    assert sum(bucket["queries"] for bucket in found["buckets"][:-1]) == 20


def test_queries_of_one_frequency_stay_together():
    import numpy as np

    assert bucket_of(np.array([1.0, 3, 3, 1, 1, 1, 1, 0])).tolist() == [2, 0, 0, 2, 2, 2, 2, 2]
    assert len(set(bucket_of(np.ones(9)).tolist())) == 1


def test_its_own_config_runs_it_again(common, models, capsys, tmp_path):
    found = result(capsys, *common, "--model", f"new={models[1][0]}", "--out", tmp_path / "first")
    config = yaml.safe_load((tmp_path / "first" / "config.yaml").read_text())
    assert config["models"] == [f"new={models[1][0]}"] or tuple(config["models"]) == (f"new={models[1][0]}",)
    again = result(
        capsys, "eval", "--config", tmp_path / "first" / "config.yaml", "--out", tmp_path / "again"
    )
    assert again["models"] == found["models"]


def test_cuts_beyond_the_deployed_depth_are_explained(common, models, capsys, tmp_path):
    code, _, err = run(
        capsys,
        *common,
        "--k",
        "2,9",
        "--model",
        f"new={models[1][0]}",
        "--out",
        tmp_path / "report",
        "--quiet",
    )
    message = " ".join(err.split())
    assert code == 0
    assert "--k 9 is more than --base-depth 5" in message
    assert "base scores Novelty@9 4.00 against itself" in message
    assert "--base-depth 9" in message
    saved = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert len(saved["warnings"]) == 1
    result(capsys, *common, "--out", tmp_path / "fine")
    assert json.loads((tmp_path / "fine" / "metrics.json").read_text())["warnings"] == []


def test_a_loss_at_the_top_is_told():
    config = EvalConfig("data", "index", k=(10, 20, 50), max_recall_drop=0.01)
    base = {"Recall@10": 0.35, "Recall@20": 0.5, "Recall@50": 0.7}
    new = {"Recall@10": 0.28, "Recall@20": 0.496, "Recall@50": 0.75}
    said = []
    _warn_of_weak_figures(config, {"base": base, "new": new}, types.SimpleNamespace(warn=said.append))
    assert said == [
        "new is worse at the top: Recall@10 0.280 instead of 0.350. Where no ranker orders the lists anew, that is "
        "what users see"
    ]
    # Where what is known to be relevant is what counts, it does so at the top, too.
    said.clear()
    config = replace(config, recall_of="known")
    for means in (base, new):
        means |= {"KnownRecall@10": 0.3, "KnownRecall@20": 0.4}
    _warn_of_weak_figures(config, {"base": base, "new": new}, types.SimpleNamespace(warn=said.append))
    assert said == []


def test_tables_hold_their_figures_however_narrow_the_terminal_is():
    table = Table("model", "figure")
    table.add_row("a" * 30, "22.480**")
    for width in (20, 80):
        console = Console(width=width, file=io.StringIO())
        print_whole(console, table)
        assert "22.480**" in console.file.getvalue()
        assert "a" * 30 in console.file.getvalue()


def write(path, text):
    path.write_text(text)
    return path


def test_bad_input_has_one_line_each(common, world, index_folder, models, capsys, tmp_path):
    out = ["--out", tmp_path / "out"]
    runs = {
        "unknown": "q01 Q0 nothing 1 0.5 x\n",
        "twice": "q01 Q0 i03 1 0.5 x\nq01 Q0 i03 2 0.4 x\n",
        "nan": "q01 Q0 i03 1 nan x\n",
        "words": "q01 Q0 i03 1 high x\n",
        "short": "q01 i03 0.5\n",
        "other": "another Q0 i03 1 0.5 x\n",
    }
    files = {name: write(tmp_path / f"{name}.trec", text) for name, text in runs.items()}
    (world_without := tmp_path / "empty" / "qrels").mkdir(parents=True)
    for name in ("corpus.jsonl", "queries.jsonl"):
        write(tmp_path / "empty" / name, (world / name).read_text())
    write(world_without / "test.tsv", "query-id\tcorpus-id\tscore\nq01\ti01\t0\n")
    pair = {name: write(tmp_path / f"{name}.tsv", text) for name, text in {
        "negative": "q01\t-3\n", "nanweight": "id\tweight\nq01\tnan\n", "few": "q01\t3\n", "double": "q01\t3\nq01\t4\n",
        "wide": "q01\t3\t4\n", "alien": "zz\ti01\t1\n", "elsewhere": "q01\ti01\t1\n",
        "words": "q01\ti02\t1\nq01\ti01\tyes\n", "nanscore": "q01\ti02\t1\nq01\ti01\tnan\n", "wrongitem": "q01\ti99\t1\n",
    }.items()}  # fmt: skip
    without_judge = ["eval", "--data", world, "--index", index_folder, "--k", 5, "--base-depth", 5]
    cases = {
        "unknown.trec:1: item id 'nothing' is not in the catalog": [*common, "--run", f"x={files['unknown']}"],
        "twice.trec:2: item 'i03' occurs twice": [*common, "--run", f"x={files['twice']}"],
        "nan.trec:1: the score 'nan' is not a finite number": [*common, "--run", f"x={files['nan']}"],
        "words.trec:1: the score 'high'": [*common, "--run", f"x={files['words']}"],
        "short.trec:1: 3 columns, expected query Q0 item rank score name": [*common, "--run", f"x={files['short']}"],
        "no line is about the split's queries": [*common, "--run", f"x={files['other']}"],
        "--run /no/such: no such file": [*common, "--run", "x=/no/such"],
        "is used twice": [*common, "--run", f"base={files['nan']}"],
        "the name 'sweep-a' is given twice": [
            *common, "--model", f"sweep-a={models[1][0]}", "--model", f"sweep={models[0]}"
        ],
        "qrels/test.tsv: split 'test' has no pairs": ["eval", "--data", tmp_path / "empty", "--index", index_folder, "--k", 5, "--base-depth", 5],
        "alien.tsv: no line is about the split's 20 queries": [
            *without_judge, "--judge", f"file:{pair['alien']}"
        ],
        "--human: corrects a judge's figures": [*without_judge, "--human", pair["alien"]],
        "--human-threshold: is about people's scores": [*common, "--human-threshold", 2],
        "--human-threshold nan: must be a number": [*common, "--human", pair["words"], "--human-threshold", "nan"],
        "--threshold nan: must be a number": [*common, "--threshold", "nan"],
        "--human /no/such: no such file": [*common, "--human", "/no/such"],
        "elsewhere.tsv: none of its pairs is in any list": [*common, "--human", pair["elsewhere"]],
        "--weights /no/such: no such file": [*common, "--weights", "/no/such"],
        "negative.tsv:1: the weight '-3' is not a number of at least 0": [*common, "--weights", pair["negative"]],
        "nanweight.tsv:2: the weight 'nan\\n' is not": [*common, "--weights", pair["nanweight"]],
        "few.tsv: no weight for query 'q03' (19 of 20 queries)": [*common, "--weights", pair["few"]],
        "double.tsv:2: query 'q01' has a weight already": [*common, "--weights", pair["double"]],
        "wide.tsv:1: 3 columns, expected query-id and weight": [*common, "--weights", pair["wide"]],
        "--human-sample 0: must be at least 1": [*common, "--human-sample", 0],
        "words.tsv:2: the score 'yes' is not a number": [*common, "--human", pair["words"]],
        "nanscore.tsv:2: the score 'nan' is not a number": [*common, "--human", pair["nanscore"]],
        "wrongitem.tsv:1: item id 'i99' is not in the catalog": [*common, "--human", pair["wrongitem"]],
        "--merge-budget 0: must be at least 1": [*common, "--merge-budget", 0],
        "--max-recall-drop 2.0: expected a share": [*common, "--max-recall-drop", 2],
    }  # fmt: skip
    cases["is an INDEX, expected a MODEL"] = [*common, "--model", f"x={index_folder}"]
    for message, arguments in cases.items():
        said = fails(capsys, *arguments, *out)
        assert message.replace("\\n", "") in said, (message, said)
    assert not (tmp_path / "out").exists()


def test_a_judge_that_never_says_no_is_not_to_be_decided_by(common, world, models, capsys, tmp_path):
    yeses = tmp_path / "yeses.tsv"
    lines = (world / "judgements.tsv").read_text().splitlines()
    yeses.write_text("\n".join(line for line in lines if not line.endswith("\t0")) + "\n")
    asked = [f"file:{yeses}" if str(part).startswith("file:") else part for part in common]
    asked = [part for part in asked if part not in ("--missing", "irrelevant")]
    code, _, err = run(capsys, *asked, "--model", f"new={models[1][0]}", "--out", tmp_path / "report")
    assert code == 0, err
    words = " ".join(err.split())
    assert "It never says no, so that Precision and NovelPrecision are 1" in words
    assert "or decide by Precision" not in words


def test_models_of_a_folder_have_names_that_run_files_can_hold(common, models, capsys, tmp_path):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "a b").symlink_to(models[1][0])
    code, _, err = run(capsys, *common, "--model", f"s={tmp_path / 'sweep'}", "--out", tmp_path / "report")
    assert (code, "the name 's-a b' holds a space, which run files cannot" in " ".join(err.split())) == (
        2,
        True,
    )


def test_a_judge_that_saw_none_of_the_lists_is_reported(common, world, capsys, tmp_path):
    write(tmp_path / "judge.tsv", "q01\ti01\t1\n")
    judge = ["--judge", f"file:{tmp_path / 'judge.tsv'}", "--missing", "unknown"]
    code, _, err = run(capsys, *common, *judge, "--out", tmp_path / "report", "--quiet")
    assert code == 0
    assert re.search(r"judged nothing in the lists of base", " ".join(err.split()))


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("q01\tgone\t1\n", "1 line names an item that is not in the catalog"),
        ("q01\tgone\t1\nq03\tgone\t0\n", "2 lines name items that are not in the catalog"),
    ],
)
def test_judgements_of_unknown_items_are_counted(common, capsys, tmp_path, lines, said):
    path = write(tmp_path / "judge.tsv", "q01\ti01\t1\n" + lines)
    code, _, err = run(capsys, *common, "--judge", f"file:{path}", "--out", tmp_path / "report", "--quiet")
    assert code == 0
    assert f"judge.tsv: {said}" in " ".join(err.split())


def test_a_run_that_returns_the_query_itself_is_not_credited(common, world, index_folder, capsys, tmp_path):
    import shutil

    from tests.conftest import write_jsonl

    data = tmp_path / "data"
    shutil.copytree(world, data)
    items = [json.loads(line) for line in (data / "corpus.jsonl").read_text().splitlines()]
    texts = [json.loads(line) for line in (data / "queries.jsonl").read_text().splitlines()]
    # Queries are items: query i01 must not find item i01.
    write_jsonl(
        data / "queries.jsonl",
        [{"_id": item["_id"], "text": q["text"]} for item, q in zip(items, texts, strict=True)],
    )
    write_qrels(data / "qrels" / "test.tsv", [("i01", "i02", 1), ("i03", "i02", 1)])
    write(tmp_path / "run.trec", "i01 Q0 i01 1 0.9 x\ni01 Q0 i02 2 0.8 x\n")
    found = result(
        capsys, "eval", "--data", data, "--index", index_folder, "--run", f"x={tmp_path / 'run.trec'}",
        "--k", 1, "--base-depth", 1, "--out", tmp_path / "report",
    )  # fmt: skip
    assert found["models"]["x"]["Recall@1"] == 0.5


def test_a_run_whose_scores_are_tiny_keeps_its_order(world, index_folder, tmp_path, capsys):
    """Probabilities over a catalog differ by less than a millionth."""
    common = ["eval", "--data", world, "--index", index_folder, "--k", 1, "--base-depth", 5]
    lines = [line.split("\t") for line in (world / "qrels" / "test.tsv").read_text().splitlines()[1:]]
    best = {query: item for query, item, _ in reversed(lines)}
    rows = []
    for query, item in best.items():
        other = "i39" if item != "i39" else "i38"  # of equal scores the higher id would come first
        rows += [f"{query} Q0 {other} 2 1e-8 x", f"{query} Q0 {item} 1 2e-8 x"]
    run = write(tmp_path / "run.trec", "\n".join(rows) + "\n")
    found = result(capsys, *common, "--run", f"x={run}", "--out", tmp_path / "report")
    assert found["models"]["x"]["MRR@1"] == 1


def test_a_budget_on_what_is_known_counts_judged_items_beside_the_feedback(
    common, world, models, capsys, tmp_path
):
    """Held-out feedback as a log has it, of the base's top 5 alone, so that every other list loses recall."""
    result(capsys, *common, "--out", tmp_path / "base")
    base = lists_of(tmp_path / "base", "base")
    shutil.copytree(world, tmp_path / "log")
    pairs = [line.split("\t") for line in (world / "qrels" / "test.tsv").read_text().splitlines()[1:]]
    shown = [tuple(pair) for pair in pairs if pair[1] in base[pair[0]]]
    write_qrels(tmp_path / "log" / "qrels" / "test.tsv", shown)
    on_log = ["--data", tmp_path / "log", "--model", f"new={models[1][0]}", "--max-recall-drop", 0.5]

    clicks = result(capsys, *common, *on_log, "--out", tmp_path / "clicks")
    assert clicks["models"]["base"]["Recall@5"] == 1
    assert clicks["frontier"]["selected"] is None
    assert any("--recall-of known" in warning for warning in clicks["warnings"])

    known = result(capsys, *common, *on_log, "--recall-of", "known", "--out", tmp_path / "known")
    assert not any("--recall-of" in warning for warning in known["warnings"])
    truth: dict[str, set[str]] = {}
    for query, item, *_ in {*truth_of(world), *shown}:
        truth.setdefault(query, set()).add(item)
    for name in ("base", "new"):
        lists = lists_of(tmp_path / "known", name)
        shares = [len(set(items) & truth[query]) / len(truth[query]) for query, items in lists.items()]
        found = known["models"][name]["KnownRecall@5"]
        assert found == pytest.approx(sum(shares) / len(shares))
        assert clicks["models"][name]["KnownRecall@5"] == found
    points = {point["model"]: point for point in known["frontier"]["points"]}
    assert known["frontier"]["recall_metric"] == "KnownRecall@5"
    assert points["new"]["recall"] == known["models"]["new"]["KnownRecall@5"]
    assert known["frontier"]["selected"] == "new"
    page = (tmp_path / "known" / "report.html").read_text()
    assert "KnownRecall@5, change from base (%)" in page
    assert "KnownRecall@5" in (tmp_path / "known" / "table.md").read_text()
    assert "choose from feedback, known" in fails(
        capsys, *common, "--recall-of", "all", "--out", tmp_path / "x"
    )
    without = [*common[:5], "--k", 5, "--base-depth", 5, "--recall-of", "known", "--out", tmp_path / "x"]
    assert "it needs --judge" in fails(capsys, *without)
