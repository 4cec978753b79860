"""Propositions 1 and 2 of PG-Ret in simulation: error against steps and against the number of actions.

    python benchmarks/sample_complexity.py

One query and A items, of which one in four is relevant, or only one. The item-wise policy is a softmax over
the items and draws one a step (§4.1, R = 1 if relevant, else 0); the binary policy has one logit per item,
draws a state (an item, uniformly) and one of two actions (Eq. 8, R = ±1). Both are plain REINFORCE with a
constant learning rate from a uniform start. Error is 1 − E R for the softmax and the share of wrong actions
for the binary policy.

The propositions bound the error by a constant times A²/t (item-wise) and A/t (binary). Printed are slopes of
log-log fits, each with its standard error: of error against steps over the last two decades, and of the steps
needed to reach an error of 0.05 against A. Were the bounds tight, they would be −1 in t, and 2 or 1 in A.
"""

from __future__ import annotations

import argparse

import numpy as np

SIZES = (8, 16, 32, 64, 128, 256)
GOAL = 0.05


def item_wise(
    relevant: np.ndarray, steps: int, runs: int, rate: float, rng: np.random.Generator
) -> np.ndarray:
    """(steps,) mean error of REINFORCE over softmax items."""
    size = len(relevant)
    theta = np.zeros((runs, size))
    every = np.arange(runs)
    errors = np.empty(steps)
    for step in range(steps):
        weights = np.exp(theta - theta.max(axis=1, keepdims=True))
        policy = weights / weights.sum(axis=1, keepdims=True)
        errors[step] = 1 - policy[:, relevant].sum(axis=1).mean()
        drawn = (policy.cumsum(axis=1) < rng.random((runs, 1))).sum(axis=1).clip(max=size - 1)
        reward = relevant[drawn].astype(float)
        theta -= rate * reward[:, None] * policy
        theta[every, drawn] += rate * reward
    return errors


def binary(relevant: np.ndarray, steps: int, runs: int, rate: float, rng: np.random.Generator) -> np.ndarray:
    """(steps,) mean error of REINFORCE over binary actions."""
    size = len(relevant)
    theta = np.zeros((runs, size))
    sign = np.where(relevant, 1.0, -1.0)
    every = np.arange(runs)
    errors = np.empty(steps)
    for step in range(steps):
        errors[step] = (1 / (1 + np.exp(sign * theta))).mean()
        state = rng.integers(size, size=runs)
        select = 1 / (1 + np.exp(-theta[every, state]))
        action = rng.random(runs) < select
        reward = np.where(action, sign[state], -sign[state])
        theta[every, state] += rate * reward * (action - select)
    return errors


def slope(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Slope of log y against log x, and its standard error."""
    x, y = np.log(x), np.log(y)
    value, intercept = np.polyfit(x, y, 1)
    rest = y - value * x - intercept
    error = np.sqrt((rest**2).sum() / max(1, len(x) - 2) / ((x - x.mean()) ** 2).sum())
    return float(value), float(error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=30_000)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--rate", type=float, default=0.5)
    options = parser.parse_args()
    print("| policy | relevant | A | steps to error 0.05 | last error | slope in t |")
    print("| --- " * 6 + "|")
    for kind, every in (("one in four", 4), ("one", max(SIZES))):
        for name, simulate in (("item-wise softmax", item_wise), ("binary actions", binary)):
            reached = []
            for size in SIZES:
                rng = np.random.default_rng(0)
                relevant = np.arange(size) % every == 0
                errors = simulate(relevant, options.steps, options.runs, options.rate, rng)
                below = np.flatnonzero(errors < GOAL)
                if len(below):
                    reached.append((size, int(below[0])))
                points = np.logspace(np.log10(options.steps / 100), np.log10(options.steps - 1), 60)
                points = np.unique(points.astype(int))
                in_t, in_t_error = slope(points, errors[points])
                when = f"{below[0]:,}" if len(below) else "not reached"
                last = f"{errors[-1]:.4f} | {in_t:.2f} ± {in_t_error:.2f}"
                print(f"| {name} | {kind} | {size} | {when} | {last} |", flush=True)
            # Where one action is wrong of many, the binary policy starts below the goal: no fit then.
            fitted = [(size, when) for size, when in reached if when > 0]
            if len(fitted) > 2:
                sizes, when = np.array(fitted, dtype=float).T
                in_a, in_a_error = slope(sizes, when)
                print(
                    f"| {name} | {kind} | all | slope in A: {in_a:.2f} ± {in_a_error:.2f} | | |", flush=True
                )


if __name__ == "__main__":
    main()
