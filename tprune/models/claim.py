"""One token method at a time in a vision transformer or a text encoder: a second one is not told what has left."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from tprune.errors import UserError


def claim(model: nn.Module, method: str) -> Callable[[], None]:
    """Mark that `method` is at work in `model`; what takes the mark off again.

    Raises:
        UserError: another one is.
    """
    if hasattr(model, "tprune_at_work"):
        raise UserError(
            f"{model.tprune_at_work} is at work in this model; remove() its handle before {method}"
        )
    model.tprune_at_work = method
    return lambda: delattr(model, "tprune_at_work")
