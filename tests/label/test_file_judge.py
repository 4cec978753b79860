"""`--judge file:…`: graded judgements that exist, and the grade from which they are relevant."""

from __future__ import annotations

import json
import re

import pyarrow.parquet as pq
import pytest

from novelret.cli import main
from tests.commands import run


@pytest.fixture(scope="module")
def graded(world, tmp_path_factory):
    """The world's judgements with grades 1, 2 and 3 in turn."""
    path = tmp_path_factory.mktemp("graded") / "graded.tsv"
    header, *lines = (world / "judgements.tsv").read_text().splitlines()
    pairs = [line.split("\t")[:2] for line in lines]
    rows = [f"{query}\t{item}\t{1 + n % 3}" for n, (query, item) in enumerate(pairs)]
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


@pytest.fixture
def result(world, index_folder, graded, tmp_path, capsys):
    def of(command, *arguments):
        common = ["--data", world, "--index", index_folder, "--judge", f"file:{graded}", "--base-depth", 3]
        out = ["--out", tmp_path / command, "--device", "cpu", "--json", "--quiet"]
        code = main([str(part) for part in (command, *common, *arguments, *out)])
        captured = capsys.readouterr()
        return code, (json.loads(captured.out) if captured.out else {}), captured.err

    return of


def test_the_threshold_decides_which_grades_are_relevant(result, tmp_path):
    counted = {}
    for threshold in (None, 1, 2, 3):
        more = [] if threshold is None else ["--threshold", threshold]
        code, facts, err = result("label", "--depth", 12, "--force", *more)
        assert code == 0, err
        rows = pq.read_table(tmp_path / "label" / "judgements.parquet").to_pylist()
        assert {row["grade"] for row in rows} == {1.0, 2.0, 3.0}
        assert all(row["verdict"] == (row["grade"] >= (threshold or 1)) for row in rows)
        counted[threshold] = facts["verdicts"]["relevant"]
    assert counted[None] == counted[1] > counted[2] > counted[3] > 0


def test_an_evaluation_counts_from_the_threshold_on(result):
    precision = {}
    for threshold in (1, 3):
        more = ["--k", 5, "--missing", "irrelevant", "--force", "--threshold", threshold]
        code, found, err = result("eval", *more)
        assert code == 0, err
        precision[threshold] = found["models"]["base"]["Precision@5"]
    assert precision[1] > precision[3] > 0


def test_lines_that_contradict_each_other_are_told(world, index_folder, tmp_path, capsys):
    header, *lines = (world / "judgements.tsv").read_text().splitlines()
    pairs = [line.rsplit("\t", 1)[0] for line in lines]
    path = tmp_path / "both.tsv"
    path.write_text(
        "\n".join([header, *(f"{p}\t1" for p in pairs), f"{pairs[0]}\t0", f"{pairs[3]}\t1"]) + "\n"
    )
    command = ["label", "--data", world, "--index", index_folder, "--judge", f"file:{path}", "--base-depth", 3,
               "--depth", 12]  # fmt: skip
    code, _, err = run(capsys, *command, "--out", tmp_path / "labels")
    assert code == 0
    assert "1 pair called relevant in one line and irrelevant in another; the last line counts" in err


def test_queries_that_a_file_says_nothing_of_are_told_where_that_makes_noes(
    world, index_folder, tmp_path, capsys
):
    lines = (world / "judgements.tsv").read_text().splitlines()
    first = lines[1].split("\t")[0]
    (tmp_path / "part.tsv").write_text(
        "\n".join(line for line in lines if line.startswith(first + "\t")) + "\n"
    )
    command = ["label", "--data", world, "--index", index_folder, "--judge", f"file:{tmp_path}/part.tsv",
               "--base-depth", 3, "--depth", 12]  # fmt: skip
    code, _, err = run(capsys, *command, "--missing", "irrelevant", "--out", tmp_path / "a")
    assert (code, re.search(r"has no line for \d+ of \d+ queries; by --missing irrelevant", err) is None) == (
        0,
        False,
    )
    code, _, err = run(capsys, *command, "--out", tmp_path / "b")
    assert (code, "has no line for" in err) == (0, False)


def test_a_list_of_relevant_pairs_alone_is_asked_what_the_others_are(result):
    says = "calls no pair irrelevant, so all that it does not list stays unknown"
    assert says in " ".join(result("label", "--depth", 12)[2].split())
    assert says not in " ".join(
        result("label", "--depth", 12, "--missing", "irrelevant", "--force")[2].split()
    )
