"""The sample world that is shipped: whole, made by its script, small, and with matches that share no word."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parents[1] / "sample_data"
SPLITS = ("base", "train", "test")
MADE = ("corpus.jsonl", "queries.jsonl", "judgements.tsv", *(f"qrels/{split}.tsv" for split in SPLITS))


def texts(name: str) -> dict[str, str]:
    rows = [json.loads(line) for line in (HERE / name).read_text(encoding="utf-8").splitlines()]
    found = {row["_id"]: f"{row.get('title', '')} {row['text']}".strip() for row in rows}
    assert len(found) == len(rows), "an id appears twice"
    return found


def pairs(name: str) -> list[tuple[str, str]]:
    header, *lines = (HERE / name).read_text(encoding="utf-8").splitlines()
    assert header == "query-id\tcorpus-id\tscore"
    rows = [line.split("\t") for line in lines]
    assert all(score == "1" for _, _, score in rows)
    return [(query, item) for query, item, _ in rows]


@pytest.fixture(scope="module")
def corpus() -> dict[str, str]:
    return texts("corpus.jsonl")


@pytest.fixture(scope="module")
def queries() -> dict[str, str]:
    return texts("queries.jsonl")


def test_counts_and_texts(corpus, queries):
    assert 3000 <= len(corpus) <= 5000
    assert len(queries) == 1500
    assert len(set(queries.values())) == len(queries)
    assert all(corpus.values())
    assert all(queries.values())
    assert not corpus.keys() & queries.keys()


@pytest.mark.parametrize("name", ["judgements.tsv", *(f"qrels/{split}.tsv" for split in SPLITS)])
def test_ids_resolve_and_no_pair_is_repeated(name, corpus, queries):
    found = pairs(name)
    assert len(set(found)) == len(found)
    assert {query for query, _ in found} <= queries.keys()
    assert {item for _, item in found} <= corpus.keys()


def test_splits_share_no_query(queries):
    of = {split: {query for query, _ in pairs(f"qrels/{split}.tsv")} for split in SPLITS}
    assert sum(map(len, of.values())) == len(set.union(*of.values())) == len(queries)
    assert {query for query, _ in pairs("judgements.tsv")} == of["train"] | of["test"]


def test_most_queries_have_more_answers_than_clicks_show():
    relevant = Counter(query for query, _ in pairs("judgements.tsv"))
    assert min(relevant.values()) >= 8
    assert 20 <= sum(relevant.values()) / len(relevant) <= 80


def test_many_true_matches_share_no_word_but_few_clicks_do(corpus, queries):
    word = re.compile(r"[a-z0-9]+")
    # "for" and "s" would make strangers share a word.
    words = {
        key: set(word.findall(text.lower())) - {"for", "to", "the", "a", "in", "of", "s"}
        for key, text in (corpus | queries).items()
    }

    def strangers(name: str) -> float:
        found = pairs(name)
        return sum(words[query].isdisjoint(words[item]) for query, item in found) / len(found)

    assert strangers("judgements.tsv") > 0.4
    assert strangers("qrels/base.tsv") < 0.1
    assert strangers("qrels/base.tsv") < strangers("qrels/train.tsv") < 0.3


def test_clicks_are_mostly_but_not_always_relevant():
    judged = set(pairs("judgements.tsv"))
    for split in ("train", "test"):
        clicked = pairs(f"qrels/{split}.tsv")
        assert 0.7 < sum(pair in judged for pair in clicked) / len(clicked) < 0.95


def test_the_script_makes_the_shipped_bytes(tmp_path):
    subprocess.run([sys.executable, HERE / "make.py", "--out", tmp_path], check=True)
    for name in MADE:
        assert (tmp_path / name).read_bytes() == (HERE / name).read_bytes(), name


def test_it_is_small():
    def size(folder: Path) -> int:
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

    assert size(HERE) < 4_000_000
    assert size(HERE / "deployed_model") < 2_000_000


def test_the_deployed_model_has_the_figures_of_the_readme(corpus, queries):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(HERE / "deployed_model"), device="cpu", local_files_only=True)
    clicked = pairs("qrels/test.tsv")
    judged = set(pairs("judgements.tsv"))
    asked, items = sorted({query for query, _ in clicked}), list(corpus)
    found = model.encode([queries[query] for query in asked])
    scores = found @ model.encode(list(corpus.values())).T
    assert found.shape == (300, 96)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    best = np.argsort(-scores, axis=1)
    ranked = {query: [items[row] for row in rows] for query, rows in zip(asked, best, strict=True)}

    per_query = Counter(query for query, _ in clicked)
    recall = sum((item in ranked[query][:50]) / per_query[query] for query, item in clicked) / len(asked)
    relevant = {query: [(query, item) in judged for item in ranked[query]] for query in asked}
    assert recall == pytest.approx(0.707, abs=0.005)
    assert np.mean([flags[:10] for flags in relevant.values()]) == pytest.approx(0.495, abs=0.005)
    assert np.mean([flags[:50] for flags in relevant.values()]) == pytest.approx(0.295, abs=0.005)
    assert np.mean([sum(flags[50:200]) for flags in relevant.values()]) == pytest.approx(8.5, abs=0.1)
