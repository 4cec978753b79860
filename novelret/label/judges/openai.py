"""`openai:MODEL`: any OpenAI-compatible endpoint, asked concurrently, each answer stored as it comes."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import openai
from openai import AsyncOpenAI, DefaultAsyncHttpxClient, Timeout

from novelret.artifacts import fsync_file
from novelret.endpoint import (
    FATAL,
    PASSING,
    check_key,
    hide_secrets,
    may_be_answered,
    reason_of,
    refusal,
    shown_url,
)
from novelret.errors import UserError
from novelret.label.claims import Claims
from novelret.label.cost import Price
from novelret.label.judges.endpoint import is_cut, longest_answer, text_of, tokens_of
from novelret.label.judges.pace import Pace, retry_after
from novelret.label.ledger import Ledger
from novelret.label.questions import Messages, Question, Reader, Tally
from novelret.label.store import Answer, Store
from novelret.label.table import UNKNOWN

_ATTEMPTS = 8
_PAID_ATTEMPTS = 4  # of a question whose answers got lost, which may be paid for each time
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 60.0
_PATIENCE = 600.0  # seconds that a question is put off by an endpoint which only says "later"
_SYNC = 0.5  # seconds between two times that answers are brought onto the disk
_CONNECT = 10.0  # seconds until a host that does not answer counts as absent
_TIMED_OUT = 408  # a status for which the client has no error of its own
_ROOM = 0.02  # seconds until the caps are looked at again
_OTHERS = 0.2  # seconds until what other processes are asking is looked at again
_AT_ONCE = 32  # questions claimed in one go
_HOPELESS = 50  # questions in a row without an answer: something is wrong with all of them
_IN_VAIN = 5  # waves of refusals, each after the time that the one before named
_DEAD_AFTER = 20.0  # seconds of nothing but faults from an endpoint that never answered at all
_GONE_AFTER = 300.0  # from one that did: time to start a server anew
_TELL_AFTER = 10.0  # seconds of such faults that are told


@dataclass(frozen=True)
class Limits:
    """How hard to ask.

    Attributes:
        concurrency: requests under way at once.
        timeout: seconds for one request.
        price: of the model; needed for a cap on the cost.
        rpm: requests per minute; None to learn it from the endpoint.
        tpm: tokens per minute; None to learn it from the endpoint.
    """

    concurrency: int = 32
    timeout: float = 60.0
    price: Price | None = None
    rpm: float | None = None
    tpm: float | None = None


def ask_all(
    questions: Iterator[Question | None],
    model: str,
    parameters: dict[str, Any],
    count_tokens: Callable[[Messages], int],
    read: Reader,
    store: Store,
    limits: Limits,
    tally: Tally,
    advance: Callable[[int], None],
    say: Callable[[str], None],
) -> None:
    """Ask every question and store every answer at once; faults that pass are tried again.

    On Ctrl-C or SIGTERM, requests under way are finished and stored, then KeyboardInterrupt is raised.

    Args:
        questions: what to ask; read only as far as requests can be sent. None lets others have a turn.
        model: the endpoint's name of the model.
        parameters: sampling parameters, part of each question's identity.
        count_tokens: of a question.
        read: how answers are read; asking stops where none of the first can be.
        store: where answers go.
        limits: concurrency, timeout and caps.
        tally: counts, kept up to date.
        advance: told of each question that is done with.
        say: told of the first fault, where nothing has been answered before it.

    Raises:
        UserError: the key, the model or the endpoint is refused, or the endpoint answers nothing at all.
        KeyboardInterrupt: Ctrl-C or SIGTERM.
    """
    store.relax()
    with Claims(store) as claims:
        ledger = Ledger(store, f"openai:{model}")
        asking = _Asking(model, parameters, count_tokens, read, store, claims, ledger, limits, tally, say)
        _run(_ask_all(_ours(asking, questions, advance), asking, advance), tally)
    if asking.in_batches and tally.stopped is None:
        tally.stopped = (
            f"{asking.in_batches:,} questions lie in batches under way, to be collected by the command that "
            f"submitted them, with --judge openai-batch:{model}"
        )


def _run(work: Coroutine[Any, Any, None], tally: Tally) -> None:
    """Run it to its end; in a thread where this one has a loop that runs already, as a notebook's has."""
    if not _a_loop_runs():
        asyncio.run(work)
        return
    with ThreadPoolExecutor(1, "asking") as thread:
        asked = thread.submit(asyncio.run, work)
        try:
            asked.result()
        except KeyboardInterrupt:
            tally.halt.set()  # what is under way is stored before the thread ends
            raise


def _a_loop_runs() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


async def _ask_all(
    questions: Iterator[Question | None], asking: _Asking, advance: Callable[[int], None]
) -> None:
    loop = asyncio.get_running_loop()
    interrupted = False
    workers: list[asyncio.Task[None]] = []

    def interrupt() -> None:
        nonlocal interrupted
        if interrupted:
            for worker in workers:
                worker.cancel()
            return
        interrupted = asking.ending = True
        asking.say(f"finishing {len(asking.tally.under_way)} requests under way; Ctrl-C again leaves at once")

    signals = [signal.SIGINT, signal.SIGTERM]  # Ctrl-C, and how docker, slurm and `timeout` end a process
    try:
        for number in signals:
            loop.add_signal_handler(number, interrupt)
    except (NotImplementedError, RuntimeError, ValueError):  # not the main thread, or not Unix
        signals = []
    try:
        async with _client(asking) as client:
            workers += [
                asyncio.create_task(_work(asking, client, questions, advance))
                for _ in range(asking.limits.concurrency)
            ]
            # One fatal fault stops all; what the others have under way is still stored.
            syncing = asyncio.create_task(asking.sync(advance))
            done = await asyncio.gather(*workers, return_exceptions=True)
            syncing.cancel()
    finally:
        for number in signals:
            loop.remove_signal_handler(number)
    for result in done:
        if isinstance(result, BaseException) and not isinstance(result, asyncio.CancelledError):
            raise result
    if interrupted:
        raise KeyboardInterrupt


def _client(asking: _Asking) -> AsyncOpenAI:
    """The client; it tells the pace every response's headers."""

    async def learn(response: Any) -> None:
        asking.pace.learn(response.headers)

    longest = asking.limits.timeout
    timeout = Timeout(longest, connect=min(longest, _CONNECT))
    http = DefaultAsyncHttpxClient(timeout=timeout, event_hooks={"response": [learn]})
    return AsyncOpenAI(api_key=check_key(), max_retries=0, timeout=timeout, http_client=http)


@dataclass(frozen=True)
class _Fault:
    """Why a request is worth repeating.

    Attributes:
        reason: in words.
        silence: seconds that the endpoint asks for.
        later: whether it comes of an endpoint that works, and only says "later".
        paid: whether there may have been an answer, which is on the bill.
    """

    reason: str
    silence: float | None = None
    later: bool = False
    paid: bool = False


@dataclass
class _Asking:
    """State that the workers share; one thread, so plain fields do."""

    model: str
    parameters: dict[str, Any]
    count_tokens: Callable[[Messages], int]
    read: Reader
    store: Store
    claims: Claims
    ledger: Ledger
    limits: Limits
    tally: Tally
    say: Callable[[str], None]
    waits: bool = False  # whether all that is left is what other processes are asking
    in_batches: int = 0  # questions that were left out, as a batch under way holds them
    pace: Pace = field(init=False)
    ending: bool = False  # at Ctrl-C, or since nothing works any more
    sent: int = 0  # requests under way, those that wait for their turn included
    reserved: float = 0.0  # dollars that these may cost at most
    failed_in_a_row: int = 0
    answered: list[bytes] = field(default_factory=list)  # keys that are claimed still
    heard: bool = False  # whether the endpoint has answered anything, if only that a question is no good
    quiet_since: float | None = None  # loop time of the first fault after that
    told: bool = False  # whether one of them has been told
    faults: int = 0  # in a row, "later" aside
    faults_since: float = 0.0  # loop time of the first of these

    def __post_init__(self) -> None:
        self.pace = Pace(self.limits.rpm, self.limits.tpm, self.limits.concurrency)

    @property
    def is_known(self) -> bool:
        """Whether the endpoint has let this key ask before."""
        asked_before = self.tally.requests + self.tally.earlier_requests > 0
        return self.heard or asked_before or bool(self.tally.readings.recent)

    @property
    def stopping(self) -> bool:
        """Whether nothing more is to be sent."""
        return self.ending or self.tally.halt.is_set()

    async def reserve(self, worst: float) -> bool:
        """Count a request as under way, once the caps hold even if all that is costs the most it can.

        Returns:
            False where nothing is to be sent any more: with nothing under way, this one could exceed a cap.
        """
        while not self.stopping and self.tally.stopped is None:
            if self.sent >= self.pace.width:
                await asyncio.sleep(_ROOM)
                continue
            reached = self.tally.reached(self.sent + 1, self.reserved + worst)
            if reached is None:
                self.sent, self.reserved = self.sent + 1, self.reserved + worst
                return True
            if self.sent == 0:
                self.tally.stopped = reached
            else:  # most cost less than they could: there may be room when they are back
                await asyncio.sleep(_ROOM)
        return False

    def release(self, worst: float) -> None:
        """A request is back."""
        self.sent -= 1
        self.reserved = self.reserved - worst if self.sent else 0.0  # no remainders of rounding

    def receive(self, question: Question, text: str | None, usage: Any, *, cut: bool = False) -> None:
        """Count a reply and store its answer, if it holds one; what cannot be stored stops the asking."""
        self.hear()
        prompt, completion = tokens_of(usage)
        self.bill(question, prompt, completion)  # also where the answer can be stored nowhere
        if text is not None:
            self.store.add(f"openai:{self.model}", [(question.key, text, prompt, completion)])
            self.answered.append(question.key)
            self.failed_in_a_row = 0
            self.tally.readings.look_at(text, self.read(text)[0] != UNKNOWN, cut=cut)

    def bill(self, question: Question, prompt: int | None = None, completion: int | None = None) -> None:
        """Count a reply, or one that may have been; it costs the most it can where no tokens are told."""
        price = self.limits.price
        counted = self.count_tokens(question.messages) if price and prompt is None else 0
        self.tally.bill(prompt, completion, price, counted, longest_answer(self.parameters))

    def hear(self) -> None:
        """The endpoint has answered something."""
        self.heard, self.quiet_since, self.told, self.faults = True, None, False, 0
        self.pace.widen()

    def doubt(self, fault: _Fault, url: str, now: float) -> None:
        """Take note of a fault; where nothing else comes for long, there may be no such endpoint any more.

        Raises:
            UserError: there has never been an answer.
        """
        if self.quiet_since is None:
            self.quiet_since = now
        quiet = now - self.quiet_since
        if not self.told and (not self.heard or (not fault.later and quiet >= _TELL_AFTER)):
            since = f"for {quiet:.0f} s" if self.heard else "yet"
            self.say(f"no answer {since}: {fault.reason}; trying again")
            self.told = True
        self.faults = 0 if fault.later else self.faults + 1
        if self.faults == 1:
            self.faults_since = now
        is_gone = now - self.faults_since >= (_GONE_AFTER if self.heard else _DEAD_AFTER)
        is_gone &= self.faults >= 2 * self.limits.concurrency  # every worker has tried again
        if not is_gone and quiet < _PATIENCE:
            return
        said = f"for {quiet:.0f} s (the last fault: {fault.reason})"
        if not self.heard:
            raise UserError(
                f"openai:{self.model}: {shown_url(url)} has answered nothing at all {said}; check "
                "OPENAI_BASE_URL and run the same command again"
            )
        self.tally.stopped = f"{shown_url(url)} has answered nothing {said}"
        self.ending = True  # what waits to be repeated is not

    async def sync(self, advance: Callable[[int], None]) -> None:
        """Bring what is stored onto the disk now and then, in a thread: no request waits for it."""
        while True:
            await asyncio.sleep(_SYNC)
            advance(0)  # a log gets its lines during silences, too
            if self.store.log.exists():
                await asyncio.to_thread(fsync_file, self.store.log)

    def fail(self, question: Question, reason: str) -> None:
        """List a question as failed; where nothing works any more, stop."""
        self.tally.failed[question.key] = reason
        self.claims.give_up([question.key])
        self.failed_in_a_row += 1
        if self.failed_in_a_row >= _HOPELESS:
            self.tally.stopped = f"{_HOPELESS} questions in a row got no answer"
            self.ending = True  # what waits to be repeated is not


def _ours(
    asking: _Asking, questions: Iterator[Question | None], advance: Callable[[int], None]
) -> Iterator[Question | None]:
    """The questions that no other process asks, and at last those that it leaves; None to wait a little."""
    batch: list[Question] = []
    elsewhere: dict[bytes, Question] = {}
    before: dict[bytes, Answer | None] = {}

    def claimed() -> Iterator[Question]:
        # Equal questions may have come one by one, while another process held them.
        passed = (asking.tally.under_way, asking.tally.failed, elsewhere)
        distinct = {q.key: q for q in batch if not any(q.key in keys for keys in passed)}
        advance(len(batch) - len(distinct))
        batch[:] = distinct.values()
        keys = [question.key for question in batch]
        asking.claims.give_up(asking.answered)  # another process may ask these again
        asking.answered.clear()
        free = asking.claims.take(keys)
        answers = asking.store.find(keys)
        # One that is asked again has an answer, and is answered when it gets another.
        is_old = {question.key for question in batch if question.again}
        is_old = {key for key in is_old if before.setdefault(key, answers.get(key)) == answers.get(key)}
        left = [question for question in batch if question.key in is_old or question.key not in answers]
        # A batch may take a day: what lies in one is paid for, and is left to whoever collects it.
        lying = asking.ledger.under_way([question.key for question in left])
        asking.claims.give_up(lying & free)
        asking.in_batches += len(lying)
        left = [question for question in left if question.key not in lying]
        advance(len(batch) - len(left))  # answered since they were looked up, or left out
        batch.clear()
        elsewhere.update((question.key, question) for question in left if question.key not in free)
        yield from (question for question in left if question.key in free)

    for question in questions:
        if question is not None:
            batch.append(question)
        if question is None or len(batch) == _AT_ONCE:
            yield from claimed()
        if question is None:
            yield None
    yield from claimed()
    if elsewhere:
        asking.waits = True
        asking.say(f"waiting for {len(elsewhere)} questions that another process is asking")
    while elsewhere:
        yield None
        batch = [elsewhere.pop(key) for key in list(islice(elsewhere, _AT_ONCE))]
        yield from claimed()


async def _work(
    asking: _Asking,
    client: AsyncOpenAI,
    questions: Iterator[Question | None],
    advance: Callable[[int], None],
) -> None:
    price, longest = asking.limits.price, longest_answer(asking.parameters)
    under_way = asking.tally.under_way
    while not asking.stopping and asking.tally.stopped is None:
        try:
            question = next(questions)
        except StopIteration:
            return
        if question is None:
            await asyncio.sleep(_OTHERS if asking.waits else 0)
            continue
        if asking.tally.readings.hopeless:
            asking.tally.stopped = asking.tally.readings.hopeless
            return
        counting = price is not None or asking.pace.tpm is not None
        tokens = asking.count_tokens(question.messages) if counting else 0
        worst = price.of(tokens, longest) if price else 0.0
        under_way.add(question.key)
        try:
            await _ask(asking, client, question, tokens + longest, worst)
        except BaseException:
            asking.ending = True
            raise
        finally:
            under_way.discard(question.key)
        advance(1)


async def _ask(asking: _Asking, client: AsyncOpenAI, question: Question, tokens: int, worst: float) -> None:
    """One question until it has an answer, cannot have one, has failed too often, or the caps say no."""
    clock = asyncio.get_running_loop().time
    attempt, put_off = 0, 0.0
    while await asking.reserve(worst):
        try:
            await _sleep_until(asking, asking.pace.slot(clock(), tokens))
            await _sleep_until(asking, asking.pace.silent_until)
            if asking.stopping:
                return  # it stays unanswered and is asked next time
            asking.tally.in_flight += 1
            asking.tally.in_flight_cost += worst
            asking.tally.save()  # before it is spent: a kill does not hide it
            sent = clock()
            try:
                fault = await _send(asking, client, question)
            finally:
                asking.tally.in_flight -= 1
                asking.tally.in_flight_cost -= worst
        finally:
            asking.release(worst)
        if fault is None:
            return
        asking.doubt(fault, str(client.base_url), clock())
        if (fault.silence or 0) > _PATIENCE:
            asking.tally.stopped = f"the endpoint asks to wait {(fault.silence or 0) / 60:.0f} minutes"
            return
        asking.tally.retries += 1
        asking.tally.fault = fault.reason
        attempt += 1
        # "Later" is no fault of the question's: it is repeated until patience ends.
        most = _PAID_ATTEMPTS if fault.paid else _ATTEMPTS
        if (not fault.later and attempt >= most) or put_off > _PATIENCE:
            asking.fail(question, f"{attempt} attempts, last {fault.reason}")
            return
        if not fault.later:
            await _sleep_until(asking, clock() + (fault.silence or _pause(attempt)))
            continue
        asking.pace.narrow(sent, clock(), names_a_time=fault.silence is not None)
        # The next slot is after it, for everybody. Turns that are waited for do not count as put off.
        refusals = max(1, asking.pace.refusals)
        pause = fault.silence or _pause(refusals)
        if refusals > _IN_VAIN:  # the time that it names is too short
            pause = max(pause, _pause(refusals - _IN_VAIN))
        put_off += pause
        asking.pace.refuse(clock(), pause)


def _pause(times: int) -> float:
    """Seconds to wait after so many faults in a row."""
    longest = min(_LONGEST_WAIT, _FIRST_WAIT * 2 ** min(times - 1, 20))
    return random.uniform(longest / 2, longest)


async def _send(asking: _Asking, client: AsyncOpenAI, question: Question) -> _Fault | None:
    """One request; None when the question is done with."""
    messages: Any = question.messages  # plain dictionaries, where the client's types want its own
    try:
        # The client's own timeout, which may be a little earlier, begins anew with every byte.
        async with asyncio.timeout(asking.limits.timeout + 1):
            response = await client.chat.completions.create(
                model=asking.model, messages=messages, **asking.parameters
            )
    except TimeoutError:
        asking.bill(question)
        return _Fault(f"no answer within --timeout {asking.limits.timeout:g}", paid=True)
    except asyncio.CancelledError:  # Ctrl-C for the second time: it is sent, and may be answered
        asking.bill(question)
        raise
    except FATAL as error:
        if isinstance(error, openai.PermissionDeniedError) and asking.is_known:  # of this text alone
            asking.fail(question, hide_secrets(str(error)))
            return None
        raise UserError(f"openai:{asking.model}: {refusal(error)}") from None
    except PASSING as error:
        return _passing_fault(asking, question, error)
    except openai.APIStatusError as error:
        if error.status_code == _TIMED_OUT:
            return _Fault(reason_of(error))
        asking.hear()
        asking.fail(question, hide_secrets(str(error)))
        return None
    except ValueError as error:  # a body that is not JSON
        asking.bill(question)  # a reply all the same
        return _Fault(f"malformed answer: {hide_secrets(str(error))}", paid=True)
    usage = getattr(response, "usage", None)
    try:
        text = text_of(response)
    except ValueError as error:
        if usage is not None:  # paid for all the same
            asking.receive(question, None, usage)
        else:
            asking.tally.bill(None, None, None)
        return _Fault(f"malformed answer: {hide_secrets(str(error))}", paid=usage is not None)
    asking.receive(question, text, usage, cut=is_cut(response))
    return None


def _passing_fault(asking: _Asking, question: Question, error: openai.OpenAIError) -> _Fault:
    if getattr(error, "code", None) == "insufficient_quota":
        raise UserError(f"openai:{asking.model}: {refusal(error)}") from None
    silence = retry_after(getattr(getattr(error, "response", None), "headers", {}))
    paid = may_be_answered(error)
    later = not paid and (silence is not None or isinstance(error, openai.RateLimitError))
    if paid:
        asking.bill(question)
    return _Fault(reason_of(error), silence, later, paid)


async def _sleep_until(asking: _Asking, time: float) -> None:
    """Sleep until a loop time, or until asking is to stop."""
    clock = asyncio.get_running_loop().time
    while not asking.stopping and (wait := time - clock()) > 0:
        await asyncio.sleep(min(wait, 0.5))
