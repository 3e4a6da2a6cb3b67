"""Rows of a prompt pass whole decoder layers by, and what is generated behind them does too.

Where all rows pass a layer by it does not run, and its cache stays empty. Where some do it runs, and those go on with
what it was given. A layer whose cache says how long the sequence is always runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import wraps
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from tprune.core.budget import Stage
from tprune.models.replaced import replaced
from tprune.models.run import Run


def passed(plans: Sequence[Sequence[Stage]]) -> Tensor:
    """How many layers each row passes by, int64 [B], of the rows' stages."""
    return torch.tensor([sum(stage.skips and not stage.site.between for stage in plan) for plan in plans])


class Passing:
    """Lets rows pass layers by, until `remove`.

    Args:
        core, layers: the decoder and its layers.
        current: the run that goes on, if any.
    """

    def __init__(self, core: nn.Module, layers: Sequence[nn.Module], current: Callable[[], Run | None]):
        self.current = current
        kinds = getattr(core.config, "layer_types", None) or ["full"] * len(layers)
        # transformers counts positions, and sizes the masks of each kind of layer, by the first of the kind.
        self.counting = {kinds.index(kind) for kind in kinds}
        self.alone = True
        self.undo = ExitStack()
        for place, layer in enumerate(layers):
            # A hook cannot keep a module from running.
            self.undo.enter_context(replaced(layer, self._passable(place, layer.forward)))

    def remove(self) -> None:
        """Give all layers back what they had."""
        self.undo.close()

    def _passable(self, place: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A layer's `forward`, where rows may pass it by."""
        first = next(iter(signature(forward).parameters))

        @wraps(forward)
        def passable(*args: Any, **kwargs: Any) -> Any:
            off, every = self._rows(place)
            hidden = args[0] if args else kwargs[first]
            if every:
                return hidden if self.alone else (hidden,)
            output = forward(*args, **kwargs)
            self.alone = not isinstance(output, tuple)
            if off is None:
                return output
            through, *more = [output] if self.alone else output
            through = torch.where(off[:, None, None], hidden, through)
            return through if self.alone else (through, *more)

        return passable

    def _rows(self, place: int) -> tuple[Tensor | None, bool]:
        """Which rows pass a layer by, bool [B], None where none does; and whether the layer need not run."""
        run = self.current()
        if run is None:
            return None, False
        if "passes" in run.memory:
            passes = run.memory.pop("passes")
            every, some = torch.stack([passes.all(0), passes.any(0)]).tolist()
            run.track.passes = {
                layer: (passes[:, layer], every[layer] and layer not in self.counting)
                for layer in range(passes.shape[1])
                if some[layer]
            }
        return run.track.passes.get(place, (None, False))
