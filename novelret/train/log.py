"""The training log: log.jsonl, TensorBoard events beside it, and Weights & Biases where it is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

from novelret.errors import UserError

Line = dict[str, Any]


class Log:
    """Appends lines; whole ones only, at once."""

    def __init__(self, folder: Path, first: int, wandb: str | None, settings: Line) -> None:
        """Open the log of a run that goes on after step `first`; later lines are dropped.

        Args:
            folder: the MODEL folder.
            first: steps done.
            wandb: Weights & Biases project, or None.
            settings: the run's settings.

        Raises:
            UserError: Weights & Biases is asked for and not installed.
        """
        self.path = folder / "log.jsonl"
        _cut(self.path, first)
        self.wandb = _start_wandb(wandb, settings)
        from torch.utils.tensorboard import SummaryWriter

        # Ctrl-C may hit between the writer's thread and its queue; it then sleeps through the closing until
        # it flushes next, by default for two minutes.
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=first + 1, flush_secs=2)
        self.file = self.path.open("a", encoding="utf-8")

    def __call__(self, line: Line) -> None:
        """Write a line; its numbers go to the other logs too."""
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        self.also(line)

    def also(self, line: Line) -> None:
        """Write a line's numbers to TensorBoard and Weights & Biases alone."""
        numbers = {name: value for name, value in line.items() if isinstance(value, (int, float))}
        step = int(numbers.pop("step"))
        for name, value in numbers.items():
            self.board.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log(numbers, step=step)

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()
        self.board.close()
        if self.wandb is not None:
            self.wandb.finish(exit_code=0 if error is None else 1)


def read_log(folder: Path) -> list[Line]:
    """Every line of log.jsonl."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def check_wandb(project: str | None) -> None:
    """Refuse --wandb where it is not installed, before any work is done.

    Raises:
        UserError: it is not installed.
    """
    if project is not None:
        try:
            import wandb  # noqa: F401
        except ImportError:
            raise UserError("--wandb: Weights & Biases is not installed; pip install wandb") from None


def _start_wandb(project: str | None, settings: Line) -> Any:
    if project is None:
        return None
    import wandb

    return wandb.init(project=project, config=settings)


def _cut(path: Path, step: int) -> None:
    """Drop the lines after the step that the run goes on from, and a last one that a kill cut short."""
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]
        temporary = path.with_suffix(".tmp")
        kept = "".join(line for line in whole if json.loads(line)["step"] <= step)
        temporary.write_text(kept, encoding="utf-8")
        temporary.replace(path)
