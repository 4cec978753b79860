"""The Pareto set against its definition, and the choice within a recall budget."""

import re

import numpy as np

from novelret.evaluate.chart import Mark, scatter
from novelret.evaluate.frontier import make_frontier
from novelret.tradeoff import unbeaten

MEANS = {
    "base": {"Recall@5": 0.50, "Novelty@5": 0.0, "RelevantNovel@5": 0.0},
    "careful": {"Recall@5": 0.50, "Novelty@5": 1.0, "RelevantNovel@5": 0.4},
    "balanced": {"Recall@5": 0.495, "Novelty@5": 0.9, "RelevantNovel@5": 0.6},
    "bold": {"Recall@5": 0.40, "Novelty@5": 4.0, "RelevantNovel@5": 0.9},
    "worse": {"Recall@5": 0.39, "Novelty@5": 3.0, "RelevantNovel@5": 0.8},
}


def test_pareto_sets_by_hand():
    points = {point.model: point for point in make_frontier(MEANS, "base", 5, 0.01, "Recall@5").points}
    assert [m for m, p in points.items() if p.pareto_novelty] == ["careful", "bold"]
    assert [m for m, p in points.items() if p.pareto_relevant_novel] == ["careful", "balanced", "bold"]
    assert abs(points["bold"].recall_change + 0.2) < 1e-12


def test_rounding_decides_nothing():
    assert unbeaten([(0.4000000000000001, 0.0), (0.39999999999999997, 5.0)]) == [False, True]
    svg = scatter(
        [Mark("a", 0.39999999999999997, 0), Mark("b", 0.4000000000000001, 1)], "x", "y", line_at=0.4
    )
    tiny = scatter([Mark("a", 0, 0), Mark("b", 2e-14, 3e-14)], "x", "y")
    for picture in (svg, tiny):
        places = [float(x) for x in re.findall(r' (?:cx|cy|x|y)="([^"]+)"', picture)]
        assert all(0 <= place <= 740 for place in places)
        assert len(re.findall('class="tick"', picture)) >= 4


def test_the_budget_selects():
    assert [make_frontier(MEANS, "base", 5, drop, "Recall@5").selected for drop in (0.0, 0.01, 0.2, 1.0)] == [
        "careful",
        "balanced",
        "bold",
        "bold",
    ]
    gone = {name: MEANS[name] for name in ("base", "bold")}
    assert make_frontier(gone, "base", 5, 0.01, "Recall@5").selected is None
    nothing = {"base": MEANS["base"], "same": MEANS["base"]}
    assert make_frontier(nothing, "base", 5, 1.0, "Recall@5").selected is None
    unjudged = {m: {n: v for n, v in of.items() if n != "RelevantNovel@5"} for m, of in MEANS.items()}
    frontier = make_frontier(unjudged, "base", 5, 0.01, "Recall@5")
    assert frontier.selected == "careful"
    assert not any(point.pareto_relevant_novel for point in frontier.points)


def test_pareto_set_on_random_clouds():
    rng = np.random.default_rng(0)
    for _ in range(20):
        cloud = rng.integers(0, 8, (30, 2))  # with ties
        means = {f"m{n}": {"Recall@5": float(r), "Novelty@5": float(g)} for n, (r, g) in enumerate(cloud)}
        points = make_frontier(means, "m0", 5, 1.0, "Recall@5").points
        for n, point in enumerate(points):
            dominated = ((cloud >= cloud[n]).all(axis=1) & (cloud > cloud[n]).any(axis=1)).any()
            assert point.pareto_novelty == (not dominated)


def test_every_label_of_a_chart_lies_in_it():
    marks = [Mark(f"m{n}", -n, 0.02 * n) for n in range(4)] + [Mark("winner", 1, 2)]
    svg = scatter(marks, "x", "y")
    height = float(re.search(r'viewBox="0 0 \S+ (\S+)"', svg)[1])
    found = sorted(float(y) for y in re.findall(r'<text class="name" x="\S+" y="(\S+)"', svg))
    assert len(found) == 5
    assert 0 < found[0] < found[-1] < height
    assert min(np.diff(found)) > 10
