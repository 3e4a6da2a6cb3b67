"""A function of a module's own gives way to another for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def replaced(module: nn.Module, function: Callable[..., Any], name: str = "forward") -> Iterator[None]:
    """Inside, `module` answers calls of `name` with `function`; behind, with what it had before.

    What it had may be its class's, or one of the instance alone, as accelerate leaves on what it has placed.
    """
    own = vars(module).get(name)
    setattr(module, name, function)
    try:
        yield
    finally:
        delattr(module, name)
        if own is not None:
            setattr(module, name, own)
