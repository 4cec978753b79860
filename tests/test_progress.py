"""What is said while a stage works, and where a live bar has no place."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

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
