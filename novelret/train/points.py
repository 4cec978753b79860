"""Validation points: of the weights that a step leaves, and of blends between these and the start."""

from __future__ import annotations

import numpy as np

from novelret.row_lists import RowLists
from novelret.train import checkpoint
from novelret.train.run import Run
from novelret.train.shared_search import search_shared
from novelret.train.validation import Point, make_point, measure

_MEMORY_SHARES = (0.5, 0.25, 0.1)


def add_point(run: Run, points: list[Point], step: int) -> None:
    """Validate the weights as they are and add the point; every process has to call it."""
    assert run.validation is not None
    (figures,) = _measure(run, run.tower.embed_validation((1.0,)))
    points.append(make_point(step, figures))


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
    with run.report.bar("validating blends", len(line)) as advance:
        for share in line:
            checkpoint.load_weights(run.tower, run.folder, step, share)
            measured = _measure(run, run.tower.embed_validation(memories))
            blends += [
                make_point(step, figures, share, memory)
                for memory, figures in zip(memories, measured, strict=True)
                if share * memory < 1  # 1 is the checkpoint
            ]
            advance(1)
    points += sorted(blends, key=lambda point: -point.memory)


def _measure(run: Run, embeddings: list[np.ndarray]) -> list[np.ndarray]:
    """The figures of all processes' validation queries, as several encoders embed these."""
    assert run.validation is not None
    index, items, processes = run.index, run.items, run.processes

    def search(queries: np.ndarray, k: int, excluded: RowLists) -> np.ndarray:
        if items.shard is not None and index.faiss_index is None:
            return search_shared(items, processes, queries, k, index.id_rank, excluded)
        held = items.held if items.shard is None else None
        return index.search(queries, k, excluded, device=processes.device, items=held)[0]

    return [processes.concatenate(figures) for figures in measure(run.validation, embeddings, search)]
