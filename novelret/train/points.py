"""Validation points: of the weights that a step leaves, and of blends between these and the start."""

from __future__ import annotations

import numpy as np

from novelret.train import checkpoint
from novelret.train.run import Run
from novelret.train.validation import Point, make_point, measure

_MEMORY_SHARES = (0.5, 0.25, 0.1)


def add_point(run: Run, points: list[Point], step: int) -> None:
    """Validate the weights as they are and add the point; every process has to call it."""
    (embeddings,) = run.tower.embed_validation((1.0,))
    points.append(_point(run, embeddings, step, 1.0, 1.0))


def validate_blends(run: Run, points: list[Point], step: int) -> None:
    """Add points on the line from the starting weights to those of the last step.

    Weights between two models are often better than either at what both can do (Wortsman et al., 2022):
    here they trade recall for novelty far better than stopping earlier does. Where they hold a memory, the
    line is followed with less of it as well: how far a query is to be moved by queries like it differs
    between data sets, and a memory that was trained at every share needs no second training for that.
    """
    if run.validation is None or step == 0 or run.config.blends == 1:
        return
    parts = run.config.blends
    line, memories = [part / parts for part in range(1, parts)], [1.0]
    if run.tower.memory is not None:
        line, memories = [*line, 1.0], [1.0, *_MEMORY_SHARES]
    blends: list[Point] = []
    with run.report.bar("validating blends", len(line) * len(memories)) as advance:
        for share in line:
            checkpoint.load_weights(run.tower, run.folder, step, share)
            for memory, embeddings in zip(memories, run.tower.embed_validation(memories), strict=True):
                if share * memory < 1:  # 1 is the checkpoint
                    blends.append(_point(run, embeddings, step, share, memory))
                advance(1)
    points += sorted(blends, key=lambda point: -point.memory)


def _point(run: Run, embeddings: np.ndarray, step: int, share: float, memory: float) -> Point:
    assert run.validation is not None
    whole = run.items.held if run.items.shard is None else None
    figures = measure(run.validation, embeddings, run.index, whole, run.processes.device)
    return make_point(step, run.processes.concatenate(figures), share, memory)
