"""Questions for a judge: rendered a bounded number at a time, with their identities kept on disk."""

from __future__ import annotations

import contextlib
import gc
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import NamedTuple

import numpy as np

from novelret.data.split import Split
from novelret.index import Index
from novelret.label.candidates import Candidates
from novelret.label.cost import Caps, Price
from novelret.label.order import asking_order
from novelret.label.store import KEY_SIZE, Store
from novelret.label.table import UNKNOWN

CHUNK = 2_000
"""Questions rendered in one go: few enough that requests under way do not wait for it."""

_FIRST = 50  # answers of a run in which one that can be read should be found
_RECENT, _USELESS = 200, 160  # so many of the last answers that cannot be read end the asking, too

Messages = list[dict[str, str]]
Reader = Callable[[str], tuple[int, float | None]]
"""A judge's answer → (verdict, grade)."""


class Question(NamedTuple):
    """One thing to ask.

    Attributes:
        key: its identity in the store.
        messages: the rendered prompt.
        again: whether it is asked although the store has an answer, as that cannot be read.
    """

    key: bytes
    messages: Messages
    again: bool = False


@dataclass
class Readings:
    """Whether a judge's answers can be read; shared by askings that follow each other.

    Attributes:
        usable: answers that could be read.
        unusable: answers that could not.
        recent: whether each of the last answers could.
        hopeless: why nothing more is to be asked: hardly an answer can be read.
    """

    usable: int = 0
    unusable: int = 0
    recent: deque[bool] = field(default_factory=lambda: deque(maxlen=_RECENT))
    hopeless: str | None = None

    def look_at(self, text: str, usable: bool, *, cut: bool = False) -> None:
        """Take note of an answer; where none of the first can be read, or few of the last, give up.

        Args:
            text: the answer.
            usable: whether it can be read.
            cut: whether the limit on its length ended it.
        """
        self.usable += usable
        self.unusable += not usable
        self.recent.append(usable)
        useless = len(self.recent) - sum(self.recent)
        if usable or self.hopeless or not (useless == len(self.recent) == _FIRST or useless >= _USELESS):
            return
        usable_ones = len(self.recent) - useless
        which = f"but for {usable_ones}, none of the last" if self.usable else "none of the first"
        example = f"for instance {text[:120]!r}" if text else "for instance one without any text"
        remedy = "; give the prompt a higher max_tokens, in a file of your own" if cut or not text else ""
        self.hopeless = f"{which} {len(self.recent)} answers is usable, {example}{remedy}"


@dataclass
class Tally:
    """What asking has come to so far.

    Attributes:
        requests: replies delivered, whatever they held.
        prompt_tokens: billed, by the API's own figures.
        completion_tokens: likewise.
        cost: dollars, 0 where the price is not known.
        retries: requests repeated after a passing fault.
        failed: key of a question → why it got no answer.
        fault: the last thing that went wrong with a request, in words.
        under_way: keys of questions that are being asked now, or whose answer is not stored yet.
        retrying_since: UTC time from which on what cannot be read has been asked again for this output.
        stopped: why asking stopped early, if it did.
        note: what goes on, in a few words.
        earlier_requests: of runs that this one goes on from; the caps count these too.
        earlier_cost: of the same, in dollars.
        caps: how far to go.
        run: identity of the output that is made; what it submits in batches is on its bill.
        in_flight: requests that are sent and not back; a kill leaves it open whether they are paid for.
        in_flight_cost: dollars that these may cost at most.
        readings: whether the answers can be read.
        halt: set from another thread to have asking end once the requests under way are back.
        save: writes down what was spent, so that a kill does not hide it from the caps.
    """

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    retries: int = 0
    failed: dict[bytes, str] = field(default_factory=dict)
    fault: str = ""
    under_way: set[bytes] = field(default_factory=set)
    retrying_since: str = ""
    stopped: str | None = None
    note: str = ""
    earlier_requests: int = 0
    earlier_cost: float = 0.0
    caps: Caps = field(default_factory=Caps)
    run: str = ""
    in_flight: int = 0
    in_flight_cost: float = 0.0
    readings: Readings = field(default_factory=Readings)
    halt: Event = field(default_factory=Event)
    save: Callable[[], None] = lambda: None

    def reached(self, requests: int, cost: float) -> str | None:
        """The cap that so many requests and dollars beyond those counted would exceed, as it is told."""
        requests += self.earlier_requests + self.requests
        return self.caps.reached(requests, self.earlier_cost + self.cost + cost)

    def bill(
        self,
        prompt_tokens: int | None,
        completion_tokens: int | None,
        price: Price | None,
        counted: int = 0,
        longest: int = 0,
    ) -> None:
        """Count a delivered reply; `counted` and `longest` stand for tokens that the endpoint leaves out."""
        self.requests += 1
        self.prompt_tokens += prompt_tokens or 0
        self.completion_tokens += completion_tokens or 0
        if price:
            prompt = counted if prompt_tokens is None else prompt_tokens
            self.cost += price.of(prompt, longest if completion_tokens is None else completion_tokens)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """For code that makes many objects and no cycles: looking for these takes half of its time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class Feed:
    """The candidates' questions. Memory stays flat in their number: keys lie in a temporary file.

    Attributes:
        candidates: the pairs.
        known: (S,) int64, pairs by source that the store answered when they were first looked at.
    """

    def __init__(
        self,
        index: Index,
        split: Split,
        candidates: Candidates,
        render: Callable[[str, str], Messages],
        key_of: Callable[[Messages], bytes],
        folder: Path | None = None,
    ) -> None:
        """Make a feed; nothing is rendered yet.

        Args:
            index: for the items' texts.
            split: for the queries' texts.
            candidates: the pairs.
            render: (query, item) → the messages.
            key_of: messages → the question's identity.
            folder: where the keys may lie meanwhile; by default the system's place for such.
        """
        self.candidates = candidates
        self.known = np.zeros(len(candidates.sources), dtype=np.int64)
        self._index, self._split = index, split
        self._render, self._key_of = render, key_of
        # An unlinked file: it vanishes with the process, however that ends.
        with tempfile.TemporaryFile(dir=folder) as file:
            shape = (max(1, len(candidates)), KEY_SIZE)
            self._keys = np.memmap(file, dtype=np.uint8, mode="w+", shape=shape)
        self._order = asking_order(candidates.query_rows)
        self._looked_at = 0  # so many, in that order

    def __len__(self) -> int:
        return len(self.candidates)

    def chunks(self, first: int = 0) -> Iterator[list[Question]]:
        """The questions in the order in which they are asked, from one on."""
        for start in range(first, len(self), CHUNK):
            rows = self._order[start : start + CHUNK]
            items = self._index.catalog.texts_at(self.candidates.item_rows[rows])
            queries = [self._split.query_texts[row] for row in self.candidates.query_rows[rows]]
            messages = map(self._render, queries, items)
            with _no_garbage_collection():
                questions = [Question(self._key_of(m), m) for m in messages]
            yield questions

    def unanswered(
        self,
        store: Store,
        tally: Tally,
        advance: Callable[[int], None] = lambda _: None,
        ask_again: Reader | None = None,
    ) -> Iterator[Question | None]:
        """Each question once that has no stored answer, is not under way and has not failed.

        None stands between chunks, so that whoever asks can do other things while many are passed over.

        Args:
            store: the answers.
            tally: knows what is under way and what failed.
            advance: told of candidates that need no asking, the first time they are looked at.
            ask_again: how answers are read; those that cannot be are given too, but for answers of the
                tally's `retrying_since` or later: these have been asked again.
        """
        start = 0
        for chunk in self.chunks():
            keys = [question.key for question in chunk]
            stored, unread = store.known(keys), set()
            if ask_again is not None:
                answers = store.find(stored).items()
                old = {k: a for k, a in answers if a.time < tally.retrying_since}
                unread = {k for k, a in old.items() if ask_again(a.text)[0] == UNKNOWN}
                stored -= unread
            missing = {}
            if len(stored) < len(chunk):
                # What is under way now is stored or has failed later; it is not for this chunk to ask.
                passed = stored | tally.under_way | tally.failed.keys()
                missing = {q.key: q._replace(again=q.key in unread) for q in chunk if q.key not in passed}
            if start >= self._looked_at:
                self._look_at(start, keys, stored)
                advance(len(chunk) - len(missing))
            yield from missing.values()
            yield None
            start += len(chunk)

    def keys(self, store: Store, size: int) -> Iterator[list[bytes]]:
        """All questions' keys in candidate order, `size` at a time."""
        # Asking may have stopped early: what comes after may be known all the same.
        for chunk in self.chunks(self._looked_at):
            keys = [question.key for question in chunk]
            self._look_at(self._looked_at, keys, store.known(keys))
        for start in range(0, len(self), size):
            data = self._keys[start : min(start + size, len(self))].tobytes()
            yield [data[n : n + KEY_SIZE] for n in range(0, len(data), KEY_SIZE)]

    def _look_at(self, start: int, keys: list[bytes], stored: set[bytes]) -> None:
        end = start + len(keys)
        rows = self._order[start:end]
        self._keys[rows] = np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, KEY_SIZE)
        self._looked_at = end
        sources = self.candidates.source_numbers[rows]
        if len(stored) < len(keys):
            sources = sources[np.fromiter((key in stored for key in keys), dtype=bool, count=len(keys))]
        self.known += np.bincount(sources, minlength=len(self.known))
