"""The command line in processes of their own that start fast, to be killed, and a training broken off at a step."""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path

import pytest

# A clean process that has the heavy modules loaded, and from which each run is forked.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "novelret.cli",
        "novelret.label.label",
        "novelret.label.judges.openai",
        "novelret.label.judges.openai_batch",
        "novelret.train.trainer",
        "sentence_transformers",
    ]
)


def start(
    arguments: list[str], environment: dict[str, str], log: Path, patches: dict[str, dict[str, object]]
) -> multiprocessing.process.BaseProcess:
    """Begin `novelret ARGUMENTS`; what it prints is appended to `log`. `patches`: module → name → value."""
    process = _context.Process(target=_run, args=(arguments, environment, log, patches))
    process.start()
    return process


def _run(
    arguments: list[str], environment: dict[str, str], log: Path, patches: dict[str, dict[str, object]]
) -> None:
    from importlib import import_module

    os.environ.update(environment)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    for module, values in patches.items():
        for name, value in values.items():
            setattr(import_module(module), name, value)
    from novelret.cli import main

    code = main(arguments)
    sys.stdout.flush()
    os._exit(code)


def break_off_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a training in this process interrupted at a step, until the patch is undone."""
    from novelret.train import loop

    real = loop.batch_loss

    def breaks(*arguments):
        if arguments[-1] == step:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(loop, "batch_loss", breaks)
