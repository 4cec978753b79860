"""What every judge behind an OpenAI-compatible endpoint shares: its parameters and its answers."""

from __future__ import annotations

import json
from typing import Any

from novelret.endpoint import without_secrets


def parameters_for(model: str, max_tokens: int) -> dict[str, Any]:
    """Sampling parameters: greedy and short; reasoning models take neither a temperature nor max_tokens.

    A gateway names a model behind its maker, like openai/gpt-5-mini.
    """
    if model.rpartition("/")[2].startswith(("o1", "o3", "o4", "gpt-5")):
        return {"max_completion_tokens": max_tokens + 2_000}
    return {"temperature": 0, "max_tokens": max_tokens}


def longest_answer(parameters: dict[str, Any]) -> int:
    """Tokens that an answer may cost at most."""
    return int(parameters.get("max_tokens") or parameters.get("max_completion_tokens") or 0)


def text_of(response: Any) -> str:
    """A chat completion's text, or the refusal's; empty where a filter or the token limit left none.

    Without anything secret of the endpoint, as it is kept and shown.

    Raises:
        ValueError: it holds no message at all.
    """
    error = getattr(response, "error", None)
    if error:
        raise ValueError(str(error.get("message", error) if isinstance(error, dict) else error))
    choices = getattr(response, "choices", None)
    if not isinstance(choices, list) or not choices or getattr(choices[0], "message", None) is None:
        raise ValueError(f"no choices in {without_secrets(str(response))[:80]!r}")
    message = choices[0].message
    text = getattr(message, "content", None) or getattr(message, "refusal", None) or ""
    if isinstance(text, list) and all(isinstance(part, dict) and "text" in part for part in text):
        text = "".join(str(part["text"]) for part in text)  # in parts, as some endpoints send it
    text = text if isinstance(text, str) else json.dumps(text, ensure_ascii=False, default=str)
    text = without_secrets(text)
    return text.encode("utf-8", "replace").decode()  # half of a surrogate pair can be stored nowhere


def is_cut(response: Any) -> bool:
    """Whether a chat completion was ended by the limit on its tokens."""
    choices = getattr(response, "choices", None) or [None]
    return getattr(choices[0], "finish_reason", None) == "length"


def tokens_of(usage: Any) -> tuple[int | None, int | None]:
    """Prompt and completion tokens of a reply; None where the endpoint does not tell."""
    told = (getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens"))
    prompt, completion = (value if isinstance(value, int) and value >= 0 else None for value in told)
    return prompt, completion
