"""ORCAS joined with MS MARCO's titles: what is kept, what is dropped, the splits, and broken files."""

import gzip
import json
import tracemalloc
from pathlib import Path

import pytest

from novelret.build import IndexConfig, build_index
from novelret.cli import main
from novelret.convert import writer
from novelret.convert.orcas import convert_orcas
from novelret.data.split import load_split
from tests.convert.helpers import convert, fails, pairs_of, rows_of, write_lines

DOCUMENTS = [
    # As published: document id, url, title, body; the body may hold anything but a line break.
    "D1555982\thttps://answers.yahoo.com/q\tWhat can be an example?\tbody\twith a tab",
    "D301595\thttp://childparenting.about.com/x\tDevelopmental Milestones\tbody",
    "D1359209\thttp://www.yaldahpublishing.com/\t\tno title here",
    "D2147834\thttp://www.foxnews.com/\tDevelopment of “X”\tbody",
    "D999\thttp://nobody.clicked/\tNever clicked\tbody",
]
CLICKS = [
    "10103699\tgithub\tD1555982\thttps://github.com",
    "10103700\tmilestones\tD301595\thttp://childparenting.about.com/x",
    "10103700\tmilestones\tD2147834\thttp://www.foxnews.com/",
    "10103701\tno title\tD1359209\thttp://www.yaldahpublishing.com/",
    "10103702\tmissing\tD5\thttp://gone/",
    "10103703\t\tD301595\thttp://childparenting.about.com/x",
    "10103704\tfox news\tD2147834\thttp://www.foxnews.com/",
]


@pytest.fixture
def files(tmp_path):
    return [
        "--orcas", write_lines(tmp_path / "orcas.tsv.gz", CLICKS, gz=True),
        "--documents", write_lines(tmp_path / "msmarco-docs.tsv.gz", DOCUMENTS, gz=True),
    ]  # fmt: skip


def test_clicks_are_joined_with_titles_and_drops_are_counted(files, tmp_path, capsys):
    made = convert(capsys, "orcas", *files, "--out", tmp_path / "out", "--train", 1, "--test", 1)
    items = rows_of(tmp_path / "out" / "corpus.jsonl")
    assert [(row["_id"], row["title"], row["text"]) for row in items] == [
        ("D1555982", "What can be an example?", ""),
        ("D301595", "Developmental Milestones", ""),
        ("D2147834", "Development of “X”", ""),
    ]
    queries = {row["_id"]: row["text"] for row in rows_of(tmp_path / "out" / "queries.jsonl")}
    assert queries == {"10103699": "github", "10103700": "milestones", "10103704": "fox news"}
    splits = {
        name: pairs_of(tmp_path / "out" / "qrels" / f"{name}.tsv") for name in ("base", "train", "test")
    }
    assert {name: len(pairs) for name, pairs in splits.items()} == {"base": 2, "train": 1, "test": 1}
    assert sorted(pair[:2] for pairs in splits.values() for pair in pairs) == [
        ("10103699", "D1555982"), ("10103700", "D2147834"), ("10103700", "D301595"), ("10103704", "D2147834"),
    ]  # fmt: skip
    assert (made["items"], made["queries"]) == (3, 3)
    assert made["pairs"] == {"base": 2, "train": 1, "test": 1}
    assert made["dropped"] == {
        "clicked documents with an empty title": 1,
        "pairs with an empty query": 1,
        "pairs whose document has an empty title": 1,
        "pairs whose document is not in the documents file": 1,
    }


def test_the_seed_alone_decides_the_splits(tmp_path, capsys):
    documents = write_lines(tmp_path / "docs.tsv", [f"D{n}\tu\ttitle {n}\tbody" for n in range(50)])
    lines = [f"{n}\tquery {n}\tD{n % 50}\tu" for n in range(400)]
    orders = {"a": lines, "b": lines[::-1]}
    found = {}
    for name, seed in (("a", 0), ("b", 0), ("a", 1)):
        clicks = write_lines(tmp_path / "orcas.tsv", orders[name])
        made = convert_orcas(clicks, documents, tmp_path / f"{name}{seed}", train=100, test=50, seed=seed)
        assert made.pairs == {"base": 250, "train": 100, "test": 50}
        folder = tmp_path / f"{name}{seed}" / "qrels"
        found[name, seed] = {s: set(pairs_of(folder / f"{s}.tsv")) for s in made.pairs}
    assert found["a", 0] == found["b", 0]
    assert found["a", 0]["test"] != found["a", 1]["test"]


def test_small_inputs_give_small_splits(files, tmp_path, capsys):
    made = convert(capsys, "orcas", *files, "--out", tmp_path / "out")
    assert made["pairs"] == {"base": 2, "train": 1, "test": 1}
    assert main(["convert", "orcas", *map(str, files), "--out", str(tmp_path / "again"), "--quiet"]) == 0
    assert capsys.readouterr().err.strip() == (
        "warning: pairs found: 4, fewer than --train 1,000,000 and --test 8,500; the splits are smaller: "
        "base 2, train 1, test 1"
    )


def test_the_result_can_be_indexed_and_loaded(files, tmp_path, capsys, encoder):
    convert(capsys, "orcas", *files, "--out", tmp_path / "out")
    index = build_index(IndexConfig(str(tmp_path / "out"), str(encoder), device="cpu"), tmp_path / "index")
    assert len(load_split(str(tmp_path / "out"), "train", index.catalog)) == 1


def test_a_truncated_gzip_is_one_line_and_leaves_nothing(files, tmp_path, capsys):
    path = tmp_path / "orcas.tsv.gz"
    path.write_bytes(gzip.compress("\n".join(CLICKS * 2000).encode())[:-200])
    assert "gzip data breaks off after line" in fails(capsys, "orcas", *files, "--out", tmp_path / "out")
    damaged = bytearray(
        gzip.compress("\n".join(f"{n}{line}" for n, line in enumerate(CLICKS * 2000)).encode())
    )
    damaged[len(damaged) // 2] ^= 0xFF
    path.write_bytes(damaged)
    line = fails(capsys, "orcas", *files, "--out", tmp_path / "out")
    assert "orcas.tsv.gz" in line


@pytest.mark.parametrize(
    ("name", "line", "said"),
    [
        ("orcas.tsv.gz", "1\tquery\tD1", "orcas.tsv.gz:8: 3 columns, expected 4"),
        ("orcas.tsv.gz", "1\tquery\tD1\tu\tv", "orcas.tsv.gz:8: 5 columns, expected 4"),
        ("msmarco-docs.tsv.gz", "D1\tu\ttitle", "msmarco-docs.tsv.gz:6: 3 columns, expected 4"),
        (
            "msmarco-docs.tsv.gz",
            "D301595\tu\tagain\tbody",
            "msmarco-docs.tsv.gz:6: document id 'D301595' repeats",
        ),
    ],
)
def test_malformed_lines_are_named(files, tmp_path, capsys, name, line, said):
    lines = CLICKS if name.startswith("orcas") else DOCUMENTS
    write_lines(tmp_path / name, [*lines, line], gz=True)
    assert said in fails(capsys, "orcas", *files, "--out", tmp_path / "out")


def test_bytes_that_are_not_utf8_are_named(files, tmp_path, capsys):
    data = "\n".join(CLICKS).encode() + b"\n7\tcaf\xe9\tD301595\tu\n"
    (tmp_path / "orcas.tsv.gz").write_bytes(gzip.compress(data))
    assert "orcas.tsv.gz:8: not UTF-8 (byte 0xe9)" in fails(
        capsys, "orcas", *files, "--out", tmp_path / "out"
    )


def test_a_missing_file_and_an_existing_output_are_refused(files, tmp_path, capsys):
    (tmp_path / "msmarco-docs.tsv.gz").unlink()
    assert "msmarco-docs.tsv.gz: no such file" in fails(capsys, "orcas", *files, "--out", tmp_path / "out")


def test_memory_does_not_grow_with_the_clicks(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "_RECENT", 1_000)
    documents = write_lines(tmp_path / "docs.tsv", [f"D{n}\tu\ttitle {n}\tbody" for n in range(200)])
    peaks = []
    for count in (5_000, 20_000):
        clicks = write_lines(tmp_path / "orcas.tsv", [f"{n}\tquery {n}\tD{n % 200}\tu" for n in range(count)])
        tracemalloc.start()
        convert_orcas(clicks, documents, tmp_path / f"out{count}", train=500, test=50)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # 15,000 more distinct queries: 8 bytes each in the set, 36 in the draw's buffer of at most a million keys.
    assert peaks[1] - peaks[0] < 15_000 * 100


def test_a_set_of_hashes_agrees_with_a_set(monkeypatch):
    monkeypatch.setattr(writer, "_RECENT", 7)
    hashes, truth = writer.Hashes(), set()
    for n in range(300):
        text = f"word {n * n % 101}"
        assert hashes.add(text) == (text not in truth)
        truth.add(text)
    assert len(hashes) == len(truth)
    assert "word 1" in hashes
    assert "word 2000" not in hashes


@pytest.mark.parametrize("moment", ["documents", "pairs"])
def test_goes_on_after_a_kill(files, tmp_path, capsys, monkeypatch, moment):
    whole = convert(capsys, "orcas", *files, "--out", tmp_path / "whole", "--train", 1, "--test", 1)
    real_item, real_pair, read = writer.Writer.item, writer.Writer.pair, []

    def dies(self, *args):
        raise KeyboardInterrupt

    monkeypatch.setattr(writer.Writer, "item" if moment == "documents" else "pair", dies)
    arguments = [
        "convert",
        "orcas",
        *map(str, files),
        "--out",
        str(tmp_path / "out"),
        "--train",
        "1",
        "--test",
        "1",
    ]
    assert main(arguments) == 130
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(writer.Writer, "item", lambda *a: (read.append(a[2]), real_item(*a)))
    monkeypatch.setattr(writer.Writer, "pair", real_pair)
    assert main([*arguments, "--json", "--quiet"]) == 0
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {**again, "folder": ""} == {**whole, "folder": ""}
    assert len(read) == (3 if moment == "documents" else 0)  # finished items are not read again
    names = {
        path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*") if path.is_file()
    }
    assert names == {
        path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*") if path.is_file()
    }
    for name in names - {Path("manifest.json")}:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
