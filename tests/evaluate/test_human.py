"""Prediction-powered inference on synthetic truth: coverage, and what it is worth."""

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats

from novelret.data.catalog import Catalog
from novelret.data.split import make_split
from novelret.evaluate.config import EvalConfig
from novelret.evaluate.figures import Lists, human_corrections
from novelret.evaluate.human import corrected_precision, corrected_relevant_novelty, is_uneven
from novelret.evaluate.human_sample import read_sample, write_sample
from novelret.evaluate.metrics import novel
from novelret.label.table import make_table
from novelret.progress import Reporter
from novelret.row_lists import row_lists

K, LONG = 10, 12


def draw_world(rng, queries, *, miss, false, drawn):
    """Lists whose true relevance depends on the query, an erring judge, and a human-labelled sample.

    Places 4 to LONG are novel; people saw a random `drawn` of all pairs.
    """
    ease = rng.beta(1.5, 2.5, size=(queries, 1))
    truth = rng.random((queries, LONG)) < ease
    verdicts = np.where(truth, rng.random(truth.shape) >= miss, rng.random(truth.shape) < false).astype(
        np.int8
    )
    rows = np.arange(queries * LONG).reshape(queries, LONG)
    human = np.full(rows.shape, -1, dtype=np.int8)
    chosen = rng.choice(rows.size, drawn, replace=False)
    human.flat[chosen] = truth.flat[chosen]
    return rows, rows[:, :4], verdicts, human, truth


@pytest.mark.parametrize(("miss", "false"), [(0.1, 0.2), (0.5, 0.5), (0.0, 0.0)])
def test_intervals_hold_the_truth_about_as_often_as_they_say(miss, false):
    rng = np.random.default_rng(0)
    # The truth is that of the population the queries come from: E[ease] = 1.5 / 4.
    held = np.zeros((400, 2), dtype=bool)
    for trial in range(400):
        rows, base, verdicts, human, _ = draw_world(rng, 150, miss=miss, false=false, drawn=300)
        precision = corrected_precision(rows, verdicts, human, K)
        relevant_novel = corrected_relevant_novelty(novel(rows, base), verdicts, human, K)
        held[trial] = [
            precision.low <= 0.375 <= precision.high,
            relevant_novel.low <= 0.375 * 6 <= relevant_novel.high,
        ]
    # The standard error of a share of 0.95 over 400 trials is 0.011.
    assert np.abs(held.mean(axis=0) - 0.95).max() < 0.033


def test_a_biased_judge_is_put_right_where_the_raw_figure_is_far_off():
    rows, _, verdicts, human, truth = draw_world(
        np.random.default_rng(1), 2_000, miss=0.1, false=0.3, drawn=1_500
    )
    raw = (verdicts[:, :K] == 1).mean()
    found = corrected_precision(rows, verdicts, human, K)
    true = truth[:, :K].mean()
    assert raw > true + 0.1
    assert found.low <= true <= found.high
    assert found.high < raw


def test_everything_labelled_by_people_is_their_own_mean():
    rows, base, verdicts, _, truth = draw_world(np.random.default_rng(2), 200, miss=0.3, false=0.3, drawn=1)
    human = truth.astype(np.int8)
    found = corrected_relevant_novelty(novel(rows, base), verdicts, human, K)
    counts = truth[:, 4:K].sum(axis=1)
    assert found.value == pytest.approx(counts.mean())
    low, high = stats.t.interval(0.95, 199, counts.mean(), stats.sem(counts))
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-4)


def test_the_interval_is_never_longer_than_people_alone_would_give():
    worlds = {}
    for name, miss, false in (("good", 0.03, 0.03), ("useless", 0.5, 0.5)):
        rows, _, verdicts, human, _ = draw_world(
            np.random.default_rng(3), 1_000, miss=miss, false=false, drawn=300
        )
        found = corrected_precision(rows, verdicts, human, K)
        alone = corrected_precision(rows, np.zeros_like(verdicts), human, K)
        worlds[name] = (found.high - found.low) / (alone.high - alone.low), found.trust
    assert worlds["good"][0] < 0.6
    assert worlds["good"][1] > 0.8
    assert worlds["useless"][0] == pytest.approx(1, abs=0.05)
    assert worlds["useless"][1] < 0.2


def test_short_lists_count_by_their_own_length_and_too_few_labels_give_nothing():
    rows = np.array([[0, 1, 2, 3], [4, -1, -1, -1], [-1, -1, -1, -1]])
    truth = np.array([[1, 0, 0, 0], [1, -1, -1, -1], [-1, -1, -1, -1]], dtype=np.int8)
    rows, truth = np.tile(rows, (3, 1)), np.tile(truth, (3, 1))
    found = corrected_precision(rows, np.zeros_like(truth), truth, 4)
    assert found.value == pytest.approx((1 / 4 + 1) / 2)  # the third of each has no list
    assert (found.pairs, found.queries) == (15, 6)
    four = np.where(np.arange(9)[:, None] < 6, truth, -1)
    assert corrected_precision(rows, truth, four, 4) is None


def test_a_sample_without_errors_is_not_taken_for_certainty():
    rows = np.arange(2_000).reshape(200, 10)
    verdicts, human = np.zeros((2, 200, 10), dtype=np.int8)
    human = np.where(np.arange(10) < 1, human, -1).astype(np.int8)  # 200 labels, all "not relevant"
    found = corrected_precision(rows, verdicts, human, 10)
    assert (found.value, found.low) == (0, 0)
    assert found.high == pytest.approx(stats.beta.ppf(0.95, 1, 200), abs=2e-4)  # the exact bound for 0 of 200


def test_a_sample_of_other_lists_is_noticed():
    rng = np.random.default_rng(4)
    rows, base, _, human, _ = draw_world(rng, 500, miss=0, false=0, drawn=400)

    def table(human):
        queries, places = np.nonzero(human >= 0)
        return make_table(queries, rows[queries, places], human[queries, places], rows.size)

    assert not is_uneven(rows, base, table(human))
    only_base = np.where(np.arange(LONG) < 4, human, -1)
    assert is_uneven(rows, base, table(only_base))
    only_novel = np.where(np.arange(LONG) < 4, -1, human)
    assert is_uneven(rows, base, table(only_novel))


@pytest.mark.parametrize(("labels", "relevant", "told"), [
    (250, 30, ""),
    (250, 29, "people call only 29 of the pairs relevant that"),
    (250, 250, "people.tsv: calls no pair irrelevant, as clicks and qrels often do not"),
    (199, 30, "only 199 human labels fall on"),
])  # fmt: skip
def test_intervals_from_few_labels_or_few_relevant_ones_are_said_to_be_too_narrow(labels, relevant, told):
    rows = np.tile(np.arange(5), (50, 1))
    base, new = (
        Lists(rows, None, np.zeros((50, 5), np.int8)),
        Lists(rows + 5, None, np.zeros((50, 5), np.int8)),
    )
    pairs = np.random.default_rng(0).permutation(250)[:labels]
    places = np.concatenate([pairs, pairs]) // 5, np.concatenate([pairs % 5, pairs % 5 + 5])
    verdicts = np.tile(np.arange(labels) < relevant, 2)
    people, report = make_table(*places, verdicts.astype(np.int8), 10), Reporter()
    config = EvalConfig("data", "index", human="people.tsv", k=(5,))
    human_corrections({"base": base, "new": new}, base, people, config, report)
    assert [told in warning for warning in report.warnings] == [True] * bool(told)


def test_ids_in_quotes_are_read_back_from_the_table_for_people(tmp_path):
    ids = pa.chunked_array([['i"0', '"i1"', '""']], pa.large_string())
    catalog, query_ids = Catalog(ids, ids), ['"q0"', "q1"]
    nothing = np.empty(0, dtype=np.int64)
    split = make_split("test", query_ids, ["buy", "buy"], nothing, nothing, row_lists(nothing, nothing, 2))
    path = tmp_path / "to_label.tsv"
    write_sample(path, [np.array([[0, 1], [1, 2]])], 4, split, catalog)
    path.write_text(path.read_text().replace("\t\t", "\t1\t"))
    table = read_sample(path, query_ids, catalog, None, Reporter())
    assert table.query_rows.tolist() == [0, 0, 1, 1]
    assert table.item_rows.tolist() == [0, 1, 1, 2]
