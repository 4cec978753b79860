"""How many tokens a question has: counted where the model's tokeniser is at hand, else estimated."""

from __future__ import annotations

import string
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from novelret.label.questions import Messages

_SMALL, _CAPITALS = string.ascii_lowercase.encode(), string.ascii_uppercase.encode()
_ZEROS = bytes.maketrans(string.digits.encode(), b"0" * 10)
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
    """An upper estimate of a question's tokens: vocabularies differ, and part numbers take many."""
    return sum(_estimate(message["content"]) + _TOKENS_PER_MESSAGE for message in messages)


def _estimate(text: str) -> int:
    # Three characters a token, where English has about four, of capitals two, and one for each word at least.
    # A space belongs to the word behind it; a digit, the space before a number, a sign and outside ASCII each
    # byte may be a token alone.
    data = text.encode("utf-8", "replace")
    small, capitals = (len(data) - len(data.translate(None, those)) for those in (_SMALL, _CAPITALS))
    words, others = len(data.split()), len(data) - small - capitals - data.count(b" ")
    others += data.count(b"  ") + data.translate(_ZEROS).count(b" 0")
    return max(words, (small + words) // 3) + capitals // 2 + others + 1


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
