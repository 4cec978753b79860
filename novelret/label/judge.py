"""The judges that are asked question by question, each as a set of functions; `file:` is not one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from novelret.endpoint import check_key
from novelret.errors import UserError
from novelret.label.cost import Caps, Price, find_price
from novelret.label.judges.endpoint import longest_answer, parameters_for
from novelret.label.judges.file import check_missing
from novelret.label.parse import parse
from novelret.label.prompts import ANSWERS, Prompt, load_prompt, render
from novelret.label.questions import Messages, Question, Reader, Tally
from novelret.label.scores import check_threshold
from novelret.label.store import Store, default_store
from novelret.label.tokens import TokenCounter, token_counter

KINDS = ("file", "openai", "openai-batch", "cross-encoder")
SCORE_THRESHOLD = 0.5
"""Lowest score of a cross-encoder that counts as relevant, unless --threshold says otherwise."""


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How a judge is asked and its answers are read: settings of every stage that has one.

    Attributes:
        missing: what a pair means that a judgement file does not list: "unknown" or "irrelevant".
        prompt: name or file of the prompt.
        answer: "word", "tag", "grade" or "json", over how the prompt says its answers are read.
        threshold: lowest grade or score that counts as relevant; by default the prompt's, 0.5 for a
            cross-encoder's scores, anything above 0 in a file.
        store: the judgement store; by default one per user.
        concurrency: requests under way at once.
        timeout: seconds for one request.
        rpm: requests per minute; by default as the endpoint tells.
        tpm: tokens per minute; likewise.
        max_requests: stop before more requests than this.
        max_cost: stop before this many dollars could be exceeded.
        price: "INPUT,OUTPUT" in dollars per million tokens, over the built-in table.
    """

    missing: str = "unknown"
    prompt: str = "query-document"
    answer: str | None = None
    threshold: float | None = None
    store: str | None = None
    concurrency: int = 32
    timeout: float = 60.0
    rpm: float | None = None
    tpm: float | None = None
    max_requests: int | None = None
    max_cost: float | None = None
    price: str | None = None

    @property
    def store_path(self) -> Path:
        """Where the answers are kept."""
        return Path(self.store) if self.store else default_store()

    @property
    def caps(self) -> Caps:
        """How far asking may go."""
        return Caps(self.max_requests, self.max_cost)


Unanswered = Callable[[], Iterator[Question | None]]
"""Gives the questions that have no answer yet; may be called again to see what is still missing."""


@dataclass(frozen=True)
class Judge:
    """Everything that labelling needs to know of a judge.

    Attributes:
        name: who answers, part of each question's identity. Both ways of asking an endpoint share it.
        parameters: what else decides an answer, part of the identity too.
        fingerprint: of the prompt or the weights.
        render: (query, item) → messages.
        read: answer → (verdict, grade).
        ask: asks what is unanswered and stores the answers; told where to count, of progress, and where to
            say what goes on.
        price: None where it is not known.
        tokens: counts a question's tokens.
        longest: tokens an answer may have.
    """

    name: str
    parameters: dict[str, Any]
    fingerprint: str
    render: Callable[[str, str], Messages]
    read: Reader
    ask: Callable[[Unanswered, Store, Tally, Callable[[int], None], Callable[[str], None]], None]
    price: Price | None
    tokens: TokenCounter
    longest: int = 0


def split_judge(judge: str) -> tuple[str, str]:
    """("file", path), ("openai", model), ("openai-batch", model) or ("cross-encoder", model).

    Raises:
        UserError: none of these, or no such file.
    """
    kind, separator, name = judge.partition(":")
    if kind not in KINDS or not separator or not name:
        raise UserError(
            f"--judge {judge}: unknown; use file:PATH.tsv, openai:MODEL, openai-batch:MODEL or "
            "cross-encoder:MODEL"
        )
    if kind == "file" and not Path(name).is_file():
        raise UserError(f"--judge {judge}: {name}: no such file")
    return kind, name


def same_judge(one: str, other: str) -> bool:
    """Whether two judges, as given to --judge, are one; a batch is only another way to ask it."""
    return one.replace("openai-batch:", "openai:") == other.replace("openai-batch:", "openai:")


def check_asking(config: Asking) -> None:
    """Refuse settings that make no sense.

    Raises:
        UserError: one line naming the option.
    """
    check_missing(config.missing)
    _ = config.caps  # refuses what is below 0
    check_threshold(config.threshold)
    if config.concurrency < 1:
        raise UserError(f"--concurrency {config.concurrency}: must be at least 1")
    above_zero = {"timeout": config.timeout, "rpm": config.rpm, "tpm": config.tpm}
    for name, limit in above_zero.items():
        if limit is not None and not limit > 0:
            raise UserError(f"--{name} {limit:g}: must be above 0")


def make_judge(
    judge: str, asking: Asking, *, device: str = "auto", wait: bool = True, sends: bool = True
) -> Judge:
    """A judge, ready to be asked.

    Args:
        judge: as given to --judge; no file.
        asking: how.
        device: for a cross-encoder.
        wait: stay until batches are answered.
        sends: whether it will be asked; False for a plan and for reading stored answers again.

    Raises:
        UserError: no key, a bad prompt, price or option, or a model that cannot be read.
    """
    kind, model = split_judge(judge)
    if kind == "cross-encoder":
        return _cross_encoder(asking, model, device)
    if sends:
        check_key()
    return _endpoint(asking, model, batch=kind == "openai-batch", wait=wait)


def _endpoint(config: Asking, model: str, *, batch: bool, wait: bool) -> Judge:
    prompt = _prompt(config)
    price = find_price(model, config.price, batch=batch)
    if config.max_cost is not None and price is None:
        raise UserError(f"--max-cost: the price of {model} is not known; give it with --price INPUT,OUTPUT")
    parameters = parameters_for(model, prompt.max_tokens)
    tokens = token_counter(model)

    # Most answers are the same few words.
    read = lru_cache(maxsize=4096)(partial(parse, prompt))

    def ask(
        unanswered: Unanswered,
        store: Store,
        tally: Tally,
        advance: Callable[[int], None],
        say: Callable[[str], None],
    ) -> None:
        from novelret.label.judges.openai import Limits, ask_all

        limits = Limits(
            concurrency=config.concurrency,
            timeout=config.timeout,
            price=price,
            rpm=config.rpm,
            tpm=config.tpm,
        )
        if not batch:
            ask_all(unanswered(), model, parameters, tokens.count, read, store, limits, tally, advance, say)
            return
        from novelret.label.judges.openai_batch import ask_in_batches

        ask_in_batches(
            unanswered,
            model,
            parameters,
            tokens.count,
            read,
            store,
            limits,
            tally,
            advance,
            say,
            wait=wait,
        )

    return Judge(
        name=f"openai:{model}",
        parameters=parameters,
        fingerprint=prompt.fingerprint,
        render=partial(render, prompt),
        read=read,
        ask=ask,
        price=price,
        tokens=tokens,
        longest=longest_answer(parameters),
    )


def _prompt(config: Asking) -> Prompt:
    """The prompt, with --answer and --threshold in place of how it says its answers are read."""
    prompt = load_prompt(config.prompt)
    if config.answer is not None:
        if config.answer not in ANSWERS:
            raise UserError(f"--answer {config.answer}: unknown; choose from {', '.join(ANSWERS)}")
        prompt = replace(prompt, answer=config.answer)
    if config.threshold is not None:
        if prompt.answer not in ("grade", "json"):
            raise UserError(
                f"--threshold {config.threshold:g}: the prompt asks for yes or no, which has no grades; "
                "leave it out, or ask for them (--answer grade, with a prompt that does)"
            )
        prompt = replace(prompt, threshold=config.threshold)
    return prompt


def _cross_encoder(config: Asking, name: str, device: str) -> Judge:
    # torch takes seconds to load; judges over the network do without.
    from novelret.label.judges import cross_encoder

    model = cross_encoder.load_cross_encoder(name, device)
    weights = cross_encoder.fingerprint(model)
    threshold = SCORE_THRESHOLD if config.threshold is None else config.threshold

    def ask(
        unanswered: Unanswered,
        store: Store,
        tally: Tally,
        advance: Callable[[int], None],
        say: Callable[[str], None],
    ) -> None:
        cross_encoder.score_all(unanswered(), name, model, store, tally, advance)

    return Judge(
        name=f"cross-encoder:{name}",
        parameters={"weights": weights},
        fingerprint=weights,
        render=cross_encoder.render_pair,
        read=partial(cross_encoder.read_score, threshold=threshold),
        ask=ask,
        price=Price(0.0, 0.0),
        tokens=TokenCounter(lambda _: 0, exact=True),
    )
