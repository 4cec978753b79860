"""Run `novelret convert` as a user does, and read what it made."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from tests import commands


def convert(capsys, *arguments) -> dict:
    return commands.result(capsys, "convert", *arguments)


def fails(capsys, *arguments) -> str:
    """The one line of a user's error; nothing may have appeared at --out."""
    said = commands.fails(capsys, "convert", *arguments)
    out = Path(arguments[[str(a) for a in arguments].index("--out") + 1])
    assert not list(out.parent.glob(out.name + "*"))
    return said


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def pairs_of(path: Path) -> list[tuple[str, str, float]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "query-id\tcorpus-id\tscore"
    return [(q, i, float(s)) for q, i, s in (line.split("\t") for line in lines[1:])]


def write_lines(path: Path, lines: list[str], *, gz: bool = False) -> Path:
    data = "".join(line + "\n" for line in lines).encode("utf-8")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if gz else data)
    return path
