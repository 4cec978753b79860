"""Validation points: of the weights that a step leaves, and of blends between these and the start."""

from __future__ import annotations

from novelret.train import checkpoint
from novelret.train.run import Run
from novelret.train.validation import Point, make_point, measure

_MEMORY_SHARES = (0.5, 0.25, 0.1)


def add_point(run: Run, points: list[Point], step: int, share: float = 1.0, memory: float = 1.0) -> None:
    """Validate the weights as they are and add the point; every process has to call it."""
    assert run.validation is not None
    whole = run.items.held if run.items.shard is None else None
    figures = measure(run.validation, run.tower.embed_validation(), run.index, whole, run.processes.device)
    points.append(make_point(step, run.processes.concatenate(figures), share, memory))


def validate_blends(run: Run, points: list[Point], step: int) -> None:
    """Add points on the line from the starting weights to those of the last step.

    Weights between two models are often better than either at what both can do (Wortsman et al., 2022):
    here they trade recall for novelty far better than stopping earlier does. Where they hold a memory, the
    line is followed with less of it as well: how far a query is to be moved by queries like it differs
    between data sets, and a memory that was trained at every share needs no second training for that.
    """
    if run.validation is None or step == 0:
        return
    line = [part / run.config.blends for part in range(1, run.config.blends)]
    blends = [(share, 1.0) for share in line]
    if line and run.tower.memory is not None:
        blends += [(share, memory) for memory in _MEMORY_SHARES for share in (*line, 1.0)]
    with run.report.bar("validating blends", len(blends)) as advance:
        for share, memory in blends:
            checkpoint.load_weights(run.tower, run.folder, step, share, memory)
            add_point(run, points, step, share, memory)
            advance(1)
