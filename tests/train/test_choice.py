"""What a training says of its choice: each doubt where it applies, and nowhere else."""

import io
from dataclasses import replace

from rich.console import Console

from novelret.progress import Reporter
from novelret.train.choice import say_budget, say_choice
from novelret.train.config import TrainConfig
from novelret.train.validation import Point, worth_showing

START = Point(0, 0.0, 0.0, 0.60, 0.0, 0.0, 0.60, 0.0)
GOOD = Point(40, 9.0, 2.0, 0.62, 1.0, 2.0, 0.60, 0.001)


def warnings_of(chosen: Point, *points: Point, recall_of: str = "feedback") -> list[str]:
    report = Reporter()
    config = TrainConfig(data="d", index="i", recall_of=recall_of)
    say_choice(chosen, list(points), 100, config, report)
    return report.warnings


def budget_warnings(start: Point, judged_top: float, recall_of: str = "feedback") -> list[str]:
    report = Reporter()
    say_budget(start, judged_top, TrainConfig(data="d", index="i", labels="l", recall_of=recall_of), report)
    return report.warnings


def test_a_clear_choice_has_no_warning() -> None:
    assert warnings_of(GOOD, START, GOOD) == []


def test_a_log_of_what_was_shown_is_recognised() -> None:
    start, good = (replace(point, base_recall=1.0, recall=1.0) for point in (START, GOOD))
    assert warnings_of(good, start, good) == []  # that was said before the first step
    (said,) = budget_warnings(start, 0.0)
    assert "log of what it showed" in said
    assert "--recall-of known" in said
    assert budget_warnings(START, 0.0) == []


def test_what_is_known_must_be_known_of_the_deployed_lists_too() -> None:
    (said,) = budget_warnings(START, 0.1, recall_of="known")
    assert "10% is labelled" in said
    assert "--from base-top" in said
    assert budget_warnings(replace(START, base_recall=1.0), 0.9, recall_of="known") == []


def test_the_start_chosen_over_what_lost_recall() -> None:
    worse = replace(GOOD, recall=0.5)
    (said,) = warnings_of(START, START, worse)
    assert "the saved encoder is the one it started from" in said


def test_a_count_of_what_is_labelled_is_said_to_be_one() -> None:
    def note_of(judged: float) -> str:
        console = Console(file=io.StringIO(), width=1_000)
        chosen = replace(GOOD, judged_novel=judged, likely=3.25)
        say_choice(chosen, [START, chosen], 100, TrainConfig(data="d", index="i"), Reporter(console=console))
        return console.file.getvalue()

    bound = "relevant novel 2.000 (3.250 likely: 60% of the novel items are labelled), recall 0.6200"
    assert bound in note_of(0.6)
    assert "relevant novel 2.000, recall 0.6200" in note_of(0.96)


def test_a_choice_by_a_handful_of_labels_is_told() -> None:
    few = replace(GOOD, relevant_novel=0.04, judged_novel=0.01)
    (said,) = warnings_of(few, START, few)
    assert "rests on 4 relevant novel items of 100 held-back queries" in said
    assert "1.0% are labelled" in said
    assert not any("rests on" in text for text in warnings_of(START, START, few))


def test_a_choice_without_any_label_is_told() -> None:
    blind = replace(GOOD, relevant_novel=0.0, judged_novel=0.0)
    for chosen in (blind, START):
        assert any("relevant or not" in text for text in warnings_of(chosen, START, blind))
    assert not any("relevant or not" in text for text in warnings_of(START, START, replace(START, step=40)))


def test_no_point_within_the_budget_and_too_few_queries() -> None:
    broken = replace(GOOD, recall=0.5, recall_error=0.05)
    said = warnings_of(broken, replace(START, recall=0.4), broken)
    assert any("no checkpoint keeps recall" in text for text in said)
    assert any("coarser than the budget" in text for text in said)


def test_of_dozens_of_blends_those_are_shown_that_no_other_beats() -> None:
    last = replace(GOOD, step=80, likely=1.0, recall=0.5)
    better = replace(last, share=0.5, likely=1.5, recall=0.63)
    beaten = replace(last, share=0.5, memory=0.1, likely=1.4, recall=0.61)
    points = [START, GOOD, last, better, beaten]
    assert worth_showing(points, GOOD) == points[:4]
    assert worth_showing(points, beaten) == points
    assert [point.name for point in points[2:]] == [
        "step-80",
        "step-80-share-0.5",
        "step-80-share-0.5-memory-0.1",
    ]


def test_a_memory_that_is_turned_down_is_told() -> None:
    for memory, told in ((1.0, False), (0.5, False), (0.1, True)):
        console = Console(file=io.StringIO(), width=400)
        chosen = replace(GOOD, memory=memory)
        say_choice(chosen, [START, chosen], 100, TrainConfig(data="d", index="i"), Reporter(console=console))
        assert ("only 10% of the memory is kept" in console.file.getvalue()) == told
