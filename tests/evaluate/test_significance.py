"""Intervals and tests against scipy and against their nominal rates."""

import json

import numpy as np
import pytest
from scipy import stats

from novelret.evaluate import significance
from novelret.evaluate.figures import significance_of
from novelret.evaluate.significance import bootstrap_intervals, compare_pairs, holm, randomization_tests


def test_bootstrap_agrees_with_scipy():
    values = np.random.default_rng(0).exponential(size=400)
    low, high = bootstrap_intervals(values[:, None], samples=4000)
    theirs = stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=4000, rng=1
    ).confidence_interval
    assert low[0] == pytest.approx(theirs.low, abs=0.01)
    assert high[0] == pytest.approx(theirs.high, abs=0.01)


def test_bootstrap_leaves_missing_figures_out():
    values = np.full((9, 3), np.nan)
    values[:6, 0] = [1, 3, 2, 1, 3, 2]
    values[:4, 2] = 1  # too few for resamples to tell anything
    low, high = bootstrap_intervals(values)
    assert 1 <= low[0] < 2 < high[0] <= 3
    assert np.isnan(low[1:]).all()
    assert np.isnan(high[1:]).all()


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(2)
    low, high = bootstrap_intervals(rng.normal(1, 2, size=(80, 400)), samples=1000)
    assert 0.91 <= np.mean((low <= 1) & (high >= 1)) <= 0.97


def test_randomization_test_agrees_with_scipy():
    difference = np.random.default_rng(3).normal(0.25, 1, size=(60, 1))
    theirs = stats.permutation_test(
        (difference[:, 0],), np.mean, permutation_type="samples", n_resamples=20_000, rng=0
    ).pvalue
    assert randomization_tests(difference, samples=20_000)[0] == pytest.approx(theirs, abs=0.01)


def test_randomization_test_rejects_rarely_under_the_null_and_counts_ties():
    p = randomization_tests(np.random.default_rng(4).normal(size=(40, 500)), samples=1000)
    assert 0.03 <= (p < 0.05).mean() <= 0.075
    assert randomization_tests(np.zeros((10, 1)))[0] == 1
    # Two equal differences: the sum of signs is as extreme as seen in half of all flips.
    assert randomization_tests(np.array([[1.0], [1.0]]))[0] == pytest.approx(0.5, abs=0.02)


def test_holm_by_hand():
    corrected = holm(np.array([[0.01], [0.04], [0.03], [0.005]]))
    assert corrected[:, 0].tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_holm_counts_tests_alone():
    corrected = holm(np.array([[np.nan, 0.5], [0.01, np.nan], [0.03, np.nan]]))
    assert corrected[1:, 0].tolist() == pytest.approx([0.02, 0.03])
    assert corrected[0, 1] == 0.5
    assert np.isnan(corrected[0, 0])


def test_models_without_a_common_query_are_not_compared():
    first, second = np.full(20, np.nan), np.full(20, np.nan)
    first[:10], second[10:] = 1.0, 0.0
    every = np.arange(20.0) % 3
    figures = {
        "x": {"a": first, "b": every},
        "y": {"a": second, "b": every + 1},
        "z": {"a": first, "b": every},
    }
    tests = {(t.first, t.second, t.metric): t for t in compare_pairs(figures, ["a", "b"])}
    assert {names for names in tests if names[2] == "a"} == {("x", "z", "a")}
    assert tests["x", "z", "a"].p_holm == tests["x", "z", "a"].p == 1
    assert tests["x", "y", "b"].p_holm == pytest.approx(3 * tests["x", "y", "b"].p)


def test_pairs_of_models_against_scipy():
    rng = np.random.default_rng(5)
    figures = {
        name: {"a": rng.normal(mean, 1, 80), "b": rng.normal(0, 1, 80)}
        for name, mean in zip("xyz", (0, 0.2, 0.9), strict=True)
    }
    figures["y"]["b"][:10] = np.nan
    tests = {(t.first, t.second, t.metric): t for t in compare_pairs(figures, ["a", "b"])}
    assert len(tests) == 6
    found = tests["x", "z", "a"]
    difference = figures["x"]["a"] - figures["z"]["a"]
    theirs = stats.permutation_test(
        (difference,), np.mean, permutation_type="samples", n_resamples=20_000, rng=0
    ).pvalue
    assert found.p == pytest.approx(theirs, abs=0.01)
    assert found.difference == pytest.approx(difference.mean())
    assert found.p_holm == pytest.approx(min(1, 3 * found.p))  # the least of three
    with_gaps = tests["x", "y", "b"]
    assert with_gaps.difference == pytest.approx((figures["x"]["b"] - figures["y"]["b"])[10:].mean())
    assert compare_pairs({"x": figures["x"]}, ["a"]) == []


def test_pairs_are_compared_the_same_however_many_at_once(monkeypatch):
    rng = np.random.default_rng(2)
    figures = {str(n): {m: rng.normal(n / 9, 1, 50) for m in "abc"} for n in range(6)}
    figures["3"]["b"][:20] = np.nan
    together = compare_pairs(figures, [*"abc"])
    monkeypatch.setattr(significance, "_COLUMNS", 7)
    assert compare_pairs(figures, [*"abc"]) == together
    assert len(together) == 45


def test_resamples_are_the_same_however_many_are_held_at_once(monkeypatch):
    values = np.random.default_rng(3).normal(size=(40, 3))
    whole = bootstrap_intervals(values)
    monkeypatch.setattr(significance, "_CELLS", 40 * 7)
    assert np.allclose(bootstrap_intervals(values), whole, rtol=1e-12)


def test_groups_of_many_queries_say_the_same(monkeypatch):
    """Of 3,000 queries in 600 groups, against each query by itself."""
    rng = np.random.default_rng(6)
    values = rng.exponential(size=(3000, 40)) + rng.normal(0, 0.05, 40)
    values[rng.random(values.shape) < 0.3] = np.nan
    values[:, 1] = np.where(np.arange(3000) % 100 == 0, 1.0, 0.0)  # a figure that few queries have
    values[:, 2] = np.nan
    single, differences = bootstrap_intervals(values), values - 1
    p = randomization_tests(differences)
    monkeypatch.setattr(significance, "_GROUPS", 600)
    grouped, p_grouped = bootstrap_intervals(values), randomization_tests(differences)
    widths, middles = ([ends[1] - ends[0] for ends in (single, grouped)],
                       [(ends[0] + ends[1]) / 2 for ends in (single, grouped)])  # fmt: skip
    some = np.arange(40) != 2
    assert np.allclose(widths[1][some] / widths[0][some], 1, atol=0.15)
    assert np.mean(widths[1][some] / widths[0][some]) == pytest.approx(1, abs=0.02)
    assert (np.abs(middles[1] - middles[0])[some] < 0.1 * widths[0][some]).all()
    assert np.isnan(grouped[0][2])
    assert np.isnan(grouped[1][2])
    assert np.abs(p_grouped - p).max() < 0.12
    assert np.abs(p_grouped - p).mean() < 0.03
    assert p_grouped[2] == 1


def test_what_has_no_figure_has_neither_interval_nor_p_value():
    none, some = np.full(30, np.nan), np.arange(30.0)
    per_query = {
        "base": {"a": some, "b": none},
        "x": {"a": some + 1, "b": some},
        "y": {"a": some, "b": none},  # counts for nothing where x is corrected for the others
    }
    found = significance_of(per_query)
    assert found["base"]["b"] == found["y"]["b"] == {}
    assert set(found["x"]["b"]) == {"low", "high"}  # a mean of its own, and nothing to compare it with
    assert set(found["x"]["a"]) == {"low", "high", "p", "p_holm"}
    json.dumps(found, allow_nan=False)
