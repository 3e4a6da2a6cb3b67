"""A model with a method at work says so: a second token method is not told what has left, a copy not what it copies."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import nn

from tprune.errors import UserError
from tprune.models.replaced import replaced


def claim(model: nn.Module, method: str) -> Callable[[], None]:
    """Mark that `method` is at work in a vision transformer or a text encoder, alone; what takes the mark off again.

    Raises:
        UserError: another one is.
    """
    if hasattr(model, "tprune_at_work"):
        raise UserError(
            f"{model.tprune_at_work} is at work in this model; remove() its handle before {method}"
        )
    model.tprune_at_work, uncopied = method, Uncopied(model, method)

    def release() -> None:
        uncopied.remove()
        del model.tprune_at_work

    return release


class Uncopied:
    """Keeps `copy.deepcopy` from a model in which `method` is at work, until `remove`.

    Hooks know the model that they were put in and share what they saw of it; those of a copy would, too. The model is
    asked before they are, wherever among what is copied it stands.
    """

    def __init__(self, model: nn.Module, method: str):
        def refuse(memo: dict[int, Any]) -> nn.Module:
            raise UserError(
                f"{method} is at work in this model, which cannot be copied meanwhile: remove() its handle, copy, and "
                "prune the copy"
            )

        self.undo = ExitStack()
        self.undo.enter_context(replaced(model, refuse, "__deepcopy__"))

    def remove(self) -> None:
        """Let the model be copied again."""
        self.undo.close()
