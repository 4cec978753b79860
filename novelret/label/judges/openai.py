"""`openai:MODEL`: any OpenAI-compatible endpoint, asked concurrently, each answer stored as it comes."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import openai
from openai import AsyncOpenAI

from novelret.errors import UserError
from novelret.label.cost import Price, estimate_tokens
from novelret.label.store import Store

_ATTEMPTS = 8
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 60.0
_FATAL = (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError)
_PASSING = (
    openai.RateLimitError,
    openai.InternalServerError,
    openai.APIConnectionError,
    openai.APITimeoutError,
    openai.APIResponseValidationError,
    openai.ConflictError,
)


@dataclass(frozen=True)
class Question:
    """One thing to ask.

    Attributes:
        key: its identity in the store.
        messages: the rendered prompt.
    """

    key: bytes
    messages: list[dict[str, str]]


@dataclass
class Tally:
    """What asking has come to so far.

    Attributes:
        requests: answers delivered.
        prompt_tokens: billed, by the API's own figures.
        completion_tokens: likewise.
        cost: dollars, 0 where the price is not known.
        retries: requests repeated after a passing fault.
        failed: key of a question → why it got no answer.
        stopped: why asking stopped early, if it did.
    """

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    retries: int = 0
    failed: dict[bytes, str] = field(default_factory=dict)
    stopped: str | None = None


@dataclass(frozen=True)
class Limits:
    """How hard and how far to ask.

    Attributes:
        concurrency: requests under way at once.
        timeout: seconds for one request.
        max_requests: stop before more requests than this.
        max_cost: stop before this many dollars could be exceeded.
        price: of the model; needed for max_cost.
    """

    concurrency: int = 32
    timeout: float = 60.0
    max_requests: int | None = None
    max_cost: float | None = None
    price: Price | None = None


def parameters_for(model: str, max_tokens: int) -> dict[str, Any]:
    """Sampling parameters: greedy and short; reasoning models take neither a temperature nor max_tokens."""
    if model.startswith(("o1", "o3", "o4", "gpt-5")):
        return {"max_completion_tokens": max_tokens + 2_000}
    return {"temperature": 0, "max_tokens": max_tokens}


def check_key() -> str:
    """The API key from OPENAI_API_KEY.

    Raises:
        UserError: it is not set.
    """
    key = os.environ.get("OPENAI_API_KEY", "")
    if not key:
        raise UserError(
            "OPENAI_API_KEY is not set; export it (any word will do for a local endpoint in OPENAI_BASE_URL)"
        )
    return key


def ask_all(
    questions: Iterator[Question],
    model: str,
    parameters: dict[str, Any],
    store: Store,
    limits: Limits,
    tally: Tally,
    advance: Callable[[int], None],
) -> None:
    """Ask every question and store every answer at once; faults that pass are tried again.

    On Ctrl-C, requests under way are finished and stored, then KeyboardInterrupt is raised.

    Args:
        questions: what to ask; read only as far as requests can be sent.
        model: the endpoint's name of the model.
        parameters: sampling parameters, part of each question's identity.
        store: where answers go.
        limits: concurrency, timeout and caps.
        tally: counts, kept up to date.
        advance: told of each question that is done with.

    Raises:
        UserError: the key, the model or the endpoint is refused.
        KeyboardInterrupt: Ctrl-C.
    """
    asyncio.run(_ask_all(questions, model, parameters, store, limits, tally, advance))


async def _ask_all(
    questions: Iterator[Question],
    model: str,
    parameters: dict[str, Any],
    store: Store,
    limits: Limits,
    tally: Tally,
    advance: Callable[[int], None],
) -> None:
    asking = _Asking(model, parameters, store, limits, tally, check_key())
    loop = asyncio.get_running_loop()
    interrupted = False

    def interrupt() -> None:
        nonlocal interrupted
        interrupted = asking.stopping = True

    handles_signals = True
    try:
        loop.add_signal_handler(signal.SIGINT, interrupt)
    except (NotImplementedError, RuntimeError, ValueError):  # not the main thread, or not Unix
        handles_signals = False
    try:
        async with AsyncOpenAI(api_key=asking.key, max_retries=0, timeout=limits.timeout) as client:
            workers = [
                asyncio.create_task(_work(asking, client, questions, advance))
                for _ in range(limits.concurrency)
            ]
            # One fatal fault stops all; what the others have under way is still stored.
            done = await asyncio.gather(*workers, return_exceptions=True)
    finally:
        if handles_signals:
            loop.remove_signal_handler(signal.SIGINT)
    for result in done:
        if isinstance(result, BaseException):
            raise result
    if interrupted:
        raise KeyboardInterrupt


@dataclass
class _Asking:
    """State that the workers share; one thread, so plain fields do."""

    model: str
    parameters: dict[str, Any]
    store: Store
    limits: Limits
    tally: Tally
    key: str
    stopping: bool = False
    under_way: int = 0
    reserved: float = 0.0  # dollars that requests under way may cost at most
    not_before: float = 0.0  # loop time before which the endpoint asked for silence

    def may_send(self, worst: float) -> bool:
        """Whether one more request keeps the caps even if everything under way costs the most it can."""
        limits = self.limits
        if limits.max_requests is not None and self.tally.requests + self.under_way >= limits.max_requests:
            self.tally.stopped = f"--max-requests {limits.max_requests} reached"
        elif limits.max_cost is not None and self.tally.cost + self.reserved + worst > limits.max_cost:
            self.tally.stopped = f"--max-cost {limits.max_cost} reached"
        return self.tally.stopped is None

    def hide(self, text: str) -> str:
        """A message without the API key."""
        return " ".join(text.replace(self.key, "***").split())[:300]


async def _work(
    asking: _Asking, client: AsyncOpenAI, questions: Iterator[Question], advance: Callable[[int], None]
) -> None:
    limits = asking.limits
    while not asking.stopping and asking.tally.stopped is None:
        question = next(questions, None)
        if question is None:
            return
        price = limits.price
        longest = asking.parameters.get("max_tokens") or asking.parameters.get("max_completion_tokens") or 0
        worst = price.of(estimate_tokens(question.messages), longest) if price else 0.0
        if not asking.may_send(worst):
            return
        asking.under_way += 1
        asking.reserved += worst
        try:
            await _ask(asking, client, question)
        except BaseException:
            asking.stopping = True
            raise
        finally:
            asking.under_way -= 1
            asking.reserved -= worst
        advance(1)


async def _ask(asking: _Asking, client: AsyncOpenAI, question: Question) -> None:
    """One question until it has an answer, cannot have one, or has failed too often."""
    loop = asyncio.get_running_loop()
    reason = ""
    messages: Any = question.messages  # plain dictionaries, where the client's types want its own
    for attempt in range(_ATTEMPTS):
        if attempt:
            asking.tally.retries += 1
            if asking.stopping:
                return  # not asked to the end; it stays unanswered and is asked next time
        await asyncio.sleep(max(0.0, asking.not_before - loop.time()))
        try:
            response = await client.chat.completions.create(
                model=asking.model, messages=messages, **asking.parameters
            )
            text = _text_of(response)
        except _FATAL as error:
            raise UserError(f"openai:{asking.model}: {asking.hide(str(error))}") from None
        except _PASSING as error:
            if getattr(error, "code", None) == "insufficient_quota":
                raise UserError(f"openai:{asking.model}: {asking.hide(str(error))}") from None
            reason = f"{type(error).__name__}: {asking.hide(str(error))}"
            await _wait(asking, attempt, error)
            continue
        except openai.APIStatusError as error:
            asking.tally.failed[question.key] = asking.hide(str(error))
            return
        except ValueError as error:  # a body that is not the protocol's
            reason = f"malformed answer: {asking.hide(str(error))}"
            await _wait(asking, attempt, None)
            continue
        _keep(asking, question, text, getattr(response, "usage", None))
        return
    asking.tally.failed[question.key] = f"{_ATTEMPTS} attempts, last {reason}"


def _text_of(response: Any) -> str:
    """The answer's text, or the refusal's; anything else is not an answer."""
    choices = getattr(response, "choices", None)
    if not choices or getattr(choices[0], "message", None) is None:
        raise ValueError(f"no choices in {str(response)[:80]!r}")
    message = choices[0].message
    text = message.content if message.content is not None else getattr(message, "refusal", None)
    if not isinstance(text, str):
        raise ValueError("neither content nor refusal")
    return text


def _keep(asking: _Asking, question: Question, text: str, usage: Any) -> None:
    prompt = getattr(usage, "prompt_tokens", None)
    completion = getattr(usage, "completion_tokens", None)
    asking.store.add(question.key, f"openai:{asking.model}", text, prompt, completion)
    tally = asking.tally
    tally.requests += 1
    tally.prompt_tokens += prompt or 0
    tally.completion_tokens += completion or 0
    if asking.limits.price:
        tally.cost += asking.limits.price.of(prompt or estimate_tokens(question.messages), completion or 0)


async def _wait(asking: _Asking, attempt: int, error: Exception | None) -> None:
    """Back off: as long as the endpoint says, else exponentially with jitter."""
    asked_for = _retry_after(error)
    if asked_for is not None:
        # The limit is the account's, so everybody waits.
        asking.not_before = max(asking.not_before, asyncio.get_running_loop().time() + asked_for)
        await asyncio.sleep(random.uniform(0, 0.1 * asked_for))
        return
    longest = min(_LONGEST_WAIT, _FIRST_WAIT * 2**attempt)
    await asyncio.sleep(random.uniform(longest / 2, longest))


def _retry_after(error: Exception | None) -> float | None:
    headers = getattr(getattr(error, "response", None), "headers", {})
    try:
        return max(0.0, float(headers["retry-after"]))
    except (KeyError, ValueError, TypeError):
        return None
