"""What takes the place of the forwards of a vision transformer and its blocks while a token method is at work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from tprune.core.budget import Site
from tprune.models.anatomy import halves
from tprune.models.sight import attend_to


class Forwards:
    """The forwards that a driver puts in place: a block's runs its two halves, and something in between."""

    def _densely(self, forward: Callable) -> Callable:
        def forward_intermediates(*args: Any, **kwargs: Any) -> Any:
            self.dense = True
            try:
                return forward(*args, **kwargs)
            finally:
                self.dense = False

        return forward_intermediates

    def _halves(self, block: nn.Module) -> tuple[Callable, Callable]:
        """What `_stopping_between` runs of a block: its attention half and its MLP half."""
        return halves(block)

    def _stopping_between(self, layer: int, attend: Callable, feed: Callable) -> Callable:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            x = hidden_states + attend(hidden_states, *args, **kwargs)
            x = self._reduce(Site(layer, between=True), x)
            if self.ragged is not None:
                self.ragged.count(2 * layer + 1, x)
            return x + feed(x)

        return forward

    def _blend(self, layer: int) -> tuple[float, float] | None:
        """(a, b) where block `layer` makes a·x + b·attention(x) of its input instead of x + attention(x)."""
        return (self.skip_scale, 0.0) if layer in self.skipped else None

    def _blending(self, layer: int, attend: Callable, feed: Callable) -> Callable:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            own, share = self._blend(layer)
            x = own * hidden_states
            if share:
                x = x + share * attend(hidden_states, *args, **kwargs)
            return x + feed(x)

        return forward

    def _seeing(self, attend: Callable, feed: Callable) -> Callable:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            sight, self.sight = self.sight, None
            if sight is None:
                x = hidden_states + attend(hidden_states, *args, **kwargs)
            else:
                x = attend_to(attend, hidden_states, sight, self.parts.shape.prefix, *args, **kwargs)
                x = hidden_states + x if sight.adds else x
            return x + feed(x)

        return forward
