"""What a step's loss comes to: micro-batches and processes add theirs up."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepLoss:
    """A step's loss, as a sum over examples that micro-batches add up to.

    Attributes:
        loss: scalar, with gradient where it was just computed.
        feedback: the feedback pairs' part of it.
        states: the judged states' part of it.
        drawn: how many states were drawn, or items in drawn lists.
        known: how many of them have a label.
    """

    loss: Tensor
    feedback: float
    states: float
    drawn: float = 0.0
    known: float = 0.0

    @staticmethod
    def nothing() -> StepLoss:
        """The loss of no example."""
        return StepLoss(torch.zeros(()), 0.0, 0.0)

    def detached(self) -> StepLoss:
        """Without gradient, on the CPU."""
        return replace(self, loss=self.loss.detach().cpu())

    def __add__(self, other: StepLoss) -> StepLoss:
        return StepLoss(*(mine + its for mine, its in zip(self._parts(), other._parts(), strict=True)))

    def as_tensor(self, device: str) -> Tensor:
        """(5,) float64, to be summed over processes."""
        return torch.tensor([float(part) for part in self._parts()], dtype=torch.float64, device=device)

    @staticmethod
    def from_tensor(tensor: Tensor) -> StepLoss:
        """The inverse of `as_tensor`."""
        loss, *rest = tensor.tolist()
        return StepLoss(torch.tensor(loss, dtype=torch.float64), *rest)

    def _parts(self) -> tuple[Any, ...]:
        return self.loss, self.feedback, self.states, self.drawn, self.known
