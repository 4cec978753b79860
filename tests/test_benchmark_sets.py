"""How the benchmark's data sets read WordNet and manual pages, on inputs small enough to check by eye."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

SETS = Path(__file__).parents[1] / "benchmarks" / "sets"

NOUNS = """\
  1 This software and database is being provided to you, the LICENSEE, by
00001740 03 n 01 entity 0 001 ~ 00002000 n 0000 | that which exists
00002000 05 n 02 dog 0 domestic_dog 0 003 @ 00001740 n 0000 + 00692347 v 0101 ~ 00003000 n 0000 | an animal; "the dog barked; at night"
00003000 05 n 01 Rin_Tin_Tin 0 002 @i 00002000 n 0000 #m 00001740 n 0000 | a film star; 1920s
00004000 05 n 01 puppy 0 001 @ 00002000 n 0000 | a young dog
00005000 05 n 01 whelp 0 002 @ 00004000 n 0000 @ 00003000 n 0000 | "only an example"
"""

MAN = r"""
'\" t
.TH PRINTF 3 "today" \" a comment
.SH NAME
printf, fprintf,
sn\-printf \- formatted \fIoutput\fP
conversion
.PP
Not part of it.
.SH DESCRIPTION
See elsewhere(1).
.SH "SEE ALSO"
.BR scanf (3),
.I wcrtomb\fR(3), \fBset\-locale\fP(3posix) and Locale::Maketext.
.SH AUTHOR
Nobody(7)
"""

MDOC = r"""
.Dd March 3, 2020
.Sh NAME
.Nm kill ,
.Nm killall
.Nd send signals
.Sh SYNOPSIS
.Nm
.Sh SEE ALSO
.Xr ps 1 ,
.Xr sigaction 2
.Sh STANDARDS
.Xr sh 1
"""

BARE = ".SH NAME\nMPI_Send \\-\\- sends\n.SH SEE ALSO\n.ft R\n.sp\nMPI_Recv and the book by Gropp\n"


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(SETS))
    yield importlib.import_module
    for name in ("layout", "roff", "shown", "strangers", "wordnet", "manual_pages"):
        sys.modules.pop(name, None)


def test_wordnet_synsets(load):
    wordnet = load("wordnet")
    found = wordnet.synsets(NOUNS.splitlines())
    assert {name: synset.text for name, synset in found.items()} == {
        "00001740": "entity: that which exists",
        "00002000": "dog, domestic dog: an animal",
        "00003000": "Rin Tin Tin: a film star; 1920s",
        "00004000": "puppy: a young dog",
        "00005000": "whelp: ",
    }
    below = wordnet.directly_below(found)
    assert below == {
        "00001740": {"00002000"},
        "00002000": {"00003000", "00004000"},
        "00003000": {"00005000"},
        "00004000": {"00005000"},
    }
    assert wordnet.all_below("00001740", below) == set(found) - {"00001740"}
    assert wordnet.all_below("00002000", below) == {"00003000", "00004000", "00005000"}
    assert wordnet.all_below("00005000", below) == set()


def test_manual_page_names_and_references(load):
    roff = load("roff")
    assert roff.names_and_description(MAN) == (
        ["printf", "fprintf", "sn-printf"],
        "formatted output conversion",
    )
    assert roff.references(MAN) == [
        ("scanf", "3"), ("wcrtomb", "3"), ("set-locale", "3posix"), ("Locale::Maketext", "3"),
    ]  # fmt: skip
    assert roff.names_and_description(MDOC) == (["kill", "killall"], "send signals")
    assert roff.references(MDOC) == [("ps", "1"), ("sigaction", "2")]
    assert roff.names_and_description(".SH DESCRIPTION\nnothing\n") == ([], "")
    assert ("MPI_Recv", "") in roff.references(BARE)


def test_links_copies_and_ambiguous_names(load):
    manual_pages = load("manual_pages")
    libc = manual_pages.pages(
        "libc",
        {
            "man3/printf.3": MAN,
            "man3/copy.3": MAN,
            "man3/vprintf.3": ".so man3/vlink.3\n",
            "man3/vlink.3": ".so man3/printf.3\n",
            "man3/scanf.3": ".SH NAME\nscanf \\- reads\n.SH SEE ALSO\n.BR vprintf (3)\n",
            "man1/scanf.1": ".SH NAME\nscanf \\- reads in a shell\n",
        },
    )
    mpi = manual_pages.pages(
        "mpi",
        {
            "man3/MPI_Send.3mpi": BARE,
            "man3/MPI_Recv.3mpi": ".SH NAME\nMPI_Recv \\- receives\n.SH SEE ALSO\nscanf(3), sequel(3), printf(3)\n",
            "man3/scanf.3mpi": ".SH NAME\nscanf \\- reads\n",
        },
    )
    # copy.3 has printf.3's source and comes first: one page stands for both.
    assert set(libc) == {"libc/copy.3", "libc/scanf.3", "libc/scanf.1"}
    catalog = libc | mpi
    items, stands = manual_pages.texts(catalog)
    assert stands["mpi/scanf.3mpi"] == "libc/scanf.3"
    assert items["mpi/MPI_Send.3mpi"] == "MPI_Send: sends"
    assert manual_pages.listed(catalog, stands) == {
        "libc/copy.3": ["libc/scanf.3"],
        "libc/scanf.3": ["libc/copy.3"],
        "mpi/MPI_Send.3mpi": ["mpi/MPI_Recv.3mpi"],
        "mpi/MPI_Recv.3mpi": ["libc/scanf.3", "libc/copy.3"],
    }


def test_layout_is_the_same_each_time(load, tmp_path):
    layout = load("layout")
    queries = [f"q{i}" for i in range(50)]
    splits = layout.split(queries, train=0.28, test=0.12)
    assert {name: len(members) for name, members in splits.items()} == {"base": 30, "train": 14, "test": 6}
    assert sorted(q for members in splits.values() for q in members) == sorted(queries)
    feedback = {query: layout.draw({f"i{n}" for n in range(30)}, 3, query) for query in queries}
    assert len({tuple(drawn) for drawn in feedback.values()}) > 40
    items = dict.fromkeys([*queries, *(f"i{n}" for n in range(30))], "text")
    for folder in (tmp_path / "one", tmp_path / "two"):
        layout.write(
            folder,
            "# title",
            items,
            layout.split(reversed(queries), train=0.28, test=0.12),
            feedback,
            feedback,
        )
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / f).rglob("*.*sv")} for f in ("one", "two"))
    assert one == two
    assert len(one) == 4
    rows = (tmp_path / "one" / "judgements.tsv").read_text().splitlines()
    assert rows[0] == "query-id\tcorpus-id\tscore"
    assert len(rows) == 1 + 20 * 3
    assert len([json.loads(row) for row in (tmp_path / "one" / "corpus.jsonl").open()]) == 80


def test_shown_feedback_is_what_the_deployed_list_holds(load, world, encoder, index_folder, tmp_path):
    shown = load("shown")
    data = tmp_path / "data"
    shutil.copytree(world, data)
    (data / "deployed_model").symlink_to(encoder)
    whole = {tuple(row.split()[:2]) for row in (data / "qrels/train.tsv").read_text().splitlines()[1:]}

    # Cosine similarities by sentence-transformers itself; the third best is the last one shown.
    model = SentenceTransformer(str(encoder), device="cpu")
    items = [json.loads(line) for line in (data / "corpus.jsonl").open()]
    queries = [json.loads(line) for line in (data / "queries.jsonl").open()]
    scores = model.encode([q["text"] for q in queries]) @ model.encode([i["text"] for i in items]).T
    best = np.argsort(-scores, axis=1)[:, :3]
    lists = {q["_id"]: {items[row]["_id"] for row in rows} for q, rows in zip(queries, best, strict=True)}
    expected = {(query, item) for query, item in whole if item in lists[query]}
    assert 0 < len(expected) < len(whole)

    shown.write(data, tmp_path / "out", shown.shown_feedback(data, index_folder, 3))
    rows = (tmp_path / "out/qrels/train.tsv").read_text().splitlines()[1:]
    assert {tuple(row.split()[:2]) for row in rows} == expected
    unclicked = (tmp_path / "out/unclicked/train.tsv").read_text().splitlines()
    assert unclicked == ["query-id", *sorted({q for q, _ in whole} - {q for q, _ in expected})]
    assert len(unclicked) > 1
    for name in ("corpus.jsonl", "judgements.tsv", "qrels/test.tsv"):
        assert (tmp_path / "out" / name).read_bytes() == (data / name).read_bytes()
    assert (tmp_path / "out/deployed_model/modules.json").is_file()


def test_nothing_known_of_train_queries_names_a_test_query(load, tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    (data / "qrels").mkdir(parents=True)
    (data / "deployed_model").mkdir()
    for name in ("corpus.jsonl", "queries.jsonl"):
        (data / name).write_text(name)
    head = "query-id\tcorpus-id\tscore\n"
    (data / "qrels/train.tsv").write_text(head + "a\tx\t1\na\tt\t1\nb\tt\t1\nc\ty\t1\n")
    (data / "qrels/test.tsv").write_text(head + "t\ta\t1\nu\tx\t1\n")
    (data / "judgements.tsv").write_text(head + "a\tx\t1\na\tu\t1\nb\tt\t0\nb\ty\t1\nt\tu\t1\nt\ta\t1\n")
    load("strangers").write(data, out)
    rows = [line.split("\t")[:2] for line in (out / "qrels/train.tsv").read_text().splitlines()[1:]]
    assert rows == [["a", "x"], ["c", "y"]]
    assert (out / "unclicked/train.tsv").read_text().split() == ["query-id", "b"]
    rows = [line.split("\t")[:2] for line in (out / "judgements.tsv").read_text().splitlines()[1:]]
    assert rows == [["a", "x"], ["b", "y"], ["t", "u"], ["t", "a"]]
    assert not (data / "judgements.tsv").is_symlink()
    assert len((data / "judgements.tsv").read_text().splitlines()) == 7
    assert (out / "qrels/test.tsv").read_text() == (data / "qrels/test.tsv").read_text()
