"""An OpenAI-compatible endpoint: its key, its URL, its faults in words, and nothing secret in any of them."""

from __future__ import annotations

import base64
import os
import re
from urllib.parse import parse_qsl, unquote, urlsplit

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

# What the client's transport says before a request is sent.
_UNSENT = (
    "ConnectError", "ConnectTimeout", "PoolTimeout", "ProxyError", "UnsupportedProtocol",
    "LocalProtocolError", "InvalidURL",
)  # fmt: skip
_GATEWAY_GAVE_UP = (504, 524)  # while what is behind it may have answered
_TELLING = 8  # letters from which on a secret is told apart from a word


def check_key() -> str:
    """The API key from OPENAI_API_KEY.

    An OPENAI_BASE_URL that is set and empty is unset, and white space around one is cut off, as from a file
    or a secret: the client would take it for a part of the URL.

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
    url = os.environ.get("OPENAI_BASE_URL", "").strip()
    os.environ.pop("OPENAI_BASE_URL", None)
    if url:
        os.environ["OPENAI_BASE_URL"] = url
    try:
        parts = urlsplit(url)
        fits = not url or (parts.scheme in ("http", "https") and parts.hostname and parts.port != 0)
    except ValueError:
        fits = False
    if not fits:
        raise UserError("OPENAI_BASE_URL is no URL; it should look like http://localhost:8000/v1")
    return key


def hide_secrets(text: str) -> str:
    """A message on one line, without the API key and without anything secret in the endpoint's URL.

    Half of a surrogate pair, of a text that was cut in an emoji, becomes "?": nothing could store it.
    """
    text = text.encode("utf-8", "replace").decode()
    return " ".join(_without(text, _secrets()).split())[:300]


def without_secrets(text: str) -> str:
    """An answer, which a gateway may have put the key into, without what is secret of the endpoint.

    Secrets of a few letters, as local endpoints are content with, may be part of any word and stay.
    """
    return _without(text, {secret for secret in _secrets() if len(secret) >= _TELLING})


def _without(text: str, secrets: set[str]) -> str:
    for secret in sorted(secrets, key=len, reverse=True):
        # A short one, as local endpoints are content with, is told apart as a word of its own alone.
        pattern = re.escape(secret) if len(secret) >= _TELLING else rf"(?<!\w){re.escape(secret)}(?!\w)"
        text = re.sub(pattern, "***", text)
    return text


def _secrets() -> set[str]:
    parts = urlsplit(os.environ.get("OPENAI_BASE_URL", ""))
    secrets = {os.environ.get("OPENAI_API_KEY", "").strip(), parts.username or "", parts.password or ""}
    user, password = unquote(parts.username or ""), unquote(parts.password or "")
    # As the header says them.
    secrets |= {user, password} | ({_base64(f"{user}:{password}")} if user or password else set())
    secrets |= {parts.query, *(value for _, value in parse_qsl(parts.query))}
    return secrets - {""}


def _base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def shown_url(url: str) -> str:
    """An endpoint's URL as it may be told: without user, password and query, which may be secret."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{hide_secrets(parts.path).rstrip('/')}"


def refusal(error: openai.OpenAIError) -> str:
    """What an endpoint said, in words, and the URL that said so, which may be the wrong one."""
    request = getattr(error, "request", None)
    where = f"{shown_url(str(request.url))}: " if request is not None else ""
    return f"{where}{hide_secrets(str(error))}"


def may_be_answered(error: openai.OpenAIError) -> bool:
    """Whether a request was sent and its answer got lost on the way, so that it may be on the bill."""
    if not isinstance(error, openai.APIConnectionError):
        gave_up = getattr(error, "status_code", None) in _GATEWAY_GAVE_UP
        return gave_up or isinstance(error, openai.APIResponseValidationError)
    return type(error.__cause__ or error.__context__).__name__ not in _UNSENT


def reason_of(error: Exception) -> str:
    """A fault in words: what lies at its root, where the client only says that there is no connection."""
    root: BaseException = error
    if isinstance(error, openai.APIConnectionError) and not isinstance(error, openai.APITimeoutError):
        while cause := root.__cause__ or root.__context__:
            root = cause
    words = "connection refused" if isinstance(root, ConnectionRefusedError) else str(root)
    return f"{type(error).__name__}: {hide_secrets(words or type(root).__name__)}"
