"""`generate` without a cache gives a model the prompt again and again, each time with what it has said behind it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import Any

from torch import Tensor, nn

from tprune.errors import UserError
from tprune.methods.tokens import TokenMethod
from tprune.models.replaced import replaced


class Generating:
    """Knows, while `generate` runs, how long its prompt was; until `remove`.

    Args:
        model: whose `generate` it is; a model may have none.
        method: what works in it.
        depth: how many layers the decoder has.

    Attributes:
        cached: whether the method takes entries out of caches, or looks at what is generated token by token.
    """

    def __init__(self, model: nn.Module, method: TokenMethod, depth: int):
        self.method = method
        self.cached = method.evicts() or method.uniform() or bool(method.watches(depth))
        self.running, self.length = False, None
        self.undo = ExitStack()
        if hasattr(model, "generate"):
            self.undo.enter_context(replaced(model, self._heard(model.generate), "generate"))

    def remove(self) -> None:
        """Give the model back what it had."""
        self.undo.close()

    def _heard(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(generate)
        def heard(*args: Any, **kwargs: Any) -> Any:
            self.running, self.length = True, None
            try:
                return generate(*args, **kwargs)
            finally:
                self.running = False

        return heard

    def prompt(self, marked: Tensor) -> Tensor:
        """`marked`, bool [B, N], of a sequence that comes without a cache, but for what `generate` has said itself.

        Raises:
            UserError: the method needs a cache, and there is none.
        """
        if not self.running:
            return marked
        if self.length is None:
            self.length = marked.shape[1]
        if marked.shape[1] == self.length:
            return marked
        if self.cached:
            raise UserError(f"{self.method.id} needs a cache behind its prompt: generate with use_cache=True")
        marked = marked.clone()
        marked[:, self.length :] = False
        return marked
