"""How many tokens a question has: counted where the model's tokeniser is at hand, else estimated."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from novelret.label.questions import Messages

_CHARACTERS_PER_TOKEN = 3.0
"""English has about four; fewer makes the estimate an upper one."""
_TOKENS_PER_MESSAGE = 8
_PATIENCE = 10.0  # seconds for tiktoken to fetch a vocabulary that its cache lacks


@dataclass(frozen=True)
class TokenCounter:
    """Counts a question's tokens.

    Attributes:
        count: messages → tokens.
        exact: whether that is what the endpoint will count, rather than an upper estimate.
    """

    count: Callable[[Messages], int]
    exact: bool


def token_counter(model: str) -> TokenCounter:
    """A model's counter: tiktoken's where it knows the model and has its vocabulary, else an estimate."""
    encoding = _encoding_of(model)
    if encoding is None:
        return TokenCounter(estimate_tokens, exact=False)

    def count(messages: Messages) -> int:
        # OpenAI's chat format: three tokens around each message, three more to begin the answer.
        texts = [text for message in messages for text in message.values()]
        return 3 + 3 * len(messages) + sum(len(encoding.encode_ordinary(text)) for text in texts)

    return TokenCounter(count, exact=True)


def estimate_tokens(messages: Messages) -> int:
    """An upper estimate of a question's tokens, from its length alone."""
    return sum(_estimate(message["content"]) + _TOKENS_PER_MESSAGE for message in messages)


def _estimate(text: str) -> int:
    # Outside ASCII a character may take a token for each of its bytes.
    if text.isascii():
        return int(len(text) / _CHARACTERS_PER_TOKEN) + 1
    plain = sum(character < "\x80" for character in text)
    return int(plain / _CHARACTERS_PER_TOKEN) + 1 + len(text.encode("utf-8", "replace")) - plain


def _encoding_of(model: str) -> Any:
    """Tiktoken's encoding; None where it is not installed, knows no such model, or has no vocabulary."""
    try:
        import tiktoken
    except ImportError:
        return None
    found: list[Any] = []

    def load() -> None:
        try:
            found.append(tiktoken.encoding_for_model(model))
        except Exception:  # unknown model, no network, a broken cache: an estimate will do
            return

    # It fetches what its cache lacks, without a time limit of its own.
    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    thread.join(_PATIENCE)
    return found[0] if found else None
