"""What a training says of its choice of a point: the figures, and every reason to doubt them."""

from __future__ import annotations

from novelret.evaluate.metrics import ENOUGH_JUDGED, LOGGED_RECALL
from novelret.progress import Reporter
from novelret.train.config import TrainConfig
from novelret.train.validation import Point, keeps_budget

_MOSTLY = 0.5
_FEW = 30  # items; their number is uncertain by a fifth and more
_TURNED_DOWN = 0.25  # share of a memory


def say_budget(start: Point, judged_top: float, config: TrainConfig, report: Reporter) -> None:
    """Warn, before any step is paid for, where the recall budget does not measure what is meant.

    Args:
        start: the point before any step.
        judged_top: share of the deployed top L of the held-back queries that has a label.
        config: of the run.
        report: where it is said.
    """
    if start.base_recall >= LOGGED_RECALL and config.recall_of == "feedback":
        report.warn(
            f"the deployed top {config.base_depth} holds {start.base_recall:.1%} of the held-back feedback, "
            "as it does where feedback is a log of what it showed: every change then looks like a loss of "
            "recall. Count what is judged relevant too (--recall-of known, best with labels --from "
            "base-top), or allow for it (--max-recall-drop)"
        )
    if config.recall_of == "known" and judged_top < _MOSTLY:
        report.warn(
            f"of what the deployed top {config.base_depth} holds, {judged_top:.0%} is labelled: --recall-of "
            "known then counts less of what a change loses than of what it gains. Label that as well "
            "(novelret label --from base-top) and give both (--labels A --labels B)"
        )


def say_choice(
    chosen: Point, points: list[Point], n_queries: int, config: TrainConfig, report: Reporter
) -> None:
    """Report the chosen point, and warn of what makes the choice doubtful.

    Args:
        chosen: the point whose weights are saved.
        points: every validated point, the start first.
        n_queries: held-back queries behind them.
        config: of the run.
        report: where it is said.
    """
    base_recall, drop = chosen.base_recall, config.max_recall_drop
    if not keeps_budget(chosen, drop):
        report.warn(
            f"no checkpoint keeps recall within {drop:.1%} of the deployed {base_recall:.4f}; "
            f"{chosen.name} loses least"
        )
    elif chosen.step == 0:
        report.warn(
            f"every later checkpoint loses more than {drop:.1%} of the deployed recall "
            f"{base_recall:.4f} on the held-back queries, or brings nothing: the saved encoder is the one it "
            "started from. Lower --learning-rate, try another --tune, or raise --max-recall-drop"
        )
    count = round(chosen.relevant_novel * n_queries)
    if any(point.novelty for point in points) and not any(point.judged_novel for point in points):
        report.warn(
            "no novel item of the held-back queries is labelled: the choice is by how many novel items a "
            "checkpoint brings, relevant or not. Label them (novelret label) and give --labels"
        )
    elif chosen.step > 0 and count < _FEW:
        report.warn(
            f"the choice rests on {count} relevant novel items of {n_queries} held-back queries, of whose "
            f"novel items {chosen.judged_novel:.1%} are labelled: one or two more decide it. Label more, or "
            "save several (--keep 5) and have a judge compare them (novelret eval --model "
            "NAME=MODEL/checkpoints)"
        )
    noise = 1.96 * chosen.recall_error
    if noise > drop * base_recall and chosen.recall - noise < base_recall * (1 - drop):
        report.warn(
            f"{n_queries} held-back queries measure the change of recall to ± {noise:.4f}, coarser than the "
            f"budget ({drop:.1%}, {drop * base_recall:.4f}): hold back more (--validation-fraction) or allow "
            "for it (--max-recall-drop)"
        )
    found = f"{chosen.relevant_novel:.3f}"
    if 0 < chosen.judged_novel < ENOUGH_JUDGED:
        found += f" ({chosen.likely:.3f} likely: {chosen.judged_novel:.0%} of the novel items are labelled)"
    report.note(
        f"chosen: {chosen.name} of {config.steps}, on the held-back queries: novelty "
        f"{chosen.novelty:.2f}, relevant novel {found}, recall {chosen.recall:.4f} (deployed "
        f"{base_recall:.4f})"
    )
    if chosen.step > 0 and chosen.memory <= _TURNED_DOWN:
        report.note(
            f"only {chosen.memory:.0%} of the memory is kept: what is known of other queries says little of "
            "these. A whole encoder may bring more then (--tune full --learning-rate 5e-5)"
        )
