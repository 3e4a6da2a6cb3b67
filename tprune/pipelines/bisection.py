"""The budget at which a method meets a target, in a few measurements: costs by interpolation, drops by bisection."""

from __future__ import annotations

import math
from collections.abc import Callable

from tprune.errors import BudgetError

UNCHANGED = 0.995
"""A cost above this fraction of the dense model's, at a budget well below all, is one that the method leaves alone."""
STEPS, DROP_STEPS = 10, 6
NEAR = 0.05
"""How far from an earlier answer the next rung looks for its own."""


class OutError(Exception):
    """A candidate that cannot meet the goal, and why."""


def fit_cost(
    cost: Callable[[float], float], target: float, tolerance: float, *, exact: bool = True, steps: int = STEPS
) -> tuple[float, float]:
    """The fraction left at which `cost` comes within `tolerance` of `target` without exceeding it by more.

    `cost` rises with the fraction, up to the dense model's 1. The next place to look is interpolated between the two
    nearest ones, never closer to either than a tenth of the way, so that steps and noise cannot trap it.

    Args:
        cost: at a fraction left, of the dense model's.
        target, tolerance: where it shall come out.
        exact: whether one look is enough to see that a method leaves the cost alone; no measured time is.
        steps: places to look at.

    Returns:
        The fraction, and the cost measured there.

    Raises:
        OutError: the target is below what the method reaches.
    """
    low, high, best = (0.0, 0.0), (1.0, 1.0), None
    place: float | None = None
    for _ in range(steps):
        if place is None:
            share = (target - low[1]) / max(high[1] - low[1], 1e-9)
            place = low[0] + min(max(share, 0.1), 0.9) * (high[0] - low[0])
        here = round(place, 4)
        place = None
        try:
            found = cost(here)
        except BudgetError as error:
            floor = strongest(error, here)
            if floor is None:
                high = (here, high[1])
            elif floor >= high[0]:
                break
            else:
                low, place = (here, low[1]), floor
            continue
        if exact and found >= UNCHANGED and here < 0.9:
            raise OutError(f"it leaves this cost at {found:.1%}")
        if found <= target + tolerance:
            best, low = (here, found), (here, found)
            if found >= target - tolerance:
                break
        else:
            high = (here, found)
        if high[0] - low[0] < 1 / 512:
            break
    if best is None:
        raise OutError(
            f"it reaches no less than {high[1]:.1%}" if high[0] < 1 else "no budget meets the target"
        )
    return best


def fit_drop(
    drop: Callable[[float], float], most: float, start: float | None = None, steps: int = DROP_STEPS
) -> float:
    """The smallest fraction left at which `drop` is at most `most`, by bisection.

    Args:
        drop: falls as the fraction rises, up to 0 for the dense model.
        most: how much of it is allowed.
        start: where fewer samples put the answer; it and a place near it are looked at first.
        steps: places to look at.

    Raises:
        OutError: only the dense model is that good.
    """
    low, high, ahead = 0.0, 1.0, [0.5 if start is None else start]
    for _ in range(steps):
        here = round(ahead.pop() if ahead else (low + high) / 2, 4)
        try:
            good = drop(here) <= most
        except BudgetError as error:
            floor = strongest(error, here)
            if floor is None:
                high = here
            elif floor >= high:
                break
            else:
                low, ahead = here, [floor]
            continue
        low, high = (low, here) if good else (here, high)
        if here == start:
            near = here - NEAR if good else here + NEAR
            ahead = [near] if low < near < high else []
    if high == 1.0:
        raise OutError("nothing that was tried stays within the drop")
    return high


def strongest(error: BudgetError, left: float) -> float | None:
    """The smallest fraction left that the method reaches, where `left` was below it; None where it was too mild."""
    if error.low is not None and left < error.low:
        return math.ceil(10_000 * error.low) / 10_000
    if error.high is not None and 1 - left > error.high and error.high < 1:
        return math.ceil(10_000 * (1 - error.high)) / 10_000
    return None
