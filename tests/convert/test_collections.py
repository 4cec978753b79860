"""MS MARCO passages, TREC collections, query-keyword logs and Hugging Face data sets."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from novelret.artifacts import Manifest, write_manifest
from novelret.cli import main
from tests import commands
from tests.convert.helpers import convert, fails, pairs_of, rows_of, write_lines


def test_msmarco_passages(tmp_path, capsys):
    collection = write_lines(
        tmp_path / "collection.tsv", ["0\tThe presence of communication", "1\tA second\tpassage", "2\t"]
    )
    queries = write_lines(
        tmp_path / "queries.train.tsv", ["121352\tdefine extreme", "634306\twhat does chattel mean"]
    )
    qrels = write_lines(
        tmp_path / "qrels.train.tsv", ["121352\t0\t0\t1", "121352\t0\t2\t1", "121352\t0\t99\t1", "5\t0\t1\t1"]
    )
    dev = write_lines(tmp_path / "queries.dev.tsv", ["634306\twhat does chattel mean"])
    dev_qrels = write_lines(tmp_path / "qrels.dev.tsv", ["634306\t0\t1\t1"])
    made = convert(
        capsys, "msmarco", "--collection", collection, "--split", f"train={queries},{qrels}",
        "--split", f"test={dev},{dev_qrels}", "--out", tmp_path / "out",
    )  # fmt: skip
    assert rows_of(tmp_path / "out" / "corpus.jsonl") == [
        {"_id": "0", "title": "", "text": "The presence of communication"},
        {"_id": "1", "title": "", "text": "A second\tpassage"},
    ]
    assert {r["_id"] for r in rows_of(tmp_path / "out" / "queries.jsonl")} == {"121352", "634306"}
    assert pairs_of(tmp_path / "out" / "qrels" / "train.tsv") == [("121352", "0", 1)]
    assert pairs_of(tmp_path / "out" / "qrels" / "test.tsv") == [("634306", "1", 1)]
    assert made["dropped"] == {
        "items without a text": 1,
        "train: queries without pairs": 1,
        "train: pairs whose item is not in the collection": 2,
        "train: pairs whose query is not in the queries file": 1,
    }


def test_a_passage_id_that_repeats_is_refused(tmp_path, capsys):
    collection = write_lines(tmp_path / "collection.tsv", ["0\ta", "0\tb"])
    queries, qrels = (
        write_lines(tmp_path / "q.tsv", ["1\tx"]),
        write_lines(tmp_path / "r.tsv", ["1\t0\t0\t1"]),
    )
    line = fails(
        capsys,
        "msmarco",
        "--collection",
        collection,
        "--split",
        f"t={queries},{qrels}",
        "--out",
        tmp_path / "out",
    )
    assert "collection.tsv:2: id '0' repeats" in line
    line = fails(
        capsys, "msmarco", "--collection", collection, "--split", f"t={queries}", "--out", tmp_path / "out"
    )
    assert "expected NAME=QUERIES,QRELS" in line


def test_a_query_id_with_two_texts_is_refused(tmp_path, capsys):
    collection = write_lines(tmp_path / "collection.tsv", ["0\ta"])
    qrels = write_lines(tmp_path / "qrels.tsv", ["1\t0\t0\t1"])
    first = write_lines(tmp_path / "first.tsv", ["1\tsofa", "1\tsofa"])
    other = write_lines(tmp_path / "other.tsv", ["2\tunused", "1\tlamp"])
    both = write_lines(tmp_path / "both.tsv", ["1\tsofa", "1\tlamp"])
    command = ["msmarco", "--collection", collection, "--out", tmp_path / "out"]
    train = ["--split", f"train={first},{qrels}"]
    said = "query id '1' came with another text before; give each text an id of its own, or keep one"
    assert f"other.tsv:2: {said}" in fails(capsys, *command, *train, "--split", f"test={other},{qrels}")
    assert f"both.tsv:2: {said}" in fails(capsys, *command, "--split", f"test={both},{qrels}")
    assert convert(capsys, *command, *train, "--split", f"test={first},{qrels}")["queries"] == 1


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a/b", "the name 'a/b' begins with a dot or holds a path separator"),
        (".a", "the name '.a' begins with a dot or holds a path separator"),
        ("", "a name is empty"),
        ("train", "the name 'train' repeats"),
    ],
)
def test_split_names_are_checked_before_anything_is_read(tmp_path, capsys, name, said):
    out, missing = ["--out", tmp_path / "out"], tmp_path / "missing"
    files = ["--split", f"train={missing},{missing}", "--split", f"{name}={missing},{missing}"]
    assert said in fails(capsys, "msmarco", "--collection", missing, *files, *out)
    assert said in fails(capsys, "trec", "--corpus", missing, *files, *out)
    theirs = ["--split", "train=x", "--split", f"{name}=y"]
    assert said in fails(capsys, "hf", "--dataset", missing, *theirs, *out)


SGML = """<DOC>
<DOCNO> FBIS3-1 </DOCNO>
<HEADLINE> Sofa &amp; chairs </HEADLINE>
<TEXT>
Grey <b>sofas</b> are
cheap, < $5.
</TEXT>
</DOC>
<DOC>
<DOCNO>FT911-3</DOCNO>
<TEXT>Lamps.</TEXT>
</DOC>
"""
TOPICS = """<top>

<num> Number: 301
<title> International Organized Crime

<desc> Description:
Identify organizations.
</top>
<top>
<num> Number: 302
<title> Poliomyelitis < cholera
<desc> Description:
x
</top>
"""
XML_TOPICS = """<topics task="COVIDSearch">
  <topic number="1">
    <query>coronavirus origin</query>
    <question>what is the origin of COVID-19</question>
  </topic>
  <topic number="2">
    <query>weather &amp; virus</query>
  </topic>
</topics>
"""


def test_trec_markup(tmp_path, capsys):
    (tmp_path / "docs").write_text(SGML)
    (tmp_path / "topics.txt").write_text(TOPICS)
    qrels = write_lines(tmp_path / "qrels.txt", ["301 0 FBIS3-1 1", "301 0 FT911-3 0", "302 0 FT911-3 2"])
    made = convert(
        capsys, "trec", "--corpus", tmp_path / "docs", "--split", f"test={tmp_path / 'topics.txt'},{qrels}",
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert rows_of(tmp_path / "out" / "corpus.jsonl") == [
        {"_id": "FBIS3-1", "title": "Sofa & chairs", "text": "Grey sofas are cheap, < $5."},
        {"_id": "FT911-3", "title": "", "text": "Lamps."},
    ]
    assert rows_of(tmp_path / "out" / "queries.jsonl") == [
        {"_id": "301", "text": "International Organized Crime"},
        {"_id": "302", "text": "Poliomyelitis < cholera"},
    ]
    assert pairs_of(tmp_path / "out" / "qrels" / "test.tsv") == [
        ("301", "FBIS3-1", 1), ("301", "FT911-3", 0), ("302", "FT911-3", 2),
    ]  # fmt: skip
    assert made["dropped"] == {}


def test_trec_json_documents_and_xml_topics(tmp_path, capsys):
    docs = write_lines(
        tmp_path / "docs.jsonl",
        [json.dumps({"id": 0, "contents": "origin"}), json.dumps({"docno": "b", "title": "t", "id": None})],
    )
    (tmp_path / "topics.xml").write_text(XML_TOPICS)
    qrels = write_lines(tmp_path / "qrels.txt", ["1 0 0 1", "2 0 b 1"])
    convert(
        capsys,
        "trec",
        "--corpus",
        docs,
        "--split",
        f"test={tmp_path / 'topics.xml'},{qrels}",
        "--out",
        tmp_path / "out",
    )
    assert rows_of(tmp_path / "out" / "queries.jsonl") == [
        {"_id": "1", "text": "coronavirus origin"}, {"_id": "2", "text": "weather & virus"},
    ]  # fmt: skip
    assert rows_of(tmp_path / "out" / "corpus.jsonl") == [
        {"_id": "0", "title": "", "text": "origin"}, {"_id": "b", "title": "t", "text": ""},
    ]  # fmt: skip


def test_trec_json_texts_are_strings_or_numbers(tmp_path, capsys):
    (tmp_path / "topics.xml").write_text(XML_TOPICS)
    qrels = write_lines(tmp_path / "qrels.txt", ["1 0 0 1"])
    rest = ["--split", f"test={tmp_path / 'topics.xml'},{qrels}", "--out", tmp_path / "out"]
    for row in (
        {"id": 0, "contents": ["a", "b"]},
        {"id": 0, "title": {"a": "b"}},
        {"id": ["0"], "text": "a"},
    ):
        docs = write_lines(tmp_path / "docs.jsonl", [json.dumps(row)])
        said = fails(capsys, "trec", "--corpus", docs, *rest)
        assert "docs.jsonl:1: the " in said
        assert "make it a string, or a number" in said
    docs = write_lines(tmp_path / "docs.jsonl", ['{"id": 0, "title": NaN, "text": NaN, "body": "b"}'])
    convert(capsys, "trec", "--corpus", docs, *rest)
    assert rows_of(tmp_path / "out" / "corpus.jsonl") == [{"_id": "0", "title": "", "text": "b"}]


def test_trec_files_cut_off_are_named(tmp_path, capsys):
    (tmp_path / "docs").write_text(SGML[:-8])
    (tmp_path / "topics.txt").write_text(TOPICS)
    qrels = write_lines(tmp_path / "qrels.txt", ["301 0 FBIS3-1 1"])
    part = f"test={tmp_path / 'topics.txt'},{qrels}"
    line = fails(capsys, "trec", "--corpus", tmp_path / "docs", "--split", part, "--out", tmp_path / "out")
    assert "docs:9: <doc> is not closed" in line


def test_trec_documents_and_topics_may_share_lines(tmp_path, capsys):
    docs = write_lines(
        tmp_path / "docs",
        [
            "<DOC><DOCNO>A</DOCNO>a</DOC><DOC><DOCNO>B</DOCNO>b</DOC> <DOC>",
            "<DOCNO>C</DOCNO>c</DOC> <DOC><DOCNO>D</DOCNO>",
            "d</DOC>",
        ],
    )
    topics = write_lines(
        tmp_path / "topics.xml",
        [
            '<topics><topic number="1"><query>x</query></topic><topic number="2"><query>y</query></topic></topics>'
        ],
    )
    tops = write_lines(
        tmp_path / "tops", ["<xml><top><num>3<title>z</top><top>", "<num>4", "<title>w", "</top></xml>"]
    )
    qrels = write_lines(tmp_path / "qrels", [f"{number} 0 A 1" for number in range(1, 5)])
    convert(
        capsys, "trec", "--corpus", docs, "--split", f"a={topics},{qrels}", "--split", f"b={tops},{qrels}",
        "--out", tmp_path / "out",
    )  # fmt: skip
    found = [(row["_id"], row["text"]) for row in rows_of(tmp_path / "out" / "corpus.jsonl")]
    assert found == [("A", "a"), ("B", "b"), ("C", "c"), ("D", "d")]
    found = [(row["_id"], row["text"]) for row in rows_of(tmp_path / "out" / "queries.jsonl")]
    assert found == [("1", "x"), ("2", "y"), ("3", "z"), ("4", "w")]


@pytest.mark.parametrize("judged", ["51", "051"])
def test_topic_numbers_match_whatever_their_leading_zeros(tmp_path, capsys, judged):
    (tmp_path / "docs").write_text(SGML)
    topics = write_lines(tmp_path / "topics", ["<top>", "<num> Number: 051", "<title> Airbus", "</top>"])
    qrels = write_lines(tmp_path / "qrels", [f"{judged} 0 FBIS3-1 1"])
    made = convert(
        capsys, "trec", "--corpus", tmp_path / "docs", "--split", f"test={topics},{qrels}", "--out", tmp_path / "out",
    )  # fmt: skip
    assert made["dropped"] == {}
    assert rows_of(tmp_path / "out" / "queries.jsonl") == [{"_id": judged, "text": "Airbus"}]
    assert pairs_of(tmp_path / "out" / "qrels" / "test.tsv") == [(judged, "FBIS3-1", 1)]


def test_query_keyword_logs(tmp_path, capsys):
    log = write_lines(
        tmp_path / "log.tsv",
        [
            "query\tkeyword\tcount",
            *(f"query {n % 7}\tkeyword {n}\t{n + 1}" for n in range(20)),
            "\tx\t1",
            "rare\tkeyword 1\t0.5",
        ],
    )
    pool = write_lines(tmp_path / "pool.txt", ["keyword 3", "never clicked"])
    made = convert(
        capsys,
        "query-keyword",
        "--pairs",
        log,
        "--keywords",
        pool,
        "--train",
        5,
        "--test",
        3,
        "--out",
        tmp_path / "out",
    )
    assert made["pairs"] == {"base": 12, "train": 5, "test": 3}
    assert made["dropped"] == {"pairs with an empty query or keyword": 1, "pairs seen less than 1 times": 1}
    items = {row["_id"]: row["text"] for row in rows_of(tmp_path / "out" / "corpus.jsonl")}
    assert sorted(items.values()) == sorted([*(f"keyword {n}" for n in range(20)), "never clicked"])
    queries = {row["_id"]: row["text"] for row in rows_of(tmp_path / "out" / "queries.jsonl")}
    assert sorted(queries.values()) == [f"query {n}" for n in range(7)]
    found = {
        (queries[q], items[i], s)
        for split in made["pairs"]
        for q, i, s in pairs_of(tmp_path / "out" / "qrels" / f"{split}.tsv")
    }
    assert found == {(f"query {n % 7}", f"keyword {n}", n + 1) for n in range(20)}


def test_small_logs_give_small_splits_and_say_so(tmp_path, capsys):
    log = write_lines(tmp_path / "log.tsv", [f"query {n}\tkeyword {n}\t1" for n in range(5)])
    command = ["convert", "query-keyword", "--pairs", str(log), "--quiet"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().err.strip() == (
        "warning: pairs found: 5, fewer than --train 1,230,000 and --test 6,200; the splits are smaller: "
        "base 2, train 2, test 1"
    )
    counts = {s: len(pairs_of(tmp_path / "out" / "qrels" / f"{s}.tsv")) for s in ("base", "train", "test")}
    assert counts == {"base": 2, "train": 2, "test": 1}
    assert main([*command, "--train", "3", "--test", "2", "--out", str(tmp_path / "asked")]) == 0
    assert capsys.readouterr().err == ""  # as asked for


def test_a_count_that_is_no_number_is_named(tmp_path, capsys):
    log = write_lines(tmp_path / "log.tsv", ["a\tb\t1", "c\td\tmany"])
    line = fails(capsys, "query-keyword", "--pairs", log, "--out", tmp_path / "out")
    assert "log.tsv:2: the count 'many' is not a number" in line


@pytest.mark.parametrize("count", ["inf", "nan"])
def test_a_count_that_is_not_finite_is_named(tmp_path, capsys, count):
    log = write_lines(tmp_path / "log.tsv", ["a\tb\t1", f"c\td\t{count}"])
    line = fails(capsys, "query-keyword", "--pairs", log, "--out", tmp_path / "out")
    assert f"log.tsv:2: the count '{count}' is not finite" in line


def test_counts_keep_their_digits(tmp_path, capsys):
    counts = ["1234567", "0.12345678", "20000000000000000"]
    log = write_lines(tmp_path / "log.tsv", [f"a{count}\tb\t{count}" for count in counts])
    options = ["--min-count", 0, "--train", 0, "--test", 3]
    convert(capsys, "query-keyword", "--pairs", log, *options, "--out", tmp_path / "out")
    lines = (tmp_path / "out" / "qrels" / "test.tsv").read_text().splitlines()
    assert [line.split("\t")[2] for line in lines[1:]] == counts


def test_a_least_count_that_is_no_number_is_refused(tmp_path, capsys):
    log = write_lines(tmp_path / "log.tsv", ["a\tb\t1"])
    line = fails(capsys, "query-keyword", "--pairs", log, "--min-count", "nan", "--out", tmp_path / "out")
    assert "--min-count nan: must be a number" in line


@pytest.mark.parametrize("size", ["--train", "--test"])
def test_sizes_below_zero_are_refused(tmp_path, capsys, size):
    log = write_lines(tmp_path / "log.tsv", ["a\tb\t1"])
    line = fails(capsys, "query-keyword", "--pairs", log, f"{size}=-5", "--out", tmp_path / "out")
    assert f"{size} -5" in line
    assert "must not be below 0" in line


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "pairs"
    folder.mkdir()
    table = {
        "question": ["who", "what", "", "who"],
        "answers": [["a", "b"], ["c"], ["d"], ["b"]],
        "n": [1.0, 2.0, 3.0, 4.0],
    }
    pq.write_table(pa.table(table), folder / "train-00000.parquet")
    pq.write_table(
        pa.table({"question": ["how"], "answers": [["e"]], "n": [1.0]}), folder / "test-00000.parquet"
    )
    return folder


def test_hugging_face_pairs(dataset, tmp_path, capsys):
    made = convert(
        capsys, "hf", "--dataset", dataset, "--query-column", "question", "--item-column", "answers",
        "--score-column", "n", "--split", "train", "--split", "held=test", "--out", tmp_path / "out",
    )  # fmt: skip
    items = {row["_id"]: row["text"] for row in rows_of(tmp_path / "out" / "corpus.jsonl")}
    queries = {row["_id"]: row["text"] for row in rows_of(tmp_path / "out" / "queries.jsonl")}
    assert sorted(items.values()) == ["a", "b", "c", "e"]
    named = [(queries[q], items[i], s) for q, i, s in pairs_of(tmp_path / "out" / "qrels" / "train.tsv")]
    assert named == [("who", "a", 1), ("who", "b", 1), ("what", "c", 2), ("who", "b", 4)]
    assert len(pairs_of(tmp_path / "out" / "qrels" / "held.tsv")) == 1
    assert made["dropped"] == {"train: rows with an empty query": 1}


def test_hugging_face_rows_without_an_id_are_dropped_and_counted(dataset, tmp_path, capsys):
    (dataset / "test-00000.parquet").unlink()
    table = {
        "query": list("abcd"),
        "document": list("efgh"),
        "q": [0, None, 2, 3],
        "i": ["x", "y", None, "z"],
    }
    pq.write_table(pa.table(table), dataset / "train-00000.parquet")
    made = convert(
        capsys, "hf", "--dataset", dataset, "--query-id-column", "q", "--item-id-column", "i", "--out", tmp_path / "out",
    )  # fmt: skip
    assert [p[:2] for p in pairs_of(tmp_path / "out" / "qrels" / "train.tsv")] == [("0", "x"), ("3", "z")]
    assert made["dropped"] == {"train: rows without a query id": 1, "train: rows without an item id": 1}


@pytest.mark.parametrize(("column", "kind"), [("query", "query"), ("document", "item"), ("title", "item")])
def test_hugging_face_ids_with_two_texts_are_refused(dataset, tmp_path, capsys, column, kind):
    (dataset / "test-00000.parquet").unlink()
    table = {"query": list("aaa"), "document": list("bbb"), "title": list("ccc"), "n": [7, 7, 7]}
    table[column][2] = "other"
    pq.write_table(pa.table(table), dataset / "train-00000.parquet")
    common = ["hf", "--dataset", dataset, "--title-column", "title", "--out", tmp_path / "out"]
    said = fails(capsys, *common, f"--{kind}-id-column", "n")
    assert f"(train): row 3: {kind} id '7' came with another text before" in said


def test_hugging_face_scores_that_are_not_finite_are_named(dataset, tmp_path, capsys):
    table = {"query": ["a"], "document": ["b"], "n": [float("nan")]}
    for name in ("train", "test"):
        pq.write_table(pa.table(table), dataset / f"{name}-00000.parquet")
    said = fails(capsys, "hf", "--dataset", dataset, "--score-column", "n", "--out", tmp_path / "out")
    assert "row 1: the score nan is not finite" in said


def test_ids_that_index_would_refuse_are_refused(dataset, tmp_path, capsys):
    (dataset / "test-00000.parquet").unlink()
    table = {"query": ["a"], "document": ["b"], "i": ["B 7"]}
    pq.write_table(pa.table(table), dataset / "train-00000.parquet")
    said = fails(capsys, "hf", "--dataset", dataset, "--item-id-column", "i", "--out", tmp_path / "out")
    assert "(train): row 1: the _id 'B 7' holds a space" in said


def test_hugging_face_texts_are_strings_or_numbers(dataset, tmp_path, capsys):
    (dataset / "test-00000.parquet").unlink()
    path, common = dataset / "train-00000.parquet", ["hf", "--dataset", dataset, "--out", tmp_path / "out"]
    for column in ("query", "t"):
        table = {"query": ["a"], "document": ["b"], "t": ["c"]} | {column: [["x", "y"]]}
        pq.write_table(pa.table(table), path)
        said = fails(capsys, *common, "--title-column", "t")
        assert f"row 1: the {column} is of type list; make it a string, or a number" in said
    pq.write_table(pa.table({"query": ["a", "b"], "document": ["b", "c"], "t": [float("nan"), 2.5]}), path)
    convert(capsys, *common, "--title-column", "t")
    assert [row["title"] for row in rows_of(tmp_path / "out" / "corpus.jsonl")] == ["", "2.5"]


def test_hugging_face_files_that_break_off_are_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "pairs"
    folder.mkdir()
    good = json.dumps({"query": "a", "document": "b"})
    (folder / "train-0.jsonl").write_text(f"{good}\n")
    (folder / "train-1.jsonl").write_text('{"query": broken')
    said = fails(capsys, "hf", "--dataset", folder, "--out", tmp_path / "out")
    assert "(train): cannot be read behind row 1 (" in said
    assert not (tmp_path / "out").exists()


def test_hugging_face_columns_and_splits_are_checked(dataset, tmp_path, capsys):
    common = ["hf", "--dataset", dataset, "--out", tmp_path / "out"]
    assert "has no column 'query' (it has: question, answers, n)" in fails(capsys, *common)
    assert "has no split 'dev'" in fails(capsys, *common, "--split", "dev")


def test_force_replaces_data_alone(tmp_path, capsys):
    log = write_lines(tmp_path / "log.tsv", ["a query\ta keyword\t3"])
    out = tmp_path / "out"
    out.mkdir()
    write_manifest(out, Manifest("index", {}, {}, "x"))
    said = commands.fails(capsys, "convert", "query-keyword", "--pairs", log, "--out", out, "--force")
    assert "is an INDEX, which --force does not replace by a data folder" in said
