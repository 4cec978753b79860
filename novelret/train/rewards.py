"""Rewards of (query, item) states (PG-Ret, Eq. 6 and 7).

A reward is NaN where the judge's verdict is unknown: such a state has no reward, which is not a reward
of 0. Callers leave it out and count it.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from novelret.errors import UserError
from novelret.label.table import RELEVANT, UNKNOWN

RewardFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(verdicts, grades, in_base) → rewards, all of one shape: verdicts int8 as in `novelret.label.table`;
grades float32, the judge's own scale (1 and 0 where it only says yes or no), NaN where unknown; in_base bool,
whether a deployed model's top L holds the item, of several models whether any does; rewards float32, NaN for
none. What a user's own gives where there is no verdict is not kept: a reward there would be no judge's."""


def eq6(verdicts: Tensor, grades: Tensor, in_base: Tensor) -> Tensor:
    """+1 for relevant and novel, −1 otherwise (PG-Ret, Eq. 6)."""
    reward = torch.where((verdicts == RELEVANT) & ~in_base, 1.0, -1.0)
    return reward.masked_fill(verdicts == UNKNOWN, torch.nan)


def eq7(verdicts: Tensor, grades: Tensor, in_base: Tensor) -> Tensor:
    """+1 for relevant and novel, −1 for relevant but not novel, 0 for irrelevant (PG-Ret, Eq. 7).

    For noisy judges: an item called irrelevant is left alone instead of pushed away.
    """
    reward = torch.where(in_base, -1.0, 1.0) * (verdicts == RELEVANT)
    return reward.masked_fill(verdicts == UNKNOWN, torch.nan)


def graded(verdicts: Tensor, grades: Tensor, in_base: Tensor) -> Tensor:
    """Eq. 7 with the judge's grade in place of 1: a better novel item weighs more; 0 for irrelevant ones."""
    reward = torch.where(in_base, -1.0, 1.0) * torch.where(verdicts == RELEVANT, grades, 0.0)
    return reward.masked_fill(verdicts == UNKNOWN, torch.nan)


_NAMED: dict[str, RewardFunction] = {"eq6": eq6, "eq7": eq7, "graded": graded}


def load_reward(name: str) -> RewardFunction:
    """The reward called "eq6", "eq7" or "graded", or a user's own as "module:function", found from here.

    A user's function is wrapped so that a wrong shape is told at once.

    Raises:
        UserError: no such reward, or the module or the function cannot be found.
    """
    if name in _NAMED:
        return _NAMED[name]
    function = _own(name)

    def checked(verdicts: Tensor, grades: Tensor, in_base: Tensor) -> Tensor:
        try:
            reward = function(verdicts, grades, in_base)
        except TypeError as error:
            raise UserError(
                f"--reward {name}: expected a function of (verdicts, grades, in_base): {error}"
            ) from None
        if not isinstance(reward, Tensor) or reward.shape != verdicts.shape:
            got = tuple(reward.shape) if isinstance(reward, Tensor) else type(reward).__name__
            raise UserError(
                f"--reward {name}: returned {got}, expected a tensor of shape {tuple(verdicts.shape)}"
            )
        return reward.float().masked_fill(verdicts == UNKNOWN, torch.nan)

    return checked


def reward_file(name: str) -> Path | None:
    """The file of a user's own reward; None where the reward is a named one, or its source is in no file.

    Raises:
        UserError: no such reward, or the module or the function cannot be found.
    """
    if name in _NAMED:
        return None
    try:
        source = inspect.getsourcefile(inspect.unwrap(_own(name)))
    except TypeError:  # of an object that can be called, or what is written in C
        return None
    return Path(source) if source is not None and Path(source).is_file() else None


def _own(name: str) -> Callable[..., object]:
    """The function that "module:function" names."""
    module_name, separator, function_name = name.partition(":")
    if not separator:
        raise UserError(f"--reward {name}: expected eq6, eq7, graded or your own as module:function")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)  # a console script does not look there by itself
    try:
        function: Callable[..., object] = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, ValueError, TypeError) as error:  # the latter of an empty or relative name
        raise UserError(f"--reward {name}: the module cannot be imported ({error})") from None
    except AttributeError:
        raise UserError(f"--reward {name}: {module_name} has no function {function_name}") from None
    return function
