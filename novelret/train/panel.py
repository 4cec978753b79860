"""The live panel of a training run in a terminal: how it learns, beside how long it will take."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from rich.console import Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from novelret.progress import RateColumn, Reporter
from novelret.train.config import TrainConfig
from novelret.train.validation import Point, best_first, keeps_budget


class Panel:
    """Progress, the last log line and the last validation; silent where nobody watches a terminal."""

    def __init__(self, config: TrainConfig, steps: int, live: Live | None, progress: Progress) -> None:
        """Show it in `live`, or nowhere."""
        self.config, self.live, self.progress = config, live, progress
        self.task = progress.add_task(f"training {config.objective}", total=steps)
        self.line: dict[str, Any] = {}
        self.points: list[Point] = []

    def advance(self, steps: int) -> None:
        """So many steps more are done."""
        self.progress.advance(self.task, steps)

    def show_line(self, line: dict[str, Any]) -> None:
        """Show a log line, beside what only earlier ones say."""
        self.line |= line
        self._draw()

    def show_points(self, points: list[Point]) -> None:
        """Show the validation points so far."""
        self.points = points
        self._draw()

    def _draw(self) -> None:
        if self.live is not None:
            self.live.update(Group(self.progress, self.table()))

    def table(self) -> Table:
        """Names and figures, two columns."""
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim")
        table.add_column()
        if self.line:
            table.add_row("step", _join(self._of_line()))
        if self.points:
            table.add_row("held back", _join(self._of_points()))
        return table

    def _of_line(self) -> Iterator[str]:
        names = {"loss": "loss", "reward": "reward", "entropy": "entropy", "learning_rate": "learning rate"}
        for name, shown in names.items():
            if self.line.get(name) is not None:
                yield f"{shown} {self.line[name]:.4g}"
        for name in ("rewarded/base", "rewarded/policy"):
            if name in self.line:
                yield f"{name.replace('/', ' ')} {self.line[name]:.0%}"
        yield f"memory {peak_memory():.1f} GB"

    def _of_points(self) -> Iterator[str]:
        point, length = self.points[-1], self.config.base_depth
        budget = point.base_recall * (1 - self.config.max_recall_drop)
        kept = "kept" if keeps_budget(point, self.config.max_recall_drop) else "broken"
        yield f"novelty@{length} {point.novelty:.2f}"
        yield f"relevant novel {point.relevant_novel:.3f}, likely {point.likely:.3f}"
        yield f"recall {point.recall:.4f}, budget {budget:.4f} {kept}"
        yield f"best so far: step {best_first(self.points, self.config.max_recall_drop)[0].step}"


@contextlib.contextmanager
def training_panel(config: TrainConfig, steps: int, report: Reporter) -> Iterator[Panel]:
    """A panel for the time of a run of so many steps; live where `report` has a terminal."""
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        RateColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=report.console,
    )
    if not report.is_live:
        yield Panel(config, steps, None, progress)
        return
    with Live(progress, console=report.console, refresh_per_second=4) as live:
        yield Panel(config, steps, live, progress)


def peak_memory() -> float:
    """Most memory held so far, in GB: the GPU's where one is used, else the process's; 0 where none tells."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def _join(parts: Iterator[str]) -> str:
    return "   ".join(parts)
