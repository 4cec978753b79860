"""What is said while a stage works, and where a live bar has no place."""

from __future__ import annotations

import io
import re
import time

import pytest
from rich.console import Console

from novelret import progress
from novelret.progress import Reporter


@pytest.mark.parametrize(
    "forced", [{}, {"FORCE_COLOR": "1"}, {"TTY_COMPATIBLE": "1"}, {"FORCE_COLOR": "1", "TTY_COMPATIBLE": "1"}]
)
@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_bar_moves_in_a_terminal_alone_whatever_colours_are_forced(forced, is_terminal):
    file = io.StringIO()
    file.isatty = lambda: is_terminal
    console = Console(file=file, _environ={"TERM": "xterm", **forced}, width=100)
    report = Reporter(console=console)
    with report.bar("searching", 10) as advance:
        advance(3)
    report.note("done")
    assert ("searching" in file.getvalue()) == report.is_live == is_terminal
    assert "done" in file.getvalue()


def test_a_log_gets_a_line_now_and_then(monkeypatch):
    console = Console(file=io.StringIO(), width=200)
    with Reporter(console=console).bar("asking", 100, lambda: "$0.10") as advance:
        advance(10)
    assert console.file.getvalue() == ""  # nothing was long enough
    monkeypatch.setattr(progress, "_BETWEEN_LINES", 0.0)
    with Reporter(console=console).bar("asking", 100, lambda: "$0.10") as advance:
        time.sleep(0.02)
        advance(25)
        advance(75)
    first, second = console.file.getvalue().splitlines()
    assert re.fullmatch(r"asking: 25 of 100, [\d,]+/s, 0:00:00 left \$0\.10", first)
    assert second.startswith("asking: 100 of 100, ")
    quiet = Console(file=io.StringIO())
    with Reporter(quiet=True, console=quiet).bar("asking", 100) as advance:
        advance(100)
    assert quiet.file.getvalue() == ""


def test_the_time_left_is_of_what_takes_time(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    console = Console(file=io.StringIO(), width=200)
    with Reporter(console=console).bar("asking", 1_000_000) as advance:
        advance(900_000)  # known before
        for _ in range(125):
            clock[0] += 1
            advance(10)
        clock[0] += 60
        advance(0)  # nothing comes any more
        clock[0] += 80
        advance(8_000)  # what is slow tells seldom
    first, second, third, fourth = console.file.getvalue().splitlines()
    assert first == "asking: 900,600 of 1,000,000, 10/s, 2:45:40 left"
    assert second.startswith("asking: 901,200 of 1,000,000, 10/s, 2:44:")
    assert third == "asking: 901,250 of 1,000,000, 0/s"
    assert fourth.startswith("asking: 909,250 of 1,000,000, 100/s, ")


def test_no_note_or_warning_gives_the_terminal_orders():
    console = Console(width=80, force_terminal=True, highlight=False, file=io.StringIO())
    report = Reporter(console=console)
    report.note("\x1b]0;title\x07[red] noted")
    report.warn("\x1b[2J[/b] warned")
    said = console.file.getvalue()
    assert "[red] noted" in said
    assert "[/b] warned" in said
    assert "\x1b]" not in said
    assert "\x1b[2J" not in said
