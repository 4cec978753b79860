"""The quality benchmark's figures: equal recall, ratios, noise and what identifies a run."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import pyarrow as pa
import pyarrow.parquet as pq
import quality
import quality_ablations
import quality_runs
from quality_figures import at_equal_recall, flip_verdicts, ratio_interval, t_interval


def test_equal_recall_where_a_segment_crosses_the_base() -> None:
    # Recall .5 → .4 while gain goes 0 → 1; the base's .45 lies half way.
    place = at_equal_recall([(0.5, 0.0), (0.4, 1.0)], 0.45)
    assert place.gain == pytest.approx(0.5)
    assert (place.first, place.second) == (0, 1)
    assert place.weight == pytest.approx(0.5)


def test_equal_recall_at_a_checkpoint_itself() -> None:
    place = at_equal_recall([(0.4, 0.0), (0.5, 2.0), (0.45, 1.0)], 0.4)
    assert (place.gain, place.first, place.second, place.weight) == (2.0, 1, 1, 0.0)


def test_equal_recall_when_the_line_comes_back_from_below() -> None:
    # Down through the base's recall at gain 1, and up again at gain 4.
    place = at_equal_recall([(0.5, 0.0), (0.3, 2.0), (0.5, 6.0), (0.1, 6.0)], 0.4)
    assert place.gain == pytest.approx(6.0)
    assert at_equal_recall([(0.5, 0.0), (0.3, 2.0), (0.45, 5.0)], 0.4).gain == pytest.approx(5.0)
    place = at_equal_recall([(0.5, 0.0), (0.3, 2.0), (0.5, 1.0)], 0.4)
    assert place.gain == pytest.approx(1.5)
    assert (place.first, place.second) == (1, 2)


def test_equal_recall_needs_a_checkpoint_that_keeps_it() -> None:
    assert at_equal_recall([(0.3, 1.0), (0.2, 2.0)], 0.4) is None
    assert at_equal_recall([(0.4, 0.0), (0.2, 2.0)], 0.4).gain == 0  # leaves at once: only the start keeps it


def test_t_interval_of_known_numbers() -> None:
    mean, half = t_interval([1.0, 2.0, 3.0])
    assert mean == 2
    assert half == pytest.approx(4.302653 / 3**0.5, rel=1e-6)  # t(.975, 2)
    assert np.isnan(t_interval([1.0])[1])


def test_the_ratio_interval_covers_the_true_ratio_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        ours, theirs = rng.poisson(3.0, (5, 200)), rng.poisson(1.5, (5, 200))
        ratio, low, high = ratio_interval(ours, theirs, samples=200, seed=trial)
        assert ratio == pytest.approx(ours.sum() / theirs.sum())
        assert low < ratio < high
        covered += low < 2 < high
    assert covered >= 180


def test_the_ratio_interval_knows_that_seeds_differ() -> None:
    # The same query figures in every seed, but one seed brings nothing: queries alone would not show it.
    theirs = np.ones((5, 500))
    ours = np.repeat([[2.0], [2.0], [2.0], [2.0], [0.0]], 500, axis=1)
    _, low, high = ratio_interval(ours, theirs)
    assert low <= 1.2
    assert high == pytest.approx(2.0)


def test_a_ratio_over_nothing_is_infinite() -> None:
    assert ratio_interval(np.ones((3, 10)), np.zeros((3, 10))) == (np.inf, np.inf, np.inf)
    _, low, high = ratio_interval(np.zeros((3, 10)), np.zeros((3, 10)))
    assert (low, high) == (0, np.inf)


def test_a_noisy_judge_errs_at_the_rates_it_is_given() -> None:
    relevant = np.arange(200_000) % 4 == 0
    said = flip_verdicts(relevant, 0.05, 0.2, seed=1)
    assert said[~relevant].mean() == pytest.approx(0.05, abs=0.003)
    assert (~said[relevant]).mean() == pytest.approx(0.2, abs=0.006)
    np.testing.assert_array_equal(said, flip_verdicts(relevant, 0.05, 0.2, seed=1))
    np.testing.assert_array_equal(flip_verdicts(relevant, 0, 0, seed=1), relevant)


@pytest.fixture
def true_labels(tmp_path: Path) -> Path:
    """300 queries of 10 judged pairs, the first of which is relevant."""
    columns = {
        "query_id": [f"q{n}" for n in range(300) for _ in range(10)],
        "item_id": [f"i{n}" for _ in range(300) for n in range(10)],
        "verdict": pa.array([int(n == 0) for _ in range(300) for n in range(10)], pa.int8()),
    }
    pq.write_table(pa.table(columns), tmp_path / "judgements.parquet")
    return tmp_path / "judgements.parquet"


def listed(path: Path) -> list[tuple[str, str, float]]:
    from novelret.data.source import read_qrels_file

    return [(query, item, score) for _, query, item, score in read_qrels_file(path)]


def test_bought_labels_are_whole_queries_with_both_verdicts(true_labels: Path, tmp_path: Path) -> None:
    quality_ablations.write_judgements(true_labels, tmp_path / "few.tsv", {"kind": "bought", "count": 45})
    rows = listed(tmp_path / "few.tsv")
    assert len(rows) == 45
    sizes = {query: sum(row[0] == query for row in rows) for query, _, _ in rows}
    assert sorted(sizes.values()) == [5, 10, 10, 10, 10]
    assert all((item == "i0") == (score > 0) for _, item, score in rows)
    assert {query for query in sizes} != {f"q{n}" for n in range(5)}  # drawn, not the first ones


def test_scattered_labels_are_pairs_of_any_query(true_labels: Path, tmp_path: Path) -> None:
    quality_ablations.write_judgements(
        true_labels, tmp_path / "some.tsv", {"kind": "scattered", "count": 300}
    )
    rows = listed(tmp_path / "some.tsv")
    assert len({(query, item) for query, item, _ in rows}) == 300
    assert 150 < len({query for query, _, _ in rows}) < 240  # 300 of 300 × 10: 63 % of the queries
    assert all((item == "i0") == (score > 0) for _, item, score in rows)


def test_noisy_and_incomplete_judgement_files(true_labels: Path, tmp_path: Path) -> None:
    make = {"kind": "noise", "false_positives": 0.1, "misses": 0.5, "twice": False}
    quality_ablations.write_judgements(true_labels, tmp_path / "noisy.tsv", make)
    items = [item for _, item, _ in listed(tmp_path / "noisy.tsv")]
    assert 100 < items.count("i0") < 200
    assert 200 < len(items) - items.count("i0") < 340
    quality_ablations.write_judgements(true_labels, tmp_path / "twice.tsv", make | {"twice": True})
    items = [item for _, item, _ in listed(tmp_path / "twice.tsv")]
    assert 40 < items.count("i0") < 110  # a quarter of 300
    assert 10 < len(items) - items.count("i0") < 50  # a hundredth of 2,700
    quality_ablations.write_judgements(true_labels, tmp_path / "known.tsv", {"kind": "unknown"})
    assert listed(tmp_path / "known.tsv") == [(f"q{n}", "i0", 1.0) for n in range(300)]


def test_corrected_rewards_are_right_on_average(true_labels: Path) -> None:
    """Drawn in these shares, yeses at +1 and noes at −1 add up to 0 over what is truly irrelevant."""
    errs = 0.1
    share = quality_ablations.corrected_share(true_labels.parent, errs)
    verdicts = pq.read_table(true_labels)["verdict"].to_numpy()  # one yes in ten
    per_yes, per_no = (1 - share) / (verdicts > 0).sum(), share / (verdicts == 0).sum()
    # Of irrelevant pairs a tenth is called relevant.
    assert errs * per_yes == pytest.approx((1 - errs) * per_no, rel=1e-3)


def test_a_rate_is_chosen_by_the_checkpoint_within_the_budget_first() -> None:
    def tuned(recall: float, gain: float, chosen: int) -> dict:
        points = [
            {"step": 0, "share": 1, "recall": 0.5, "relevant_novel": 0.0, "base_recall": 0.5},
            {"step": 9, "share": 1, "recall": recall, "relevant_novel": gain, "base_recall": 0.5},
        ]
        return {"error": None, "points": points, "chosen": points[chosen]}

    def worth(result: dict, max_recall_drop: float = 0.0) -> tuple[float, float, float]:
        return quality.worth_on_validation(result, max_recall_drop)

    within, beyond = tuned(0.51, 0.1, 1), tuned(0.1, 9.0, 0)
    assert worth(within) > worth(beyond) > worth({"error": "the loss is nan"})
    rises_then_falls = tuned(0.4, 2.0, 0)
    rises_then_falls["points"].insert(
        1, {"step": 5, "share": 1, "recall": 0.6, "relevant_novel": 1.0, "base_recall": 0.5}
    )
    assert worth(rises_then_falls)[:2] == (0.0, pytest.approx(1.5))
    # Neither keeps the budget: the one that has more where a tenth of the recall is lost.
    slow, fast = tuned(0.4, 1.0, 0), tuned(0.3, 8.0, 0)
    assert worth(slow) == (0.0, 0.0, pytest.approx(0.5))
    assert worth(fast) == (0.0, 0.0, pytest.approx(2.0))
    lost_within_budget = tuned(0.46, 3.0, 1)
    assert worth(lost_within_budget, 0.0) < worth(within) < worth(lost_within_budget, 0.1)


def test_a_path_goes_along_the_checkpoints_and_back_along_the_blends() -> None:
    points = [{"step": s, "share": a} for s, a in ((0, 1), (5, 1), (9, 1), (9, 0.2), (9, 0.6))]
    path = [(point["step"], point["share"]) for point in quality_runs.path_of(points)]
    assert path == [(0, 1), (5, 1), (9, 1), (9, 0.6), (9, 0.2), (0, 1)]
    assert quality_runs.path_of(points[:3]) == points[:3]


def test_a_path_goes_on_along_the_lines_with_less_of_the_memory() -> None:
    blends = [(9, share, memory) for memory in (1, 0.5, 0.1) for share in (0.3, 0.6, 1)]
    keys = dict.fromkeys([(0, 1, 1), (5, 1, 1), *blends])
    points = [{"step": step, "share": share, "memory": memory} for step, share, memory in keys]
    path = [(point["step"], point["share"], point["memory"]) for point in quality_runs.path_of(points)]
    assert path == [
        (0, 1, 1), (5, 1, 1), (9, 1, 1), (9, 0.6, 1), (9, 0.3, 1), (0, 1, 1),
        (9, 0.3, 0.5), (9, 0.6, 0.5), (9, 1, 0.5), (9, 1, 0.1), (9, 0.6, 0.1), (9, 0.3, 0.1), (0, 1, 1),
    ]  # fmt: skip


def test_published_methods_do_not_move_with_the_defaults() -> None:
    names = set(quality.NAMED)
    tuned = set(quality.METHODS) - set(quality.UNTUNED) - set(quality.ON_REQUEST)
    assert all(names <= quality.METHODS[name].keys() for name in tuned)
    # Their identity holds no setting but those named; the default's holds all of the program's.
    assert quality.METHODS["default"].keys() == {"objective", "tune"}
    assert not names <= quality.METHODS["whole-encoder"].keys()
    whole = quality_runs.explicit({"data": "d", "index": "i", "objective": "pg-ret"})
    assert {"loss", "temperature", "window"} <= whole.keys()
    one, other = ({"loss": loss} for loss in ("boundary", "aggressive"))
    assert quality_runs.identity("a", one, []) == quality_runs.identity("a", dict(one), [])
    assert quality_runs.identity("a", one, []) != quality_runs.identity("a", other, [])


def test_one_rate_is_not_tried_before_it_is_taken() -> None:
    setting = SimpleNamespace(
        name="set", length=50, options=SimpleNamespace(rates=[0.01]), measured=lambda m: m
    )
    found = quality.choose_rates(None, [setting], ["supervised", "default"])
    assert found == {("set", 50, "supervised"): 0.01}


def test_runs_on_other_data_of_the_same_name_are_refused(tmp_path: Path) -> None:
    data, folder = tmp_path / "data", tmp_path / "out"
    (data / "qrels").mkdir(parents=True)
    folder.mkdir()
    (data / "qrels" / "test.tsv").write_text("a")
    for _ in range(2):
        quality_runs.check_data(folder, data)
    (data / "qrels" / "test.tsv").write_text("b")
    with pytest.raises(SystemExit, match="holds runs on other data"):
        quality_runs.check_data(folder, data)
