"""The one error that users see as a line of text instead of a traceback."""

from __future__ import annotations


class UserError(Exception):
    """The user's input is wrong. The message names the file, the line and the remedy; exit code 2."""


class BatchesUnderWay(Exception):
    """Everything is submitted and not yet answered; the same call, made later, collects it."""

    def __init__(self, batches: int, requests: int) -> None:
        """Say how much is under way."""
        super().__init__(
            f"{requests:,} requests in {batches} batch{'es' * (batches != 1)} are under way; run again to "
            "collect them"
        )
        self.batches, self.requests = batches, requests


def first_line(error: Exception) -> str:
    """What a library says of a fault, on one line; its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
