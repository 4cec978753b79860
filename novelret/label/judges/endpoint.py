"""What every judge behind an OpenAI-compatible endpoint shares: its key, its parameters, its answers."""

from __future__ import annotations

import json
import os
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import openai

from novelret.errors import UserError

FATAL = (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError)
"""Faults that no repetition mends."""
PASSING = (
    openai.RateLimitError,
    openai.InternalServerError,
    openai.APIConnectionError,
    openai.APITimeoutError,
    openai.APIResponseValidationError,
    openai.ConflictError,
)
"""Faults that may be gone when the request is repeated."""


def parameters_for(model: str, max_tokens: int) -> dict[str, Any]:
    """Sampling parameters: greedy and short; reasoning models take neither a temperature nor max_tokens."""
    if model.startswith(("o1", "o3", "o4", "gpt-5")):
        return {"max_completion_tokens": max_tokens + 2_000}
    return {"temperature": 0, "max_tokens": max_tokens}


def longest_answer(parameters: dict[str, Any]) -> int:
    """Tokens that an answer may cost at most."""
    return int(parameters.get("max_tokens") or parameters.get("max_completion_tokens") or 0)


def check_key() -> str:
    """The API key from OPENAI_API_KEY.

    Raises:
        UserError: it is not set, or the endpoint in OPENAI_BASE_URL is no URL.
    """
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not key:
        raise UserError(
            "OPENAI_API_KEY is not set; export it (any word will do for a local endpoint in OPENAI_BASE_URL)"
        )
    if not (key.isascii() and key.isprintable()):
        raise UserError("OPENAI_API_KEY holds characters that no HTTP header can carry; export it again")
    url = os.environ.get("OPENAI_BASE_URL", "")
    try:
        parts = urlsplit(url)
        fits = not url or (parts.scheme in ("http", "https") and parts.hostname and parts.port != 0)
    except ValueError:
        fits = False
    if not fits:
        raise UserError("OPENAI_BASE_URL is no URL; it should look like http://localhost:8000/v1")
    return key


def hide_secrets(text: str) -> str:
    """A message on one line, without the API key and without anything secret in the endpoint's URL."""
    parts = urlsplit(os.environ.get("OPENAI_BASE_URL", ""))
    secrets = {os.environ.get("OPENAI_API_KEY", "").strip(), parts.username or "", parts.password or ""}
    secrets |= {parts.query, *(value for _, value in parse_qsl(parts.query))}
    for secret in sorted(secrets - {""}, key=len, reverse=True):
        text = text.replace(secret, "***")
    return " ".join(text.split())[:300]


def shown_url(url: str) -> str:
    """An endpoint's URL as it may be told: without user, password and query, which may be secret."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{hide_secrets(parts.path).rstrip('/')}"


def reason_of(error: openai.OpenAIError) -> str:
    """A fault in words: what lies at its root, where the client only says that there is no connection."""
    root: BaseException = error
    if isinstance(error, openai.APIConnectionError) and not isinstance(error, openai.APITimeoutError):
        while cause := root.__cause__ or root.__context__:
            root = cause
    words = "connection refused" if isinstance(root, ConnectionRefusedError) else str(root)
    return f"{type(error).__name__}: {hide_secrets(words or type(root).__name__)}"


def text_of(response: Any) -> str:
    """A chat completion's text, or the refusal's; empty where a filter or the token limit left none.

    Raises:
        ValueError: it holds no message at all.
    """
    error = getattr(response, "error", None)
    if error:
        raise ValueError(str(error.get("message", error) if isinstance(error, dict) else error))
    choices = getattr(response, "choices", None)
    if not isinstance(choices, list) or not choices or getattr(choices[0], "message", None) is None:
        raise ValueError(f"no choices in {str(response)[:80]!r}")
    message = choices[0].message
    text = getattr(message, "content", None) or getattr(message, "refusal", None) or ""
    if isinstance(text, list) and all(isinstance(part, dict) and "text" in part for part in text):
        text = "".join(str(part["text"]) for part in text)  # in parts, as some endpoints send it
    text = text if isinstance(text, str) else json.dumps(text, ensure_ascii=False, default=str)
    return text.encode("utf-8", "replace").decode()  # half of a surrogate pair can be stored nowhere


def is_cut(response: Any) -> bool:
    """Whether a chat completion was ended by the limit on its tokens."""
    choices = getattr(response, "choices", None) or [None]
    return getattr(choices[0], "finish_reason", None) == "length"


def tokens_of(usage: Any) -> tuple[int | None, int | None]:
    """Prompt and completion tokens of a reply; None where the endpoint does not tell."""
    told = (getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens"))
    prompt, completion = (value if isinstance(value, int) else None for value in told)
    return prompt, completion
