"""Metrics against hand-worked cases, ranx and ir_measures."""

from __future__ import annotations

import ir_measures
import numpy as np
import pytest
from ranx import Qrels, Run
from ranx import evaluate as ranx_evaluate

from novelret.evaluate import metrics
from novelret.evaluate.figures import bound_of
from novelret.membership import is_in, sorted_union
from novelret.search import search_exact

BASE = np.array([[1, 2, 3], [4, 5, 6]])
ROWS = np.array([[2, 7, 8, 1], [9, 4, -1, -1]])


def test_novelty_by_hand():
    new = metrics.novel(ROWS, BASE)
    assert metrics.novelty(new, 1).tolist() == [0, 1]
    assert metrics.novelty(new, 3).tolist() == [2, 1]
    assert metrics.novelty(new, 4).tolist() == [2, 1]  # padding is not novel
    pooled = np.array([[1, 2, 3, 7, 8], [4, 5, 6, -1, -1]])
    assert metrics.novelty(metrics.novel(ROWS, pooled), 4).tolist() == [0, 1]


def test_judged_metrics_by_hand():
    verdicts = np.array([[1, 1, -1, 0], [0, 1, -1, -1]], dtype=np.int8)
    new = metrics.novel(ROWS, BASE)
    assert metrics.relevant_novelty(new, verdicts, 4).tolist() == [1, 0]
    assert metrics.precision(verdicts, 4).tolist() == pytest.approx([2 / 3, 1 / 2])
    assert metrics.judged(ROWS, verdicts, 4).tolist() == [3 / 4, 1.0]
    assert np.isnan(metrics.judged(np.full_like(ROWS, -1), np.full_like(verdicts, -1), 4)).all()
    assert metrics.novel_judged(new, verdicts, 4).tolist() == [1 / 2, 1.0]
    assert np.isnan(metrics.novel_judged(metrics.novel(BASE, BASE), np.zeros_like(BASE), 3)).all()
    assert metrics.novel_precision(new, verdicts, 4).tolist() == [1.0, 0.0]
    assert np.isnan(metrics.precision(np.full((1, 2), -1, dtype=np.int8), 2)).all()
    base_verdicts = np.array([[0, 1, 0], [0, 0, 0]], dtype=np.int8)
    merged = metrics.merge(new, verdicts, BASE, base_verdicts)
    assert merged.added.tolist() == [2, 1]
    assert merged.density.tolist() == [2, 0]  # item 2 once, and the novel relevant item 7
    assert merged.covered.tolist() == [True, False]
    assert merged.judged.tolist() == [4 / 5, 1.0]  # of base 1, 2, 3 and new 7, 8: all but 8
    assert np.isnan(
        metrics.merge(new[:1] & False, verdicts[:1], BASE[:1] * 0 - 1, base_verdicts[:1] * 0 - 1).judged
    )
    assert metrics.catalog_coverage(ROWS, 2, 10) == 4 / 10


def test_each_models_counts_are_bounds_by_its_own_judged_share():
    far = {"NovelJudged@50": 0.4, "MergedJudged": 0.7}
    near = {"NovelJudged@50": 1.0, "MergedJudged": 1.0}
    for shared in (0.8, 0.96):
        for metric in ("RelevantNovel@50", "MergedDensity", "MergedCoverage"):
            assert (bound_of(metric, far, shared), bound_of(metric, near, shared)) == ("≥", "")
        for means in (far, near):  # what is known comes from all lists
            assert bound_of("KnownRecall@50", means, shared) == ("~" if shared < 0.95 else "")
            assert bound_of("Recall@50", means, shared) == bound_of("MergedAdded", means, shared) == ""
    assert bound_of("MergedDensity", far, None) == ""


def test_a_query_without_feedback_has_no_recall():
    feedback = np.array([1, 1]), np.array([4, 6])
    for metric, expected in (
        (metrics.recall, 1 / 2),
        (metrics.reciprocal_rank, 1 / 2),
        (metrics.ndcg, (1 / np.log2(3)) / (1 + 1 / np.log2(3))),
    ):
        found = metric(*metrics.feedback_hits(ROWS, *feedback), 4)
        assert np.isnan(found[0])
        assert found[1] == pytest.approx(expected)


def test_sorted_union_is_numpys():
    rng = np.random.default_rng(0)
    for sizes in ((0,), (0, 0), (5, 0), (300, 200, 100)):
        arrays = [rng.integers(-50, 200, size) for size in sizes]
        assert np.array_equal(sorted_union(*arrays), np.unique(np.concatenate(arrays)))


def test_membership_against_python_sets():
    rng = np.random.default_rng(0)
    rows, lists = rng.integers(-1, 30, (200, 12)), rng.integers(-1, 30, (200, 9))
    expected = [[r >= 0 and r in set(of) for r in some] for some, of in zip(rows, lists, strict=True)]
    assert is_in(rows, lists).tolist() == expected


@pytest.fixture(scope="module")
def random_run():
    """Lists with ties, as search gives them, and as dictionaries for the other programs."""
    rng = np.random.default_rng(1)
    items = rng.integers(-2, 3, (120, 3)).astype(np.float32)
    queries = rng.integers(-2, 3, (40, 3)).astype(np.float32)
    id_rank = np.arange(120)  # ids below are zero-padded, so their order is the rows'
    rows, scores = search_exact(queries, items, 30, id_rank)
    feedback = np.unique(np.stack([rng.integers(0, 40, 400), rng.integers(0, 120, 400)], axis=1), axis=0)
    qrels: dict[str, dict[str, int]] = {}
    for q, i in feedback:
        qrels.setdefault(f"q{q:03d}", {})[f"i{i:03d}"] = 1
    run = {
        f"q{q:03d}": {f"i{i:03d}": float(s) for i, s in zip(rows[q], scores[q], strict=True)}
        for q in range(40)
    }
    assert len(qrels) == 40
    return rows, feedback[:, 0], feedback[:, 1], qrels, run


@pytest.mark.parametrize("k", [1, 5, 10, 30])
def test_recall_ndcg_mrr_agree_with_ir_measures(random_run, k):
    rows, queries, items, qrels, run = random_run
    hits = metrics.feedback_hits(rows, queries, items)
    ours = {f"R@{k}": metrics.recall(*hits, k), f"nDCG@{k}": metrics.ndcg(*hits, k)}
    measures = [ir_measures.parse_measure(name) for name in ours]
    theirs = {(str(m.measure), m.query_id): m.value for m in ir_measures.iter_calc(measures, qrels, run)}
    for name, values in ours.items():
        for q in range(40):
            assert values[q] == pytest.approx(theirs[name, f"q{q:03d}"], abs=1e-9)
    # With a cut, ir_measures orders ties otherwise than trec_eval; without one it is trec_eval's figure.
    whole = {m.query_id: m.value for m in ir_measures.iter_calc([ir_measures.RR], qrels, run)}
    ours_rr = metrics.reciprocal_rank(*hits, k)
    for q in range(40):
        expected = whole[f"q{q:03d}"]
        assert ours_rr[q] == pytest.approx(expected if expected >= 1 / k else 0, abs=1e-9)


@pytest.mark.parametrize("k", [1, 5, 10, 30])
def test_means_agree_with_ranx(random_run, k):
    rows, queries, items, qrels, run = random_run
    # ranx orders ties by its own rule, so it gets the ranks as scores.
    ranked = {q: {item: 1000.0 - place for place, item in enumerate(found)} for q, found in run.items()}
    names = [f"recall@{k}", f"ndcg@{k}", f"mrr@{k}"]
    theirs = ranx_evaluate(Qrels(qrels), Run(ranked), names)
    ours = [metrics.recall, metrics.ndcg, metrics.reciprocal_rank]
    for name, metric in zip(names, ours, strict=True):
        found = metric(*metrics.feedback_hits(rows, queries, items), k)
        assert found.mean() == pytest.approx(theirs[name], abs=1e-9)
