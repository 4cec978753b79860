"""Reading what users bring, and every way in which it can be wrong."""

import csv
import gzip
import math
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from novelret.data import catalog as data_catalog
from novelret.data import source
from novelret.data.catalog import Catalog, open_catalog, take_rows, write_catalog
from novelret.data.source import (
    quoted,
    read_part,
    read_qrels,
    read_qrels_blocks,
    read_qrels_file,
    read_unclicked,
)
from novelret.data.split import load_queries, load_split
from novelret.errors import UserError
from novelret.progress import Reporter
from tests.conftest import make_world, write_jsonl, write_qrels


@pytest.fixture
def data(tmp_path):
    return make_world(tmp_path / "data")


def catalog_of(data, tmp_path):
    write_catalog(str(data), tmp_path / "items.arrow")
    return open_catalog(tmp_path / "items.arrow")


def test_catalog_keeps_order_and_finds_rows(data, tmp_path, monkeypatch):
    catalog = catalog_of(data, tmp_path)
    assert len(catalog) == 40
    assert catalog.ids_at([3, 0]) == ["i03", "i00"]
    assert catalog.texts_at([0]) == ["red sofa"]
    assert catalog.rows_of(["i05", "nope", "i05"]).tolist() == [5, -1, 5]
    assert catalog.rows_of([]).tolist() == []
    chunked = Catalog(
        pa.chunked_array([["i0", "i1"], [], ["i2", "i3", "i4"], ["i5"]], pa.large_string()), catalog.texts
    )
    for at_once in (1, 2, 4, 100):
        monkeypatch.setattr(data_catalog, "_LOOKED_UP", at_once)
        assert chunked.rows_of(["i4", "i9", "i0", "i5", "i4", "i2"]).tolist() == [4, -1, 0, 5, 4, 2]


def test_rows_are_taken_without_a_copy_of_the_column():
    texts = [f"item {n} " + "long " * 200 for n in range(1000)]
    chunks = [texts[:7], [], *(texts[start : start + 90] for start in range(7, 1000, 90))]
    column = pa.chunked_array([pa.array(chunk, pa.large_string()) for chunk in chunks])
    rows = np.random.default_rng(0).integers(0, 1000, 50)
    before, pool = pa.default_memory_pool(), pa.system_memory_pool()  # of which nothing was taken so far
    pa.set_memory_pool(pool)
    try:
        found = take_rows(column, rows)
    finally:
        pa.set_memory_pool(before)
    assert found.to_pylist() == [texts[row] for row in rows]
    assert pool.max_memory() < column.nbytes / 4
    assert take_rows(column, []).to_pylist() == []
    assert take_rows(column, range(5, 9)).to_pylist() == texts[5:9]
    with pytest.raises(IndexError):
        take_rows(column, [1000])


def test_title_and_text_are_joined(data, tmp_path):
    write_jsonl(
        data / "corpus.jsonl", [{"_id": "a", "title": "one", "text": "two"}, {"_id": "b", "text": "x"}]
    )
    assert catalog_of(data, tmp_path).texts_at([0, 1]) == ["one two", "x"]


def test_a_corpus_of_titles_alone_is_told(data, tmp_path):
    rows = [{"_id": "a", "title": "one"}, {"_id": "b", "title": "two", "text": ""}]
    for more, warnings in ([], 1), ([{"_id": "c", "text": "three"}], 0):
        write_jsonl(data / "corpus.jsonl", [*rows, *more])
        report = Reporter()
        write_catalog(str(data), tmp_path / "items.arrow", report)
        assert len(report.warnings) == warnings
        assert all("no item has a `text`" in warning for warning in report.warnings)
    assert open_catalog(tmp_path / "items.arrow").texts_at(range(3)) == ["one", "two", "three"]


def test_an_empty_cell_of_a_table_is_no_text(data, tmp_path):
    """As pandas writes it, NaN."""
    nan = float("nan")
    write_jsonl(
        data / "corpus.jsonl", [{"_id": "a", "title": nan, "text": "x"}, {"_id": 0, "title": 7, "text": nan}]
    )
    assert catalog_of(data, tmp_path).texts_at([0, 1]) == ["x", "7"]
    for row, said in (
        ({"_id": "a", "title": nan, "text": nan}, "item 'a' has neither title nor text"),
        ({"_id": nan, "text": "x"}, "corpus.jsonl:1: no _id"),
    ):
        write_jsonl(data / "corpus.jsonl", [row])
        with pytest.raises(UserError, match=said):
            catalog_of(data, tmp_path)


@pytest.mark.parametrize(
    "line", ['{"_id": ' + "1" * 5_000 + ', "text": "a"}', '{"_id": "a", "text": ' + "[" * 100_000]
)
def test_what_python_cannot_read_as_json_is_named(data, tmp_path, line):
    (data / "corpus.jsonl").write_text(line)
    with pytest.raises(UserError, match=r"corpus.jsonl:1: (JSON that cannot be read|malformed)"):
        catalog_of(data, tmp_path)


@pytest.mark.parametrize("header", [True, False])
def test_qrels_header_is_detected(data, header):
    write_qrels(data / "qrels" / "train.tsv", [("q00", "i01", 1)], header=header)
    assert [row[1:] for row in read_qrels(str(data), "train")] == [("q00", "i01", 1.0)]


@pytest.mark.parametrize("score", ["1,5", "1.O", "", "-"])
def test_a_first_line_with_a_slip_in_its_score_is_no_header(data, score):
    path = data / "qrels" / "train.tsv"
    path.write_text(f"q00\ti01\t{score}\nq00\ti02\t1\n")
    with pytest.raises(UserError, match=rf"{path}:1: .*(is not a number|2 columns)"):
        list(read_qrels(str(data), "train"))
    with pytest.raises(UserError, match=rf"{path}:1: "):
        list(read_qrels_blocks(path))


def test_trec_qrels_are_read(data):
    (data / "qrels" / "train.tsv").write_text("q00 0 i01 2\n")
    assert [row[1:] for row in read_qrels(str(data), "train")] == [("q00", "i01", 2.0)]


def test_gzipped_and_parquet_read_the_same(data):
    plain = [row for _, row in read_part(str(data), "corpus")]
    file = data / "corpus.jsonl"
    (data / "corpus.jsonl.gz").write_bytes(gzip.compress(file.read_bytes()))
    file.unlink()
    assert [row for _, row in read_part(str(data), "corpus")] == plain
    (data / "corpus.jsonl.gz").unlink()
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(plain), data / "corpus.parquet")
    assert [row for _, row in read_part(str(data), "corpus")] == plain


def test_hugging_face_data_set_reads_like_the_folder(data, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub = tmp_path / "hub"
    for part in ("corpus", "queries"):
        (hub / part).mkdir(parents=True)
        shutil.copy(data / f"{part}.jsonl", hub / part / f"{part}.jsonl")
    (hub / "default").mkdir()
    pairs = [{"query-id": q, "corpus-id": i, "score": s} for _, q, i, s in read_qrels(str(data), "train")]
    write_jsonl(hub / "default" / "train.jsonl", pairs)
    (hub / "README.md").write_text(
        "---\nconfigs:\n"
        "- config_name: corpus\n  data_files: corpus/corpus.jsonl\n"
        "- config_name: queries\n  data_files: queries/queries.jsonl\n"
        "- config_name: default\n  data_files:\n  - split: train\n    path: default/train.jsonl\n"
        "---\n"
    )
    assert [r for _, r in read_part(str(hub), "corpus")] == [r for _, r in read_part(str(data), "corpus")]
    assert [r[1:] for r in read_qrels(str(hub), "train")] == [r[1:] for r in read_qrels(str(data), "train")]
    with pytest.raises(UserError, match="no qrels split 'dev'"):
        list(read_qrels(str(hub), "dev"))


def test_all_splits_of_a_hugging_face_data_set_are_one_catalog(data, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub = tmp_path / "hub"
    items = [row for _, row in read_part(str(data), "corpus")]
    for name, rows in {"dev": items[:25], "test": items[20:]}.items():  # some lie in both
        (hub / "corpus").mkdir(parents=True, exist_ok=True)
        write_jsonl(hub / "corpus" / f"{name}.jsonl", rows)
    for config, split in (("qrels", "test"), ("default", "train")):
        (hub / config).mkdir()
        write_jsonl(hub / config / f"{split}.jsonl", [{"query-id": "q", "corpus-id": split, "score": 1}])
    files = {"corpus": ("dev", "test"), "qrels": ("test",), "default": ("train",)}
    (hub / "README.md").write_text(
        "---\nconfigs:\n"
        + "".join(
            f"- config_name: {config}\n  data_files:\n"
            + "".join(f"  - split: {split}\n    path: {config}/{split}.jsonl\n" for split in splits)
            for config, splits in files.items()
        )
        + "---\n"
    )
    assert [row for _, row in read_part(str(hub), "corpus")] == items
    for split in ("train", "test"):
        assert [row[1:] for row in read_qrels(str(hub), split)] == [("q", split, 1.0)]


def test_identical_ids_are_left_out_unless_asked_for(data, tmp_path):
    catalog = catalog_of(data, tmp_path)
    write_jsonl(data / "queries.jsonl", [{"_id": "i01", "text": "x"}])
    write_qrels(data / "qrels" / "train.tsv", [("i01", "i01", 1), ("i01", "i02", 1)])
    split = load_split(str(data), "train", catalog)
    assert (split.feedback_items.tolist(), split.excluded.rows.tolist()) == ([2], [1])
    split = load_split(str(data), "train", catalog, ignore_identical_ids=False)
    assert (split.feedback_items.tolist(), split.excluded.rows.tolist()) == ([1, 2], [])


def test_pairs_are_sorted_single_and_count_every_bad_line(data, tmp_path):
    qrels = data / "qrels" / "train.tsv"
    rows = ["q02\ti30\t1", "q00\ti07\t1", "q02\ti04\t2", "q00\ti07\t1", "q02\ti01\t0"]
    qrels.write_text("\n".join(rows) + "\n")
    split = load_split(str(data), "train", catalog_of(data, tmp_path))
    assert split.query_ids == ["q00", "q02"]
    assert list(zip(split.feedback_queries, split.feedback_items, strict=True)) == [(0, 7), (1, 4), (1, 30)]
    qrels.write_text("\n".join([*rows, "q00\tnone\t1", "q02\tnone\t1", "q02\tnothing\t1"]) + "\n")
    with pytest.raises(UserError, match=r"train\.tsv:6: item id 'none' .* \(3 such lines\)"):
        load_split(str(data), "train", catalog_of(data, tmp_path))
    qrels.write_text("\n".join([*rows, "q00\tnone\t1"]) + "\n")
    with pytest.raises(UserError, match=r"\(1 such line\)"):
        load_split(str(data), "train", catalog_of(data, tmp_path))


def test_what_is_left_out_is_part_of_the_identity(data, tmp_path):
    catalog = catalog_of(data, tmp_path)
    before = load_split(str(data), "train", catalog).fingerprint
    write_qrels(data / "excluded" / "train.tsv", [("q00", "i30", 1)])
    assert load_split(str(data), "train", catalog).fingerprint != before


def test_what_is_left_out_of_rankings_is_no_feedback_either(data, tmp_path):
    catalog = catalog_of(data, tmp_path)
    write_qrels(data / "qrels" / "train.tsv", [("q00", "i07", 1), ("q00", "i30", 1), ("q02", "i30", 1)])
    write_qrels(data / "excluded" / "train.tsv", [("q00", "i30", 1), ("q00", "i04", 1), ("q02", "i07", 1)])
    split = load_split(str(data), "train", catalog)
    assert list(zip(split.feedback_queries, split.feedback_items, strict=True)) == [(0, 7), (1, 30)]
    write_qrels(data / "qrels" / "train.tsv", [("q00", "i30", 1)])
    with pytest.raises(UserError, match=r"excluded/train\.tsv leaves out all pairs"):
        load_split(str(data), "train", catalog)


def test_a_score_of_zero_leaves_nothing_out(data, tmp_path):
    write_qrels(data / "excluded" / "train.tsv", [("q00", "i30", 0), ("q00", "i04", 1), ("q00", "i05", -1)])
    split = load_split(str(data), "train", catalog_of(data, tmp_path))
    assert split.excluded.rows.tolist() == [4]


def test_what_is_left_out_must_be_about_the_split(data, tmp_path):
    catalog, path = catalog_of(data, tmp_path), data / "excluded" / "train.tsv"
    for rows in ([("q01", "i30", 1), ("none", "i30", 1)], [("q00", "none", 1)]):  # q01 is a query of "test"
        write_qrels(path, rows)
        with pytest.raises(
            UserError, match=r"excluded/train\.tsv:2: neither this nor .* query of split 'train' .* remove"
        ):
            load_split(str(data), "train", catalog)
        write_qrels(path, [*rows, ("q00", "i30", 1)])
        assert load_split(str(data), "train", catalog).excluded.rows.tolist() == [30]
    write_qrels(path, [])
    assert load_split(str(data), "train", catalog).excluded.rows.tolist() == []


def test_misnamed_files_are_not_passed_over(data, tmp_path):
    catalog = catalog_of(data, tmp_path)
    for part, name in [("excluded", "trian.tsv"), ("excluded", "train.csv"), ("unclicked", "train.jsonl")]:
        path = data / part / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
        with pytest.raises(UserError, match=rf"{path}: is read for no split; name it train\.tsv"):
            load_split(str(data), "train", catalog)
        path.unlink()
        for other in ("test.tsv", "README.md", ".hidden"):
            (data / part / other).write_text("")
        load_split(str(data), "train", catalog)


def test_ids_of_unclicked_queries_may_be_quoted(data):
    (data / "unclicked").mkdir()
    (data / "unclicked" / "train.tsv").write_text('query-id\n"q ""a"""\nq02\n')
    assert [name for _, name in read_unclicked(str(data), "train")] == ['q "a"', "q02"]


def test_subset_renumbers_queries(data, tmp_path):
    split = load_split(str(data), "train", catalog_of(data, tmp_path))
    part = split.subset(np.array([1, 3]))
    assert part.query_ids == [split.query_ids[1], split.query_ids[3]]
    assert set(part.feedback_items[part.feedback_queries == 1]) == set(
        split.feedback_items[split.feedback_queries == 3]
    )


def replace_line(path, number, text):
    lines = path.read_text().splitlines()
    lines[number - 1] = text
    path.write_text("\n".join(lines) + "\n")


BAD_CORPUS = [
    ('{"_id": "i02", "text": ', r"corpus\.jsonl:3: malformed JSON \(Expecting value at column 2[4-6]\)"),
    ("[1]", r"corpus\.jsonl:3: expected a JSON object"),
    ('{"_id": "i00", "text": "again"}', r"corpus\.jsonl:3: duplicate _id 'i00', seen before at .*:1$"),
    ('{"_id": "x", "title": "", "text": " "}', r"corpus\.jsonl:3: item 'x' has neither title nor text"),
    ('{"text": "no id"}', r"corpus\.jsonl:3: no _id"),
    ('{"_id": "a\\tb", "text": "tab"}', r"corpus\.jsonl:3: the _id 'a\\tb' holds control characters"),
    ('{"_id": "a b", "text": "space"}', r"corpus\.jsonl:3: the _id 'a b' holds a space"),
    ('{"_id": ["a"], "text": "x"}', r"corpus\.jsonl:3: the _id is of type list; make it a string"),
    ('{"_id": true, "text": "x"}', r"corpus\.jsonl:3: the _id is of type bool"),
    ('{"_id": "a", "title": {"en": "x"}, "text": "x"}', r"corpus\.jsonl:3: the title is of type dict"),
    ('{"_id": "a", "title": "x", "text": ["x", "y"]}', r"corpus\.jsonl:3: the text is of type list"),
]


@pytest.mark.parametrize(("line", "message"), BAD_CORPUS)
def test_bad_corpus_lines(data, tmp_path, line, message):
    replace_line(data / "corpus.jsonl", 3, line)
    with pytest.raises(UserError, match=message):
        catalog_of(data, tmp_path)


def test_numbers_are_ids_and_texts_and_null_is_no_title(data, tmp_path):
    replace_line(data / "corpus.jsonl", 3, '{"_id": 7, "title": 1984, "text": null}')
    replace_line(data / "corpus.jsonl", 4, '{"_id": 0, "title": null, "text": 2.5}')
    catalog = catalog_of(data, tmp_path)
    assert catalog.ids_at([2, 3]) == ["7", "0"]
    assert catalog.texts_at([2, 3]) == ["1984", "2.5"]


def test_queries_are_strings_or_numbers(data):
    replace_line(data / "queries.jsonl", 2, '{"_id": "q01", "text": ["buy", "a sofa"]}')
    with pytest.raises(UserError, match=r"queries\.jsonl:2: the text is of type list; make it a string"):
        load_queries(str(data))


def test_texts_that_end_in_half_an_emoji_are_read(data, tmp_path):
    replace_line(data / "corpus.jsonl", 3, '{"_id": "i02", "text": "cut \\ud83d", "title": "\\ud83d\\ude00"}')
    assert catalog_of(data, tmp_path).texts_at([2]) == ["😀 cut \ufffd"]


def test_words_of_any_script_are_ids(data, tmp_path):
    replace_line(data / "corpus.jsonl", 3, '{"_id": "می\u200cخواهم", "text": "a"}')
    assert catalog_of(data, tmp_path).ids[2].as_py() == "می\u200cخواهم"


def test_json_lines_are_qrels_too(data):
    """As MTEB's repositories hold them."""
    pairs = [{"query-id": q, "corpus-id": i, "score": s} for _, q, i, s in read_qrels(str(data), "train")]
    write_jsonl(data / "qrels" / "other.jsonl", pairs)
    assert [r[1:] for r in read_qrels(str(data), "other")] == [r[1:] for r in read_qrels(str(data), "train")]
    (data / "qrels" / "notes.md").write_text("no split")
    with pytest.raises(UserError, match=r"splits there: other, test, train\)"):
        list(read_qrels(str(data), "dev"))


def test_what_is_left_out_may_lie_in_parquet(data, tmp_path):
    (data / "excluded").mkdir()
    table = pa.table({"query-id": ["q00"], "corpus-id": ["i30"], "score": [1]})
    pq.write_table(table, data / "excluded" / "train.parquet")
    assert load_split(str(data), "train", catalog_of(data, tmp_path)).excluded.rows.tolist() == [30]


def test_tables_for_people_are_read_as_qrels(data):
    lines = ["query-id\tcorpus-id\tscore\tquery\titem", "q00\ti01\t1\tbuy\ta", "q00\ti02\t\tbuy\tb"]
    (data / "qrels" / "people.tsv").write_text("\n".join(lines) + "\n")
    assert [row[1:] for row in read_qrels(str(data), "people")] == [("q00", "i01", 1.0)]


def test_a_parquet_text_that_is_not_utf8_is_one_line(data):
    (data / "corpus.jsonl").unlink()
    texts = pa.array([b"fine", b"\xff\xfe"]).cast(pa.binary())
    texts = pa.StringArray.from_buffers(2, *texts.buffers()[1:])
    pq.write_table(pa.table({"_id": ["a", "b"], "text": texts}), data / "corpus.parquet")
    with pytest.raises(UserError, match=r"corpus\.parquet: holds a text that is not UTF-8, behind row 0"):
        list(read_part(str(data), "corpus"))


def test_parquet_scores_that_are_none(data, tmp_path):
    table = pa.table({"query-id": ["q00"], "corpus-id": ["i01"], "score": pa.array([None], pa.int64())})
    pq.write_table(table, data / "qrels" / "bad.parquet")
    with pytest.raises(UserError, match=r"bad\.parquet: row 1: the score None is not a number"):
        list(read_qrels(str(data), "bad"))
    ids = {"query-id": ["q00", "q01"], "corpus-id": ["i01", "i02"]}
    pq.write_table(pa.table(ids | {"score": [1.0, math.nan]}), data / "qrels" / "nan.parquet")
    with pytest.raises(UserError, match=r"nan\.parquet: row 2: the score nan is not a number"):
        list(read_qrels(str(data), "nan"))
    # A table for people that is labelled in part, as it comes out of a data frame.
    texts = {"query": ["buy", "buy"], "item": ["a", "b"]}
    pq.write_table(pa.table(ids | {"score": [1.0, math.nan]} | texts), data / "qrels" / "people.parquet")
    assert [row[1:] for row in read_qrels(str(data), "people")] == [("q00", "i01", 1.0)]


BAD_QRELS = [
    ("q00\ti99\t1", r"train\.tsv:2: item id 'i99' is not in the catalog"),
    ("q99\ti01\t1", r"train\.tsv:2: query id 'q99' is not in the queries file"),
    ("q00\ti01\tgood", r"train\.tsv:2: the score 'good' is not a number"),
    ("q00\ti01", r"train\.tsv:2: 2 columns"),
    ('q00\t"i99"\t1', r"train\.tsv:2: item id 'i99' is not in the catalog"),
]


@pytest.mark.parametrize(("line", "message"), BAD_QRELS)
def test_bad_qrels_lines(data, tmp_path, line, message):
    catalog = catalog_of(data, tmp_path)
    replace_line(data / "qrels" / "train.tsv", 2, line)
    with pytest.raises(UserError, match=message):
        load_split(str(data), "train", catalog)


def test_feedback_of_three_columns_is_not_read_line_by_line(data, tmp_path, monkeypatch):
    catalog = catalog_of(data, tmp_path)
    expected = load_split(str(data), "train", catalog)
    monkeypatch.setattr(source, "read_qrels_file", None)
    assert load_split(str(data), "train", catalog).fingerprint == expected.fingerprint


def test_other_bad_data(data, tmp_path):
    catalog = catalog_of(data, tmp_path)
    with pytest.raises(UserError, match=r"qrels/dev\.tsv: no such file \(splits there: test, train\)"):
        load_split(str(data), "dev", catalog)
    write_qrels(data / "qrels" / "none.tsv", [("q00", "i01", 0)])
    with pytest.raises(
        UserError, match=r"qrels/none\.tsv: split 'none' has no pairs; these need a score above 0"
    ):
        load_split(str(data), "none", catalog)
    replace_line(data / "queries.jsonl", 1, '{"_id": "q00", "text": ""}')
    with pytest.raises(UserError, match=r"queries\.jsonl:1: query 'q00' has no text"):
        load_split(str(data), "train", catalog)
    (data / "queries.jsonl").write_bytes(b'{"_id": "q", "text": "a"}\n{"_id": "\xff"}\n')
    with pytest.raises(UserError, match=r"queries\.jsonl:2: not UTF-8"):
        load_split(str(data), "train", catalog)
    (data / "corpus.jsonl").unlink()
    with pytest.raises(UserError, match=r"corpus\.jsonl: no such file"):
        list(read_part(str(data), "corpus"))
    with pytest.raises(UserError, match="no such folder"):
        list(read_part(str(tmp_path / "nowhere"), "corpus"))


def test_truncated_gzip_names_the_line(data):
    whole = gzip.compress((data / "corpus.jsonl").read_bytes() * 50)
    (data / "corpus.jsonl").unlink()
    (data / "corpus.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="the gzip data breaks off"):
        list(read_part(str(data), "corpus"))


FORMS = {
    "plain": b'query-id\tcorpus-id\tscore\nq1\ti1\t1\nq1\t i 2\t0.5\n\nq2\ti"3\t-2e-3\n',
    "windows, no header, no last line break": b"q1\ti1\t1\r\nq2\ti2\t0",
    "a mark of the byte order": b"\xef\xbb\xbfq1\ti1\t1\nq2\ti2\t0\n",
    "TREC": b"q1 0 i1 1\nq2 0 i2 0\n",
    "tables for people": b"query-id\tcorpus-id\tscore\tquery\ttext\nq1\ti1\t1\ta\tb\nq1\ti2\t\ta\tc\n",
    "numbers of Python": b"q1\ti1\t1\nq1\ti2\t1_0\nq1\ti3\t2\n",
    "TREC from some line on": b"q1\ti1\t1\nq1\ti2\t2\nq1 0 i3 3\n",
    "a blank line that holds blanks": b"q1\ti1\t1\n  \nq1\ti2\t2\n",
    "a carriage return in an id": b"q1\ti\r1\t1\nq1\ti2\t2\n",
    "quoted as csv does": b'query-id\tcorpus-id\tscore\nq1\ti1\t1\nq2\t"i""2"\t1\n"q3"\t"i3"\t"1"\nq4\ti"4"\t0\n',
    "all quoted, no header": b'"q1"\t"i1"\t"1"\n"q2"\t"i2"\t"0"\n',
    "quoted in no proper way": b'q1\ti1\t1\nq2\t"i"2"\t1\nq3\t"i3\t1\n"\ti4\t0\n',
    "no lines": b"",
    "a header alone": b"query-id\tcorpus-id\tscore\n",
}
BROKEN = {
    "not a number": b"q1\ti1\tnan\nq1\ti2\t1\n",
    "infinite": b"q1\ti1\t1\nq1\ti2\tinf\n",
    "no score": b"q1\ti1\t1\nq1\ti2\t\n",
    "two columns": b"q1\ti1\t1\nq1\ti2\n",
    "another order": b"corpus-id\tquery-id\tscore\ni1\tq1\t1\n",
    "the score first": b"score\tcorpus-id\tquery-id\n1\ti1\tq1\n",
    "a mark of the byte order, another order": b"\xef\xbb\xbfcorpus-id\tquery-id\tscore\ni1\tq1\t1\n",
    "another order, with texts": b"query-id\tquery\tcorpus-id\titem\tscore\nq1\ta\ti1\tb\t1\n",
    "no score where it is looked for": b"query-id\tscore\tcorpus-id\nq1\t1\ti1\n",
    "not UTF-8": b"q1\ti1\t1\nq1\t\xff\t1\n",
}


def rows_by_block(path):
    return [
        row
        for block in read_qrels_blocks(path)
        for row in zip(*(column.to_pylist() for column in block.columns), strict=True)
    ]


@pytest.mark.parametrize("block", [32, 1 << 20])
@pytest.mark.parametrize("name", ["qrels.tsv", "qrels.tsv.gz"])
@pytest.mark.parametrize("form", FORMS | BROKEN)
def test_blocks_of_qrels_are_its_lines(tmp_path, monkeypatch, form, name, block):
    monkeypatch.setattr(source, "_BLOCK", block)
    monkeypatch.setattr(source, "_LINES", 2)
    text, path = (FORMS | BROKEN)[form], tmp_path / name
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)

    if form in FORMS:
        assert rows_by_block(path) == [row[1:] for row in read_qrels_file(path)]
        return
    with pytest.raises(UserError) as expected:
        list(read_qrels_file(path))
    with pytest.raises(UserError) as found:
        rows_by_block(path)
    assert str(found.value) == str(expected.value)


def test_ids_that_csv_quotes_are_read_as_they_were(tmp_path):
    """BEIR writes its qrels so."""
    rows = [["q1", 'b"c'], ["q2", '"'], ['"q3"', '"'], ["q4", '"i4'], ['""', '""""'], ["q6", 'i6"']]
    path = tmp_path / "qrels.tsv"
    for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC):
        with path.open("w", newline="") as file:
            writer = csv.writer(file, delimiter="\t", quoting=quoting)
            writer.writerows([["query-id", "corpus-id", "score"], *([*row, 1] for row in rows)])
        assert [[query, item] for _, query, item, _ in read_qrels_file(path)] == rows
        assert [list(row[:2]) for row in rows_by_block(path)] == rows


def test_ids_are_written_so_that_they_are_read_back(tmp_path):
    ids = ['"', '""', '"a"', '"a""b"', '"a"b"', 'a"b', '"a', 'a"', "a"]
    path = tmp_path / "qrels.tsv"
    path.write_text("".join(f"{quoted(identity)}\t{quoted(identity)}\t1\n" for identity in ids))
    assert [row[:2] for row in rows_by_block(path)] == [(identity, identity) for identity in ids]
    assert [quoted(identity) for identity in ids[5:]] == ids[5:]


def test_a_header_in_another_order_is_refused(tmp_path):
    path = tmp_path / "qrels.tsv"
    for header in (
        "corpus-id\tquery-id\tscore",
        "corpus-id query-id score",
        "query-id\tcorpus-id\tsplit\tscore",
    ):
        path.write_text(f"{header}\n")
        expected = ", ".join(header.split())
        for read in (read_qrels_file, read_qrels_blocks):
            with pytest.raises(
                UserError, match=rf"qrels\.tsv:1: .* are {expected}; .* order query-id, corpus-id, score$"
            ):
                list(read(path))
    for header in (
        "query-id\tcorpus-id\trelevance",
        "query-id\titeration\tcorpus-id\tscore",
        "qid\tdocid\trel",
    ):
        path.write_text(f"{header}\n")
        assert not list(read_qrels_file(path))
        assert not list(read_qrels_blocks(path))


def test_three_columns_are_not_read_line_by_line(tmp_path, monkeypatch):
    path = tmp_path / "qrels.tsv"
    path.write_bytes(FORMS["plain"])
    monkeypatch.setattr(source, "read_qrels_file", None)
    assert sum(len(block) for block in read_qrels_blocks(path)) == 3


def test_blocks_of_a_file_that_breaks_off_name_the_line(tmp_path):
    path = tmp_path / "qrels.tsv.gz"
    path.write_bytes(gzip.compress(FORMS["plain"][26:] * 1000)[:-20])
    with pytest.raises(UserError, match="the gzip data breaks off after line"):
        list(read_qrels_blocks(path))
    with pytest.raises(UserError, match="no such file"):
        list(read_qrels_blocks(tmp_path / "none.tsv"))
