"""What a judge's answers cost: estimated before anything is sent, counted from the API's figures after."""

from __future__ import annotations

from dataclasses import dataclass

from novelret.errors import UserError

# Dollars per million tokens (input, output), list prices as of 2025; --price overrides.
_PRICES = {
    "gpt-3.5-turbo": (0.5, 1.5),
    "gpt-4-turbo": (10.0, 30.0),
    "gpt-4": (30.0, 60.0),
    "gpt-4o": (2.5, 10.0),
    "gpt-4o-mini": (0.15, 0.6),
    "gpt-4.1": (2.0, 8.0),
    "gpt-4.1-mini": (0.4, 1.6),
    "gpt-4.1-nano": (0.1, 0.4),
}
_CHARACTERS_PER_TOKEN = 3.0
"""English has about four; fewer makes the estimate an upper one."""
_TOKENS_PER_MESSAGE = 8


@dataclass(frozen=True)
class Price:
    """Dollars per million tokens."""

    input: float
    output: float

    def of(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Dollars for so many tokens."""
        return (prompt_tokens * self.input + completion_tokens * self.output) / 1e6


def find_price(model: str, override: str | None) -> Price | None:
    """A model's price; None where it is not known and none was given.

    Raises:
        UserError: the override is not two numbers.
    """
    if override is not None:
        try:
            given = [float(part) for part in override.split(",")]
            return Price(given[0], given[1])
        except (ValueError, IndexError):
            raise UserError(
                f"--price {override}: expected INPUT,OUTPUT in dollars per million tokens, like 0.15,0.6"
            ) from None
    # "gpt-4o-2024-08-06" is priced as "gpt-4o"; the longest name that fits is the right one.
    fitting = [name for name in _PRICES if model == name or model.startswith(f"{name}-20")]
    return Price(*_PRICES[max(fitting, key=len)]) if fitting else None


def estimate_tokens(messages: list[dict[str, str]]) -> int:
    """An upper estimate of a question's tokens, from its length alone."""
    return sum(int(len(m["content"]) / _CHARACTERS_PER_TOKEN) + _TOKENS_PER_MESSAGE for m in messages)
