"""How fast an endpoint may be asked: limits that were given, or that it told of itself."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

_SLACK = 0.25
"""Seconds by which sending may lag and catch up: a late wake-up costs nothing of the allowance."""


class Pace:
    """Spaces requests evenly, so that a requests-per-minute and a tokens-per-minute limit hold.

    Attributes:
        rpm: requests per minute; None for no limit that is known.
        tpm: tokens per minute, prompt and longest answer together, as endpoints count them.
        silent_until: time before which the endpoint asked for silence.
        width: requests that may be under way at once, as far as the endpoint has let that be known.
        refusals: waves of refusals since the last answer.
    """

    def __init__(self, rpm: float | None = None, tpm: float | None = None, widest: int = 1) -> None:
        """Start with the limits the user gave; those that are None are learnt, as is a smaller width."""
        self.rpm, self.tpm = rpm, tpm
        self.width = self._widest = float(widest)
        self.refusals, self._narrowed = 0, 0.0
        self.silent_until = 0.0
        self._silent_since = 0.0
        self._learn_rpm, self._learn_tpm = rpm is None, tpm is None
        self._next: float | None = None  # the next free slot

    def slot(self, now: float, tokens: int) -> float:
        """When a request of so many tokens may go out; each call takes a slot.

        Args:
            now: seconds on any clock that only goes forward.
            tokens: of the prompt and the longest answer.
        """
        earliest = now if self._next is None else max(self._next, now - _SLACK)
        slot = max(earliest, self.silent_until)
        per_request = 60 / self.rpm if self.rpm else 0.0
        for_tokens = tokens * 60 / self.tpm if self.tpm else 0.0
        self._next = slot + max(per_request, for_tokens)
        return slot

    def refuse(self, now: float, silence: float) -> None:
        """Take note that the endpoint asked for so many seconds of silence; the account's, so all wait."""
        # Refusals of requests that were under way when the first one came do not begin the wait anew.
        if now >= self.silent_until:
            self._silent_since = now
        self.silent_until = max(self.silent_until, self._silent_since + silence)

    def narrow(self, sent: float, now: float, *, names_a_time: bool = False) -> None:
        """Take note of a refusal; where it names no time to wait, fewer requests may be under way at once.

        Args:
            sent: when the request went out; those that were under way when another was refused say nothing
                new.
            now: on the same clock.
            names_a_time: whether the endpoint says how long to wait.
        """
        if sent >= self._narrowed:
            self._narrowed = now
            self.refusals += 1
            if not names_a_time:
                self.width = max(1.0, self.width / 2)

    def widen(self) -> None:
        """Take note of an answer: after as many as are under way, one more may be."""
        self.refusals = 0
        self.width = min(self._widest, self.width + 1 / self.width)

    def learn(self, headers: Mapping[str, str]) -> None:
        """Take over the limits that an answer's headers tell (x-ratelimit-limit-…)."""
        if self._learn_rpm:
            self.rpm = _positive(headers, "x-ratelimit-limit-requests") or self.rpm
        if self._learn_tpm:
            self.tpm = _positive(headers, "x-ratelimit-limit-tokens") or self.tpm


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds of silence that an answer asks for (Retry-After as seconds or date, or the finer -ms)."""
    milliseconds = _positive(headers, "retry-after-ms")
    if milliseconds is not None:
        return milliseconds / 1e3
    seconds = _positive(headers, "retry-after")
    if seconds is not None:
        return seconds
    try:
        until = parsedate_to_datetime(headers["retry-after"])
        return max(0.0, (until - datetime.now(UTC)).total_seconds()) or None
    except (KeyError, ValueError, TypeError):
        return None


def _positive(headers: Mapping[str, str], name: str) -> float | None:
    try:
        value = float(headers[name])
    except (KeyError, ValueError):
        return None
    return value if 0 < value < float("inf") else None
