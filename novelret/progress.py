"""What a stage tells its user while it works: progress bars, notes and warnings, all on stderr."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from datetime import timedelta

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

_BETWEEN_LINES = 60.0  # seconds
_RECENT, _BETWEEN_LOOKS = 30.0, 1.0  # seconds that a rate is of, and between the times that it is looked at


def shown(text: str) -> str:
    """A text that may hold anything, without what rich or a terminal would take for an instruction."""
    return escape("".join(c if c.isprintable() or c == "\n" else " " for c in text))


class Reporter:
    """Speaks to the user on stderr; a quiet one keeps warnings only.

    Library calls that pass none get a silent one that keeps its warnings in `warnings`.
    """

    def __init__(self, *, quiet: bool = False, console: Console | None = None) -> None:
        """Make a reporter; without a console it is silent."""
        self.quiet = quiet
        self.console = console
        self.warnings: list[str] = []

    def note(self, text: str) -> None:
        """Say something worth knowing."""
        if self.console is not None and not self.quiet:
            self.console.print(shown(text), soft_wrap=True)

    def warn(self, text: str) -> None:
        """Say something the user should act on; kept, and shown even when quiet."""
        self.warnings.append(text)
        if self.console is not None:
            self.console.print(f"[yellow]warning:[/] {shown(text)}", soft_wrap=True)

    @property
    def is_live(self) -> bool:
        """Whether somebody watches a terminal; a pipe or a log file stays clean."""
        if self.console is None or self.quiet:
            return False
        # rich takes a pipe for a terminal where FORCE_COLOR or TTY_COMPATIBLE is set, as CI often does.
        return self.console.is_terminal and self.console.file.isatty()

    @contextlib.contextmanager
    def bar(
        self, description: str, total: int | None = None, status: Callable[[], str] = lambda: ""
    ) -> Iterator[Callable[[int], None]]:
        """A progress bar with rate and time left; gives a function to be told of each n done.

        `status` is asked now and then for a few more words to show. Where no one watches a terminal, a line a
        minute says the same, so that a log tells how long work goes; whoever waits tells of 0 done.
        """
        if not self.is_live:
            yield self._lines(description, total, status)
            return
        with Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            RateColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            _Status(status),
            console=self.console,
        ) as progress:
            task = progress.add_task(description, total=total)
            yield lambda n: progress.advance(task, n)

    def _lines(self, description: str, total: int | None, status: Callable[[], str]) -> Callable[[int], None]:
        said = time.monotonic()
        done, looks = 0, deque([(said, 0)])

        def advance(count: int) -> None:
            nonlocal done, said
            done += count
            now = time.monotonic()
            # What was known before is passed over at once; the rate is of what takes time.
            if now - looks[-1][0] >= _BETWEEN_LOOKS:
                looks.append((now, done))
            while len(looks) > 1 and now - looks[1][0] >= _RECENT:
                looks.popleft()
            if now - said < _BETWEEN_LINES:
                return
            then, before = looks[0]
            said, rate = now, (done - before) / max(now - then, 1e-3)
            of = left = ""
            if total is not None:
                of = f" of {total:,}"
                left = f", {timedelta(seconds=round((total - done) / rate))} left" if rate else ""
            self.note(f"{description}: {done:,}{of}, {_shown(rate)}/s{left} {status()}".rstrip())

        return advance


def _shown(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


class RateColumn(ProgressColumn):
    """Things done per second."""

    def render(self, task: Task) -> Text:
        """The rate, or nothing yet."""
        speed = task.finished_speed or task.speed
        if speed is None:
            return Text("")
        return Text(f"{_shown(speed)}/s", style="progress.data.speed")


class _Status(ProgressColumn):
    def __init__(self, status: Callable[[], str]) -> None:
        super().__init__()
        self.status = status

    def render(self, task: Task) -> Text:
        return Text(self.status(), style="dim")
