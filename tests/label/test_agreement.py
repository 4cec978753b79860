"""`novelret agreement`: figures held against scikit-learn and a brute-force bootstrap, and the command itself."""

from __future__ import annotations

import json

import numpy as np
import pytest
import scipy.stats
from sklearn.metrics import (
    accuracy_score,
    cohen_kappa_score,
    confusion_matrix,
    precision_score,
    recall_score,
)

from novelret.cli import main
from novelret.label.agreement import agreement_figures, bootstrap_by_query, confusion_counts
from tests.conftest import write_qrels


def draw(seed, pairs=400, queries=30):
    rng = np.random.default_rng(seed)
    people = rng.random(pairs) < 0.3
    judged = np.where(rng.random(pairs) < 0.15, ~people, people)
    return judged, people, np.sort(np.r_[np.arange(queries), rng.integers(queries, size=pairs - queries)])


@pytest.mark.parametrize("seed", range(5))
def test_figures_are_those_of_scikit_learn(seed):
    judged, people, rows = draw(seed)
    counts = confusion_counts(judged, people, rows)
    (tn, fp), (fn, tp) = confusion_matrix(people, judged)
    assert counts.sum(axis=0).tolist() == [tp, fp, fn, tn]
    expected = [
        accuracy_score(people, judged),
        precision_score(people, judged),
        recall_score(people, judged),
        cohen_kappa_score(people, judged),
    ]
    assert agreement_figures(counts.sum(axis=0)[None])[0] == pytest.approx(expected)


def test_the_bootstrap_draws_whole_queries():
    _, people, rows = draw(7)
    # Wrong about some queries alone, so that pairs say less than as many that have nothing to do with another.
    judged = people ^ (np.random.default_rng(8).random(len(rows)) < np.where(rows % 4 == 0, 0.6, 0.02))
    low, high = bootstrap_by_query(confusion_counts(judged, people, rows), samples=4000)
    rng = np.random.default_rng(1)
    drawn = []
    for _ in range(1000):
        kept = np.concatenate([np.flatnonzero(rows == row) for row in rng.integers(30, size=30)])
        drawn.append(
            [
                accuracy_score(people[kept], judged[kept]),
                precision_score(people[kept], judged[kept]),
                recall_score(people[kept], judged[kept]),
                cohen_kappa_score(people[kept], judged[kept]),
            ]
        )
    figures = agreement_figures(confusion_counts(judged, people, rows).sum(axis=0)[None])[0]
    few = scipy.stats.t.ppf(0.975, 29) / scipy.stats.norm.ppf(0.975) * (30 / 29) ** 0.5
    expected = figures + few * (np.quantile(drawn, [0.025, 0.975], axis=0) - figures)
    assert np.abs(np.stack([low, high]) - expected).max() < 0.015


def test_few_pairs_that_all_agree_do_not_make_it_certain():
    counts = np.array([[1, 0, 0, 2], [0, 0, 0, 3], [2, 0, 0, 1]])
    low, high = bootstrap_by_query(counts)
    exact = [exact_of(n) for n in (9, 3, 3)]
    chance = (3 / 9) ** 2 + (6 / 9) ** 2
    assert low == pytest.approx([*exact, (exact[0] - chance) / (1 - chance)])
    assert high.tolist() == [1, 1, 1, 1]
    low, high = bootstrap_by_query(np.array([[0, 2, 1, 0]] * 4))  # the judge is never right
    assert low[:3].tolist() == [0, 0, 0]
    assert high[:3] == pytest.approx([1 - exact_of(n) for n in (12, 8, 4)])


def test_intervals_of_few_queries_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(3)
    for queries in (2, 3, 5):
        held = 0
        for seed in range(150):
            right = rng.binomial(40, 0.84, size=queries)
            counts = np.stack(
                [right // 2, (40 - right) // 2, 40 - right - (40 - right) // 2, right - right // 2], axis=1
            )
            low, high = bootstrap_by_query(counts, samples=300, seed=seed)
            held += low[0] <= 0.84 <= high[0]
        assert held / 150 > 0.93, queries


def test_no_interval_is_narrower_than_that_of_independent_pairs():
    low, high = bootstrap_by_query(np.array([[2, 1, 0, 7]] * 10))  # no resample differs from another
    for n, (hits, size) in enumerate(((90, 100), (20, 30), (20, 20))):
        exact = scipy.stats.binomtest(hits, size).proportion_ci()
        assert (low[n], high[n]) == pytest.approx((exact.low, exact.high))
    assert low[3] < agreement_figures(np.array([[20, 10, 0, 70]]))[0, 3] < high[3]


def exact_of(n):
    return scipy.stats.binomtest(n, n).proportion_ci().low


def test_undefined_figures_are_nan():
    figures = agreement_figures(np.array([[0, 0, 0, 9], [0, 0, 3, 6], [5, 0, 0, 0]]))
    assert np.isnan(figures[0]).tolist() == [False, True, True, True]
    assert np.isnan(figures[1]).tolist() == [False, True, False, False]
    assert np.isnan(figures[2]).tolist() == [False, False, False, True]
    assert np.isnan(bootstrap_by_query(np.array([[1, 2, 3, 4]]))).all()


@pytest.fixture
def labels(world, index_folder, tmp_path):
    out = tmp_path / "labels"
    judge = f"file:{world / 'judgements.tsv'}"
    arguments = [
        "label",
        "--data",
        world,
        "--index",
        index_folder,
        "--judge",
        judge,
        "--missing",
        "irrelevant",
    ]
    more = ["--base-depth", 3, "--depth", 20, "--out", out, "--quiet"]
    assert main([*map(str, [*arguments, *more])]) == 0
    return out


def agree(capsys, *arguments):
    code = main(["agreement", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def pairs_of(labels):
    import pyarrow.parquet as pq

    return pq.read_table(labels / "judgements.parquet").to_pylist()


def test_a_judge_that_people_share_is_trusted(labels, tmp_path, capsys):
    rows = pairs_of(labels)
    write_qrels(tmp_path / "people.tsv", [(r["query_id"], r["item_id"], r["verdict"]) for r in rows])
    code, out, err = agree(capsys, "--labels", labels, "--human", tmp_path / "people.tsv", "--json")
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert found["figures"] == {"accuracy": 1, "precision": 1, "recall": 1, "kappa": 1}
    assert found["intervals"]["accuracy"] == pytest.approx([exact_of(len(rows)), 1])
    assert found["pairs"] == len(rows) == found["confusion"]["yes-yes"] + found["confusion"]["no-no"]
    assert found["disagreements"] == []
    # A second annotator who contradicts the first one on two pairs; the last line counts, and that is said.
    twice = rows + [row | {"verdict": 1 - row["verdict"]} for row in rows[:2]]
    write_qrels(tmp_path / "two.tsv", [(r["query_id"], r["item_id"], r["verdict"]) for r in twice])
    code, out, err = agree(capsys, "--labels", labels, "--human", tmp_path / "two.tsv", "--json")
    assert json.loads(out)["figures"]["accuracy"] == pytest.approx(1 - 2 / len(rows))
    assert (
        "two.tsv: 2 pairs called relevant in one line and irrelevant in another; the last line"
        in " ".join(err.split())
    )
    code, _, err = agree(capsys, "--labels", labels, "--human", tmp_path / "two.tsv", "--threshold", "nan")
    assert (code, err.strip()) == (2, "error: --threshold nan: must be a number")
    code, _, err = agree(capsys, "--labels", labels, "--human", tmp_path / "people.tsv", "--show", -1)
    assert (code, err.strip()) == (2, "error: --show -1: must be at least 0")
    code, _, err = agree(capsys, "--labels", labels, "--human", tmp_path / "people.tsv", "--seed", -1)
    assert (code, err.strip()) == (2, "error: --seed -1: must be at least 0")


def test_disagreements_are_counted_shown_and_warned_of(labels, world, tmp_path, capsys):
    rows = pairs_of(labels)
    # People contradict the judge on every third pair, and most strongly on the first.
    human = []
    for n, row in enumerate(rows):
        verdict = row["verdict"] if n % 3 else 1 - row["verdict"]
        human.append((row["query_id"], row["item_id"], 3 * verdict if n else 9 - 18 * row["verdict"]))
    human += [("q00", "no-such-item", 1), ("no-such-query", "i00", 0)]
    write_qrels(tmp_path / "people.tsv", human)
    arguments = ["--labels", labels, "--data", world, "--human", tmp_path / "people.tsv", "--show", 4]
    code, out, err = agree(capsys, *arguments, "--json")
    found = json.loads(out)
    wrong = -(-len(rows) // 3)
    assert code == 0
    assert (found["pairs"], found["not_judged"], found["unusable"]) == (len(rows), 2, 0)
    assert found["confusion"]["yes-no"] + found["confusion"]["no-yes"] == wrong
    assert found["figures"]["accuracy"] == pytest.approx(1 - wrong / len(rows))
    low, high = found["intervals"]["accuracy"]
    assert low < found["figures"]["accuracy"] < high
    assert "below the 85% that a prompt should reach" in err
    assert len(found["disagreements"]) == 4
    texts = {json.loads(line)["_id"]: json.loads(line)["text"] for line in (world / "corpus.jsonl").open()}
    for one in found["disagreements"]:
        assert one["item"] == texts[one["item_id"]]
        assert one["query"].startswith("buy ")
        assert one["judge"] != (one["human"] > 0)
    first = found["disagreements"][0]
    assert (first["query_id"], first["item_id"]) == (rows[0]["query_id"], rows[0]["item_id"])
    code, out, _ = agree(capsys, *arguments)
    assert code == 0
    assert "people: yes" in out
    assert first["item"] in out


def test_graded_people_and_a_threshold(labels, tmp_path, capsys):
    rows = pairs_of(labels)
    write_qrels(tmp_path / "people.tsv", [(r["query_id"], r["item_id"], 1 + r["verdict"]) for r in rows])
    base = ["--labels", labels, "--human", tmp_path / "people.tsv", "--json"]
    assert json.loads(agree(capsys, *base, "--threshold", 2)[1])["figures"]["accuracy"] == 1
    _, out, err = agree(capsys, *base)
    assert json.loads(out)["figures"]["accuracy"] < 1
    assert "people call all of the shared pairs relevant" in err
    assert json.loads(out)["figures"]["kappa"] == 0


def test_exactly_the_pairs_that_people_judged_can_be_labelled(world, index_folder, tmp_path, capsys):
    human = [("q00", "i05", 1), ("q00", "i21", 0), ("q02", "i07", 1), ("q02", "gone", 1), ("q01", "i00", 1)]
    write_qrels(tmp_path / "people.tsv", human)
    out = tmp_path / "labels"
    arguments = [
        "label",
        "--data",
        world,
        "--index",
        index_folder,
        "--judge",
        f"file:{world / 'judgements.tsv'}",
    ]
    more = ["--missing", "irrelevant", "--from", f"pairs:{tmp_path / 'people.tsv'}", "--out", out]
    assert main([*map(str, [*arguments, *more])]) == 0
    assert "2 pairs are not of this split's queries" in " ".join(capsys.readouterr().err.split())
    assert {(r["query_id"], r["item_id"]) for r in pairs_of(out)} == {h[:2] for h in human[:3]}
    code, shown, _ = agree(capsys, "--labels", out, "--human", tmp_path / "people.tsv", "--json")
    assert (code, json.loads(shown)["pairs"], json.loads(shown)["not_judged"]) == (0, 3, 2)


def test_few_pairs_are_said_to_be_few(labels, tmp_path, capsys):
    row = pairs_of(labels)[0]
    write_qrels(tmp_path / "people.tsv", [(row["query_id"], row["item_id"], row["verdict"])])
    _, out, err = agree(capsys, "--labels", labels, "--human", tmp_path / "people.tsv", "--json")
    assert json.loads(out)["intervals"]["accuracy"] is None
    assert "1 pairs of 1 queries do not yet show" in err


def test_bad_input_is_one_line(labels, tmp_path, capsys):
    write_qrels(tmp_path / "people.tsv", [("q99", "i00", 1)])
    code, _, err = agree(capsys, "--labels", labels, "--human", tmp_path / "people.tsv")
    assert (code, len(err.strip().splitlines())) == (2, 1)
    assert "none of its 1 pairs is judged" in err
    code, _, err = agree(capsys, "--labels", labels, "--human", tmp_path / "nothing.tsv")
    assert (code, "no such file" in err) == (2, True)
    code, _, err = agree(capsys, "--labels", tmp_path, "--human", tmp_path / "people.tsv")
    assert (code, "expected LABELS of novelret" in err) == (2, True)
