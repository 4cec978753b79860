"""RecFormer's six files: histories as queries, seen products out of the rankings, the three splits."""

import json

import pytest

from novelret.build import IndexConfig, build_index
from novelret.convert.recformer import item_text
from novelret.data.catalog import open_catalog, write_catalog
from novelret.data.split import load_split
from novelret.index import base_lists
from tests.convert.helpers import convert, fails, pairs_of, rows_of

META = {
    "B00A": {"title": "red sofa", "brand": "Philips", "category": "Home Appliances"},
    "B00B": {"title": "blue lamp", "brand": "", "category": "Lights", "color": "blue"},
    "B00C": {"title": "green chair", "brand": "Ikea", "category": ["Home", "Chairs"]},
    "B00D": {"title": "grey desk", "brand": "Ikea", "category": "Desks"},
    "B00E": {"title": "", "brand": "", "category": ""},
    "B0ZZ": {"title": "not in smap", "brand": "x", "category": "y"},
}
SMAP = {"B00A": 0, "B00B": 1, "B00C": 2, "B00D": 3, "B00E": 4}
UMAP = {"A1": 0, "A2": 1, "A3": 2}
TRAIN = {"0": [0, 1], "1": [2], "2": [0, 1]}
VAL = {"0": [2], "1": [4], "2": [3]}
TEST = {"0": [3], "1": [0], "2": [1]}


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "Scientific"
    folder.mkdir()
    for name, value in (
        ("train", TRAIN),
        ("val", VAL),
        ("test", TEST),
        ("umap", UMAP),
        ("smap", SMAP),
        ("meta_data", META),
    ):
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def test_items_are_their_attributes():
    assert item_text(META["B00A"]) == "Title: red sofa Category: Home Appliances Brand: Philips"
    assert item_text(META["B00B"]) == "Title: blue lamp Category: Lights Color: blue"
    assert item_text(META["B00C"]) == "Title: green chair Category: Home Chairs Brand: Ikea"
    assert item_text(META["B00E"]) == ""


def test_a_title_cut_in_an_emoji_is_read(source, tmp_path, capsys):
    meta = (source / "meta_data.json").read_text()
    (source / "meta_data.json").write_text(meta.replace("red sofa", "red sofa \\ud83d"))
    convert(capsys, "recformer", "--source", source, "--out", tmp_path / "out")
    assert "red sofa \ufffd Category" in rows_of(tmp_path / "out" / "corpus.jsonl")[0]["text"]


def test_histories_become_queries_and_next_products_positives(source, tmp_path, capsys):
    made = convert(capsys, "recformer", "--source", source, "--out", tmp_path / "out")
    assert [row["_id"] for row in rows_of(tmp_path / "out" / "corpus.jsonl")] == [
        "B00A",
        "B00B",
        "B00C",
        "B00D",
    ]
    texts = {row["_id"]: row["text"] for row in rows_of(tmp_path / "out" / "queries.jsonl")}
    assert texts["A1-base"] == item_text(META["B00A"])
    assert texts["A1-train"] == item_text(META["B00B"]) + "\n" + item_text(META["B00A"])
    assert texts["A1-test"] == "\n".join(item_text(META[i]) for i in ("B00C", "B00B", "B00A"))
    pairs = {s: pairs_of(tmp_path / "out" / "qrels" / f"{s}.tsv") for s in ("base", "train", "test")}
    assert pairs["base"] == [("A1-base", "B00B", 1), ("A3-base", "B00B", 1)]
    assert pairs["train"] == [("A1-train", "B00C", 1), ("A3-train", "B00D", 1)]
    assert pairs["test"] == [("A1-test", "B00D", 1), ("A2-test", "B00A", 1), ("A3-test", "B00B", 1)]
    assert made["dropped"] == {
        "items without attributes": 1,
        "base: users without a history": 1,
        "train: users whose next product has no attributes": 1,
    }


def test_seen_products_are_not_ranked_but_one_bought_again_is(source, tmp_path, capsys, encoder):
    convert(capsys, "recformer", "--source", source, "--out", tmp_path / "out")
    data = str(tmp_path / "out")
    index = build_index(IndexConfig(data, str(encoder), device="cpu"), tmp_path / "index")
    split = load_split(data, "test", index.catalog)
    ids = {
        q: set(index.catalog.ids_at(split.excluded.take([row]).rows)) for row, q in enumerate(split.query_ids)
    }
    assert ids == {"A1-test": {"B00A", "B00B", "B00C"}, "A2-test": {"B00C"}, "A3-test": {"B00A", "B00D"}}
    rows, _ = base_lists(index, split, 4)
    found = {
        q: set(index.catalog.ids_at(row[row >= 0])) for q, row in zip(split.query_ids, rows, strict=True)
    }
    assert found == {q: {"B00A", "B00B", "B00C", "B00D"} - ids[q] for q in ids}


def test_ids_in_quotes_are_the_same_in_all_files(source, tmp_path, capsys):
    for name in ("smap.json", "meta_data.json"):
        text = (source / name).read_text()
        for own in ("B00A", "B00B", "B00D"):
            text = text.replace(f'"{own}"', json.dumps(f'"{own}"'))
        (source / name).write_text(text)
    out = tmp_path / "out"
    convert(capsys, "recformer", "--source", source, "--out", out)
    write_catalog(str(out), tmp_path / "items.arrow")
    catalog = open_catalog(tmp_path / "items.arrow")
    split = load_split(str(out), "test", catalog)
    assert catalog.ids_at(split.feedback_items) == ['"B00D"', '"B00A"', '"B00B"']
    assert catalog.ids_at(split.excluded.take([0]).rows) == ['"B00A"', '"B00B"', "B00C"]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("train.json", {"0": [9]}, "train.json: user '0' has item 9, which is not in smap.json"),
        ("val.json", {"7": [1]}, "val.json: user '7' is not in umap.json"),
        ("test.json", {"0": 1}, "test.json: user '0' has 1, expected a list"),
        ("smap.json", {"B00A": 0, "B00B": 0}, "smap.json: number 0 repeats"),
        ("umap.json", [1], "umap.json: expected a JSON object, found list"),
    ],
)
def test_bad_files_are_named(source, tmp_path, capsys, name, value, said):
    (source / name).write_text(json.dumps(value))
    assert said in fails(capsys, "recformer", "--source", source, "--out", tmp_path / "out")


def test_broken_json_and_missing_files_are_named(source, tmp_path, capsys):
    (source / "smap.json").write_text('{"a": 0,\n "b"')
    assert "smap.json:2: malformed JSON" in fails(
        capsys, "recformer", "--source", source, "--out", tmp_path / "out"
    )
    (source / "smap.json").write_bytes(b'{"caf\xe9": 0}')
    assert "smap.json: not UTF-8" in fails(capsys, "recformer", "--source", source, "--out", tmp_path / "out")
    (source / "smap.json").unlink()
    assert "smap.json: no such file" in fails(
        capsys, "recformer", "--source", source, "--out", tmp_path / "out"
    )
