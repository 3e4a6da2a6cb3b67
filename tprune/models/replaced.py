"""A function of a module's own gives way to another for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_BEFORE = "_tprune_before"
"""Of a module: by name, what every function that gave way is to come back as, in the order in which they did."""


@contextmanager
def replaced(module: nn.Module, function: Callable[..., Any], name: str = "forward") -> Iterator[None]:
    """Inside, `module` answers calls of `name` with `function`; behind, with what it had before.

    What it had may be its class's, or one of the instance alone, as accelerate leaves on what it has placed. Where
    several stand in one place they may leave in any order: the last to leave gives back what the first has found.
    """
    places = vars(module).setdefault(_BEFORE, {})
    before, mine = places.setdefault(name, {}), object()
    before[mine] = vars(module).get(name)
    setattr(module, name, function)
    try:
        yield
    finally:
        order, own = list(before), before.pop(mine)
        if order[-1] is not mine:
            before[order[order.index(mine) + 1]] = own
        else:
            vars(module).pop(name, None)
            if own is not None:
                setattr(module, name, own)
        if not before:
            places.pop(name)
        if not places:
            vars(module).pop(_BEFORE, None)
