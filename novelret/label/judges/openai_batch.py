"""`openai-batch:MODEL`: the Batch API at half the price. Submit, leave, come back, collect.

What is about to be sent is noted before it is sent, under an id that also stands in the batch's metadata.
After a kill, or an answer that got lost, the endpoint's list of batches says whether it arrived.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import IO, Any

import openai
from openai import OpenAI
from openai.types import Batch, FileObject

from novelret.endpoint import PASSING, check_key, hide_secrets, reason_of, refusal, shown_url
from novelret.errors import BatchesUnderWay, UserError
from novelret.label.claims import Claims
from novelret.label.judges.batch_output import OddReply, Reply, all_batches, check_reply, replies_in
from novelret.label.judges.endpoint import longest_answer
from novelret.label.judges.openai import Limits
from novelret.label.ledger import Ledger, Spending, Submission
from novelret.label.questions import Messages, Question, Reader, Tally
from novelret.label.store import Store
from novelret.label.table import UNKNOWN
from novelret.search import nothing

MAX_REQUESTS, MAX_BYTES = 50_000, 200_000_000
"""What one file of the Batch API may hold."""
_POLL = 30.0  # seconds between two looks at the batches
_LOST = 20  # looks in a row that find no endpoint, before giving up for now
_RETRIES = 4  # of requests that cost nothing
_ATTEMPTS = 5  # to have a batch made
_PAUSE = 2.0  # seconds, doubled each time
_AT_ONCE = 1_000  # answers stored in one commit
_CLAIMED = 500  # questions claimed in one go
_DONE = ("completed", "expired", "cancelled", "failed")
_FOR_ITS_RUN = ("failed", "cancelling", "cancelled")  # the run that submitted it should know
_CROWDED = "token_limit_exceeded"  # too much lies in batches, with this one; less may fit, or later


@dataclass
class _Run:
    """One run's view of its batches."""

    client: OpenAI
    model: str
    parameters: dict[str, Any]
    count_tokens: Callable[[Messages], int]
    read: Reader
    store: Store
    ledger: Ledger
    claims: Claims
    limits: Limits
    tally: Tally
    advance: Callable[[int], None]
    say: Callable[[str], None]
    waiting_for: set[str] = field(default_factory=set)  # submissions that hold questions of this run
    left: set[str] = field(default_factory=set)  # submissions of others in which something went wrong
    missing: bool = True  # whether questions may be neither answered nor under way
    crowding: set[str] = field(default_factory=set)  # of these submissions one has to go before more fit
    room: float = math.inf  # requests that may lie in batches at once, where more were refused
    held_back: bool = False  # whether no more may be sent until it is known what came of what is under way
    cancelled: str = ""  # that the user cancelled a batch, and so wants nothing more sent

    @property
    def endpoint(self) -> str:
        """Its URL, as it may be told."""
        return shown_url(str(self.client.base_url))


def ask_in_batches(
    unanswered: Callable[[], Iterator[Question | None]],
    model: str,
    parameters: dict[str, Any],
    count_tokens: Callable[[Messages], int],
    read: Reader,
    store: Store,
    limits: Limits,
    tally: Tally,
    advance: Callable[[int], None],
    say: Callable[[str], None],
    *,
    wait: bool,
) -> None:
    """Collect what earlier runs submitted, submit what is missing, and wait for it.

    Args:
        unanswered: gives the questions without an answer, again each time.
        model: the endpoint's name of the model.
        parameters: sampling parameters, part of each question's identity.
        count_tokens: of a question.
        read: how answers are read; one that cannot be is not asked again in the same run.
        store: where answers go, and where the batches are remembered.
        limits: caps and timeout; what is under way counts with what it may cost at most.
        tally: counts, kept up to date.
        advance: told of each question that is done with.
        say: told what goes on.
        wait: stay until all batches are done; otherwise leave once everything is submitted.

    Raises:
        UserError: the key, the model or the endpoint is refused, or cannot be reached any more.
        BatchesUnderWay: not waiting, and something is.
    """
    with (
        OpenAI(api_key=check_key(), max_retries=_RETRIES, timeout=limits.timeout) as client,
        Claims(store) as claims,
    ):
        ledger = Ledger(store, f"openai:{model}")
        run = _Run(
            client, model, parameters, count_tokens, read, store, ledger, claims, limits, tally, advance, say
        )
        lost = 0
        while True:
            try:
                with ledger.lock() as is_ours:
                    if is_ours:
                        _collect(run)
                    elif not wait:
                        raise UserError(
                            f"{store.path}: another novelret submits batches with this store; run again when "
                            "it is done"
                        )
                    if is_ours and run.missing and not run.crowding:
                        sent = _submit(run, unanswered)
                        if sent:
                            say(f"submitted {sent:,} requests")
                lost = 0
            except (*PASSING, OddReply) as error:
                lost += 1
                if lost >= _LOST or not wait:
                    raise UserError(
                        f"openai-batch:{model}: {run.endpoint}: {reason_of(error)}; what "
                        "was submitted is kept, so run again later"
                    ) from None
                if lost == 1:
                    say(f"no answer: {reason_of(error)}; trying again")
            except openai.APIStatusError as error:
                raise UserError(f"openai-batch:{model}: {refusal(error)}") from None
            under_way = [s for s in ledger.open() if s.id in run.waiting_for]
            if not (under_way or run.missing or lost):
                break
            count = sum(s.requests for s in under_way)
            tally.note = f"{count:,} requests in {len(under_way)} batches"
            if not wait and not run.left & run.waiting_for:  # those concern this run from the next look on
                raise _left_under_way(model, len(under_way), count)
            advance(0)  # a log gets its lines all the same
            time.sleep(_POLL)
        ledger.forget(tally.failed)


def _left_under_way(model: str, batches: int, requests: int) -> Exception:
    """Why a run that does not wait ends before all is answered."""
    if batches:
        return BatchesUnderWay(batches, requests)
    return UserError(
        f"openai-batch:{model}: what is missing is being asked by another process, or does not fit beside "
        "what lies in batches already; run the same command again later"
    )


def _collect(run: _Run) -> None:
    """Settle every submission whose batch is done.

    What goes wrong with another run's is for that run to hear of, unless it holds questions of this one's.
    """
    submissions = run.ledger.open()
    # What another process settled meanwhile may have left questions of this run's open.
    gone = run.waiting_for - {s.id for s in submissions}
    run.waiting_for -= gone
    run.missing = run.missing or bool(gone)
    if not run.crowding <= {s.id for s in submissions}:
        run.crowding.clear()
    settled, refused, left = False, [], set()
    _take_note(run)  # of what others settled
    for submission in submissions:
        is_ours = submission.run == run.tally.run
        concerns_us = is_ours or submission.id in run.waiting_for
        try:
            batch = _batch_of(run, submission)
            if batch is not None and batch.status in _FOR_ITS_RUN and not concerns_us:
                left.add(submission.id)
            elif batch is None or batch.status == "failed":
                # It never arrived, or did nothing: its questions are sent anew.
                run.ledger.drop(submission.id)
                run.missing = True
                if batch is not None and is_ours:
                    refused.append((submission.requests, _why_crowded(run, batch)))
            else:
                settled = _settle_if_done(run, submission, batch) or settled
        except (UserError, OddReply) as error:
            if concerns_us:
                raise
            left.add(submission.id)
            if isinstance(error, OddReply) and submission.id not in run.left:
                run.say(f"a batch of another run is left to that run: {reason_of(error)}")
    run.left = left
    if refused and not settled:
        run.crowding = {s.id for s in run.ledger.open()} - left
        if not run.crowding:  # so many do not fit at all
            requests, reason = max(refused)
            if requests == 1:
                raise UserError(f"openai-batch:{run.model}: {reason}")
            run.room = requests // 2


def _take_note(run: _Run) -> None:
    """Count what this run's batches have cost."""
    spent = run.ledger.spent(run.tally.run)
    if spent is not None:
        price = run.limits.price
        run.tally.requests += spent.requests
        run.tally.prompt_tokens += spent.prompt_tokens
        run.tally.completion_tokens += spent.completion_tokens
        run.tally.cost += (
            price.of(spent.prompt_tokens, spent.completion_tokens) if price else 0.0
        ) + spent.cost
        run.tally.save()  # a kill between the two has it counted twice, which keeps the caps
        run.ledger.forget_spent(run.tally.run)


def _batch_of(run: _Run, submission: Submission) -> Batch | None:
    """A submission's batch as it stands now; None where the endpoint never got it.

    Raises:
        UserError: it was sent to another endpoint, or with another account's key.
    """
    here = run.endpoint
    elsewhere = submission.endpoint not in (None, here)
    where = f" to {submission.endpoint}" if elsewhere else ""
    if submission.batch is not None:
        try:
            return check_reply(run.client.batches.retrieve(submission.batch), Batch)
        except openai.NotFoundError:
            raise UserError(
                f"openai-batch:{run.model}: {here} does not know {submission.batch}, submitted "
                f"before{where} with {submission.requests:,} questions; use its endpoint and key, or another "
                "--store to go on without it and what else is stored"
            ) from None
    try:
        batch = _find(run, submission.id)
    except openai.NotFoundError:  # an endpoint without a Batch API has made none
        batch = None
    if batch is not None:
        run.ledger.record(submission.id, batch.id)
    elif elsewhere:
        raise UserError(
            f"openai-batch:{run.model}: {submission.requests:,} questions were being submitted{where} when "
            f"that was interrupted, and {here} has not got them; use that endpoint, or another --store to go "
            "on without them and what else is stored"
        )
    return batch


def _why_crowded(run: _Run, batch: Batch) -> str:
    """What is said of a batch that was refused as a whole because too much lies in batches already.

    Raises:
        UserError: it was refused for another reason.
    """
    errors = (batch.errors and batch.errors.data) or []
    reason = "; ".join(error.message or str(error.code) for error in errors) or "no reason given"
    reason = f"batch {batch.id} was refused: {hide_secrets(reason)}"
    if not any(error.code == _CROWDED for error in errors):
        raise UserError(f"openai-batch:{run.model}: {reason}")
    return reason


def _find(run: _Run, submission: str) -> Batch | None:
    """The batch that carries a submission's id, if the endpoint has one."""
    for batch in all_batches(run.client):
        if (batch.metadata or {}).get("novelret") == submission:
            return batch
    return None


def _settle_if_done(run: _Run, submission: Submission, batch: Batch) -> bool:
    """Settle a submission if its batch is done, and act on that: the look at the next one may fail."""
    if batch.status in ("cancelling", "cancelled") and not run.cancelled:
        run.cancelled = f"batch {batch.id} was cancelled at the endpoint"
        run.say(f"{run.cancelled}: nothing more is submitted in this run")
    if batch.status not in _DONE:
        return False
    _settle(run, submission, batch)
    _take_note(run)
    run.crowding.clear()
    run.missing = run.missing or run.held_back
    return True


def _settle(run: _Run, submission: Submission, batch: Batch) -> None:
    """Store what a finished batch brought, and what it cost for the run that submitted it."""
    keys = run.ledger.keys_in(submission.id)
    # What another run asked with another prompt says nothing about how this one's answers can be read.
    concerns_us = submission.run in (run.tally.run, None) or submission.id in run.waiting_for
    advance = run.advance if concerns_us else nothing
    replies = prompts = completions = untold = 0
    is_whole = True
    seen: set[bytes] = set()
    answered: set[bytes] = set()
    failed: dict[bytes, str] = {}
    arrived: list[tuple[bytes, str, int | None, int | None]] = []
    for reply in _replies(run, batch):
        if reply is None:
            is_whole = False
            continue
        key, text, usage, reason, delivered, cut = reply
        if key and (key not in keys or key in seen):
            continue
        seen.add(key)
        prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
        if delivered:  # paid for, even if there is nothing to read
            replies += 1
            if isinstance(prompt, int) and isinstance(completion, int):
                prompts, completions = prompts + prompt, completions + completion
            else:
                untold += 1
        if text is not None:
            arrived.append((key, text, prompt, completion))
            answered.add(key)
            if concerns_us:
                run.tally.readings.look_at(text, run.read(text)[0] != UNKNOWN, cut=cut)
        elif reason is not None:
            failed[key] = hide_secrets(reason)
        if len(arrived) >= _AT_ONCE:
            _keep(run, arrived, advance)
            arrived = []
    _keep(run, arrived, advance)
    if not is_whole:  # asked again only when the user says so: they are paid for
        lost = keys - answered - failed.keys()
        failed |= dict.fromkeys(lost, f"the endpoint no longer holds the answers of batch {batch.id}")
        replies, untold = replies + len(lost), untold + len(lost)
    # Replies that tell no tokens cost the most they can, the prompt too.
    spending = Spending(replies, prompts, completions, untold * submission.cost / submission.requests)
    run.ledger.settle(submission.id, answered, failed, submission.run or run.tally.run, spending)
    if concerns_us:
        run.tally.retries += len(keys) - len(answered) - len(failed)
    run.waiting_for.discard(submission.id)
    run.missing = run.missing or len(answered) < len(keys)


def _replies(run: _Run, batch: Batch) -> Iterator[Reply | None]:
    """What a batch brought, some of it perhaps twice, and None for a file that is gone."""
    told = batch.request_counts.completed if batch.request_counts else 0
    try:
        count = 0
        for reply in replies_in(run.client, batch.output_file_id):
            yield reply
            count += 1
        if count < told:
            # It may have broken off at the end of a line, and what is missing is paid for. Once more only: an
            # endpoint that counts otherwise must not hold its answers back for ever.
            yield from replies_in(run.client, batch.output_file_id)
    except openai.NotFoundError:
        yield None
    try:
        yield from replies_in(run.client, batch.error_file_id)
    except openai.NotFoundError:
        yield None


def _keep(
    run: _Run, arrived: list[tuple[bytes, str, int | None, int | None]], advance: Callable[[int], None]
) -> None:
    run.store.add(f"openai:{run.model}", arrived)
    advance(len(arrived))


def _submit(run: _Run, unanswered: Callable[[], Iterator[Question | None]]) -> int:
    """Put what is neither answered nor under way into batches; how many questions that were."""
    try:
        return _fill_files(run, unanswered)
    except BaseException:
        run.missing = True  # what comes after the file that could not be sent
        raise


def _fill_files(run: _Run, unanswered: Callable[[], Iterator[Question | None]]) -> int:
    price, longest = run.limits.price, longest_answer(run.parameters)
    tally = run.tally
    ours = [s for s in run.ledger.open() if s.run in (tally.run, None)]
    requests, cost = sum(s.requests for s in ours), sum(s.cost for s in ours)
    sent = 0
    run.missing = run.held_back = False
    tally.under_way.clear()
    file = _File(run)
    for some in _in_hundreds(unanswered()):
        if run.held_back:
            # Nothing more is sent; what comes after may be under way, or have failed.
            if not run.ledger.holds_others(run.waiting_for | {s.id for s in ours}):
                break
            _look_up(run, some)
            continue
        held_back = []
        for question in _to_submit(run, some):
            worst = price.of(run.count_tokens(question.messages), longest) if price else 0.0
            reached = (
                tally.stopped
                or run.cancelled
                or tally.readings.hopeless
                or tally.reached(requests + 1, cost + worst)
            )
            if reached and not requests:
                tally.stopped = reached
            if reached or run.held_back or requests >= run.room:
                run.held_back = True
                held_back.append(question.key)
                continue
            file.add(question, worst)
            requests, cost, sent = requests + 1, cost + worst, sent + 1
        run.claims.give_up(held_back)
    file.send()
    if run.held_back:
        run.waiting_for |= {s.id for s in ours}
    return sent


def _in_hundreds(questions: Iterator[Question | None]) -> Iterator[list[Question]]:
    """The questions, as many at a time as are claimed at once."""
    real = (question for question in questions if question is not None)
    while some := list(islice(real, _CLAIMED)):
        yield some


def _to_submit(run: _Run, questions: list[Question]) -> list[Question]:
    """Those of some questions that are neither under way nor failed nor asked by another process; claimed."""
    left = _look_up(run, questions)
    free = run.claims.take([question.key for question in left])
    # Only now: whoever held a claim until a moment ago has stored the answer.
    known = run.store.known(free)
    mine = [
        question
        for question in left
        if question.key in free and (question.again or question.key not in known)
    ]
    run.missing = run.missing or len(free) < len(left)  # asked elsewhere: looked at again
    run.claims.give_up(free - {question.key for question in mine})
    return mine


def _look_up(run: _Run, questions: list[Question]) -> list[Question]:
    """Those of some questions that are neither under way nor failed, each once; the others are noted."""
    distinct = {q.key: q for q in questions if q.key not in run.tally.under_way}
    states = run.ledger.states(distinct)
    for key, (submission, failure) in states.items():
        if submission is not None:
            run.waiting_for.add(submission)
        elif failure is not None:
            run.tally.failed[key] = failure
    return [question for key, question in distinct.items() if states.get(key, (None, None)) == (None, None)]


class _File:
    """Requests on their way into a batch; a full file is sent and another one begun."""

    def __init__(self, run: _Run) -> None:
        self.run = run
        self.keys: list[bytes] = []
        self.cost, self.size = 0.0, 0
        self.lines = _temporary_file()

    def add(self, question: Question, cost: float) -> None:
        body = {"model": self.run.model, "messages": question.messages, **self.run.parameters}
        request = {
            "custom_id": question.key.hex(),
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": body,
        }
        line = json.dumps(request).encode() + b"\n"
        if len(self.keys) >= MAX_REQUESTS or self.size + len(line) > MAX_BYTES:
            self.send()
        self.lines.write(line)
        self.keys.append(question.key)
        self.run.tally.under_way.add(question.key)  # an equal question goes into no file twice
        self.cost, self.size = self.cost + cost, self.size + len(line)

    def send(self) -> None:
        run = self.run
        if self.keys:
            submission = Submission(
                uuid.uuid4().hex, None, len(self.keys), self.cost, run.tally.run, run.endpoint
            )
            run.ledger.begin(submission, self.keys)
            run.claims.give_up(self.keys)  # from here on the ledger says where they are
            run.waiting_for.add(submission.id)
            try:
                batch = self._make_batch(submission.id)
            except openai.APIStatusError as error:
                # Refused for good: nothing of it is under way. Other faults leave that open.
                if isinstance(error, PASSING):
                    raise
                run.ledger.drop(submission.id)
                if isinstance(error, openai.NotFoundError):
                    raise UserError(
                        f"openai-batch:{run.model}: {refusal(error)}; an endpoint without a Batch API is "
                        f"asked with --judge openai:{run.model}"
                    ) from None
                raise
            run.ledger.record(submission.id, batch.id)
        run.tally.under_way.clear()  # the ledger knows them
        self.lines.close()
        self.keys, self.cost, self.size = [], 0.0, 0
        self.lines = _temporary_file()

    def _make_batch(self, submission: str) -> Batch:
        self.lines.seek(0)
        client = self.run.client
        file = client.files.create(file=(f"novelret-{submission}.jsonl", self.lines), purpose="batch")
        check_reply(file, FileObject)
        for attempt in range(_ATTEMPTS):
            try:
                # Not repeated blindly: the first request may have arrived, and a second batch costs twice.
                return check_reply(
                    client.with_options(max_retries=0).batches.create(
                        input_file_id=file.id,
                        endpoint="/v1/chat/completions",
                        completion_window="24h",
                        metadata={"novelret": submission},
                    ),
                    Batch,
                )
            except (*PASSING, OddReply):
                time.sleep(_PAUSE * 2**attempt)
                batch = _find(self.run, submission)
                if batch is not None:
                    return batch
                if attempt == _ATTEMPTS - 1:
                    raise
        raise AssertionError("unreachable")


def _temporary_file() -> IO[bytes]:
    return tempfile.TemporaryFile()
