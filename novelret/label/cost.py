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
    "gpt-4o-2024-05-13": (5.0, 15.0),
    "gpt-4o-mini": (0.15, 0.6),
    "gpt-4.1": (2.0, 8.0),
    "gpt-4.1-mini": (0.4, 1.6),
    "gpt-4.1-nano": (0.1, 0.4),
}
_BATCH_SHARE = 0.5
"""What the Batch API costs of the list price."""


@dataclass(frozen=True)
class Caps:
    """How far asking may go; None for no end.

    Attributes:
        max_requests: stop before more requests than this.
        max_cost: stop before this many dollars could be exceeded; needs a price.

    Raises:
        UserError: one is below 0.
    """

    max_requests: int | None = None
    max_cost: float | None = None

    def __post_init__(self) -> None:
        for option, cap in (("--max-requests", self.max_requests), ("--max-cost", self.max_cost)):
            if cap is not None and not cap >= 0:
                raise UserError(f"{option} {cap:g}: must be at least 0")

    def reached(self, requests: int, cost: float) -> str | None:
        """The cap that so many requests and dollars would exceed, as it is told; None where both hold."""
        if self.max_requests is not None and requests > self.max_requests:
            return f"--max-requests {self.max_requests} reached"
        if self.max_cost is not None and cost > self.max_cost:
            return f"--max-cost {self.max_cost} reached"
        return None


@dataclass(frozen=True)
class Price:
    """Dollars per million tokens."""

    input: float
    output: float

    def of(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Dollars for so many tokens."""
        return (prompt_tokens * self.input + completion_tokens * self.output) / 1e6


def find_price(model: str, override: str | None, *, batch: bool = False) -> Price | None:
    """A model's price; None where it is not known and none was given.

    Args:
        model: the endpoint's name of it.
        override: "INPUT,OUTPUT" in dollars per million tokens; taken as it is, also for batches.
        batch: whether it is asked through the Batch API.

    Raises:
        UserError: the override is not two numbers.
    """
    if override is not None:
        try:
            given = Price(*(float(part) for part in override.split(",")))
            if not (0 <= given.input < float("inf") and 0 <= given.output < float("inf")):
                raise ValueError
            return given
        except (ValueError, TypeError):
            raise UserError(
                f"--price {override}: expected INPUT,OUTPUT in dollars per million tokens, like 0.15,0.6"
            ) from None
    # "gpt-4o-2024-08-06" is priced as "gpt-4o"; the longest name that fits is the right one.
    fitting = [name for name in _PRICES if model == name or model.startswith(f"{name}-20")]
    if not fitting:
        return None
    share = _BATCH_SHARE if batch else 1.0
    dollars_in, dollars_out = _PRICES[max(fitting, key=len)]
    return Price(dollars_in * share, dollars_out * share)
