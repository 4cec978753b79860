"""Queries without feedback: labelled, trained on and evaluated beside the others."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from novelret.data.split import load_split
from novelret.index import base_lists, open_index
from tests.cli.test_chain import TRAIN, fails, result
from tests.conftest import write_qrels


def rows_of(path):
    return [tuple(line.split("\t")) for line in path.read_text().splitlines()[1:]]


def unclick(data, split, some):
    """Take the feedback of some queries away and name them as unclicked."""
    kept = [row for row in rows_of(data / "qrels" / f"{split}.tsv") if row[0] not in some]
    write_qrels(data / "qrels" / f"{split}.tsv", kept)
    (data / "unclicked").mkdir(exist_ok=True)
    (data / "unclicked" / f"{split}.tsv").write_text("query-id\n" + "".join(f"{query}\n" for query in some))


@pytest.fixture(scope="module")
def data(world, tmp_path_factory):
    """The tiny world, in which every other query of both splits has no feedback."""
    folder = tmp_path_factory.mktemp("unclicked") / "data"
    shutil.copytree(world, folder)
    for split in ("train", "test"):
        unclick(folder, split, sorted({row[0] for row in rows_of(folder / "qrels" / f"{split}.tsv")})[::2])
    return folder


@pytest.fixture(scope="module")
def common(data, index_folder):
    return ("--data", data, "--index", index_folder)


@pytest.fixture
def judge(data):
    return ("--judge", f"file:{data / 'judgements.tsv'}", "--missing", "irrelevant")


def test_the_chain_serves_them(data, common, judge, index_folder, tmp_path, capsys):
    unclicked = {
        query for split in ("train", "test") for (query,) in rows_of(data / "unclicked" / f"{split}.tsv")
    }
    labels, model, report = tmp_path / "labels", tmp_path / "model", tmp_path / "report"
    result(capsys, "label", *common, *judge, "--base-depth", 3, "--depth", 12, "--out", labels)
    asked = {row["query_id"] for row in pq.read_table(labels / "judgements.parquet").to_pylist()}
    assert len(asked) == 20
    assert len(asked & unclicked) == 10

    trained = result(
        capsys, "train", *common, "--labels", labels, "--validation-fraction", 0.4, *TRAIN, "--out", model
    )
    assert trained["chosen"]["relevant_novel"] > 0
    points = json.loads((model / "validation.json").read_text())
    assert all(0 <= point["recall"] <= 1 and point["recall_error"] >= 0 for point in points)

    found = result(
        capsys, "eval", *common, *judge, "--model", f"new={model}", "--base-depth", 3, "--k", 3, "--out", report
    )  # fmt: skip
    assert (found["queries"], found["queries_with_feedback"]) == (20, 10)
    table = pq.read_table(report / "per_query.parquet").to_pandas()
    new = table[table.model == "new"].set_index("query_id")
    without = [query for query in new.index if query in unclicked]
    assert len(without) == 10
    assert new.loc[without, ["Recall@3", "nDCG@3", "MRR@3"]].isna().all().all()
    assert new.drop(without)["Recall@3"].notna().all()
    assert found["models"]["new"]["Recall@3"] == pytest.approx(new["Recall@3"].mean())
    assert found["models"]["new"]["RelevantNovel@3"] == pytest.approx(new["RelevantNovel@3"].mean())
    assert new.loc[without, "RelevantNovel@3"].sum() > 0
    json.loads((report / "metrics.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    page = (report / "report.html").read_text()
    assert "20 queries of split test (10 with feedback, over which recall is measured)" in page
    assert "nan" not in page.split("<h2>Side by side")[0]

    compared = result(
        capsys, "compare", *common, "--split", "test", "--model", f"new={model}", "--base-depth", 3, "--k", 3,
        "--query-id", without[0],
    )  # fmt: skip
    assert compared["queries"][0]["recall_change"] is None


def test_deployed_recall_is_that_of_queries_with_feedback(
    data, common, judge, index_folder, tmp_path, capsys
):
    found = result(capsys, "eval", *common, "--k", 3, "--base-depth", 3, "--out", tmp_path / "report")
    index = open_index(index_folder)
    split = load_split(str(data), "test", index.catalog)
    lists = index.catalog.ids_at(base_lists(index, split, 3)[0].ravel())
    top = {query: set(lists[3 * row : 3 * row + 3]) for row, query in enumerate(split.query_ids)}
    liked: dict[str, set[str]] = {}
    for query, item, _ in rows_of(data / "qrels" / "test.tsv"):
        liked.setdefault(query, set()).add(item)
    expected = np.mean([len(top[query] & items) / len(items) for query, items in liked.items()])
    assert found["models"]["base"]["Recall@3"] == pytest.approx(expected)


def test_an_adapter_learns_from_their_labels_alone(data, common, judge, tmp_path, capsys):
    """With every feedback query held out of the labels, only unclicked ones have states to reward."""
    labels = tmp_path / "labels"
    unclicked = {query for (query,) in rows_of(data / "unclicked" / "train.tsv")}
    pairs = [row for row in rows_of(data / "judgements.tsv") if row[0] in unclicked]
    write_qrels(tmp_path / "some.tsv", pairs)
    result(
        capsys, "label", *common, "--judge", f"file:{tmp_path / 'some.tsv'}", "--base-depth", 3, "--depth", 12,
        "--out", labels,
    )  # fmt: skip
    model = tmp_path / "model"
    result(
        capsys,
        "train",
        *common,
        "--labels",
        labels,
        *TRAIN,
        "--validation-fraction",
        0,
        "--gamma",
        0,
        "--out",
        model,
    )
    found = result(
        capsys, "eval", *common, *judge, "--split", "train", "--model", f"new={model}", "--base-depth", 3, "--k", 3,
        "--out", tmp_path / "report",
    )["models"]  # fmt: skip
    assert found["new"]["RelevantNovel@3"] > 0.1
    assert found["base"]["RelevantNovel@3"] == 0


def test_bad_lines_and_ids_are_named(data, common, judge, tmp_path, capsys):
    broken = tmp_path / "data"
    shutil.copytree(data, broken)
    path = broken / "unclicked" / "train.tsv"
    label = (
        "label",
        "--data",
        broken,
        *common[2:],
        *judge,
        "--base-depth",
        3,
        "--depth",
        12,
        "--out",
        tmp_path / "out",
    )
    path.write_text("query-id\nq00\ti01\n")
    assert f"{path}:2: several columns" in fails(capsys, *label)
    path.write_text("q00\nnobody\n")
    assert f"{path}:2: query id 'nobody' is not in the queries file" in fails(capsys, *label)


def test_held_back_queries_need_feedback(data, common, judge, tmp_path, capsys):
    few = tmp_path / "data"
    shutil.copytree(data, few)
    rows = rows_of(few / "qrels" / "train.tsv")
    queries = sorted({row[0] for row in rows_of(data / "qrels" / "train.tsv")})
    every = [*queries, *(query for (query,) in rows_of(few / "unclicked" / "train.tsv"))]
    write_qrels(few / "qrels" / "train.tsv", [row for row in rows if row[0] == queries[0]])
    (few / "unclicked" / "train.tsv").write_text("".join(f"{query}\n" for query in every[1:]))
    labels = tmp_path / "labels"
    here = ("--data", few, *common[2:])
    result(capsys, "label", *here, *judge, "--base-depth", 3, "--depth", 12, "--out", labels)
    said = fails(
        capsys,
        "train",
        *here,
        "--labels",
        labels,
        *TRAIN,
        "--validation-fraction",
        0.2,
        "--out",
        tmp_path / "m",
    )
    assert "has feedback (1 of the split's 20 have)" in said
    assert not (tmp_path / "m").exists()
