"""Run a command line as a user does, in this process."""

from __future__ import annotations

import json
from typing import Any

import pytest

from novelret.cli import main


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout, and stderr on one line, however wide the terminal is."""
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, " ".join(captured.err.split())


def result(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    """The JSON result of a command that has to succeed."""
    code, out, err = run(capsys, *arguments, "--json", "--quiet")
    assert code == 0, err
    return json.loads(out)


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of a user's error."""
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, ""), captured.err
    lines: list[str] = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    return lines[0]
