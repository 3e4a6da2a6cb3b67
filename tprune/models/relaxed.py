"""A vision transformer while a token method is fitted in it: tokens leave, or stay and are marked as absent."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from tprune.core.budget import Site, Stage
from tprune.core.reduction import Reduction
from tprune.core.relax import mask_attention
from tprune.methods.fit import Fit, Relaxed
from tprune.methods.token_view import TokenView
from tprune.methods.tokens import TokenMethod
from tprune.models.anatomy import Anatomy
from tprune.models.vit import TokenDriver


class FitDriver(TokenDriver):
    """Runs a method's `Fit` at its sites until removed.

    Every forward starts with an empty `memory`; its "left" tells what fraction of the tokens each site left, with a
    gradient where they are marked.

    Args:
        parts: the model's anatomy.
        method: whose signals the sites need.
        fit: what happens there.
        seed: as for `TokenDriver`.
    """

    def __init__(self, parts: Anatomy, method: TokenMethod, fit: Fit, seed: int):
        self.fit = fit
        super().__init__(parts, method, [Stage(site, 0) for site in fit.sites], seed)

    def _begin(self, entrance: nn.Module, args: tuple, kwargs: dict) -> None:
        super()._begin(entrance, args, kwargs)
        self.present: Tensor | None = None
        self.memory["left"] = []

    def _blend(self, layer: int) -> tuple[float, float] | None:
        return self.fit.blend(layer)

    def _watched(self) -> set[int]:
        """Any block may have to do without absent tokens."""
        return set(range(self.parts.shape.depth))

    def _watch(self, edited: bool, attention: nn.Module, args: tuple) -> None:
        super()._watch(edited, attention, args)
        if self.present is not None:
            self.watch.edit = partial(
                mask_attention,
                present=self.present,
                epsilon=self.fit.epsilon,
                keep_self=self.fit.keep_self,
            )

    def _view(self, site: Site, x: Tensor) -> TokenView:
        view = super()._view(site, x)
        view.present = self.present
        return view

    def _look(self, view: TokenView) -> None:
        self.fit.finish(view, self.memory)

    def _return(self, x: Tensor) -> Tensor:
        self.memory["left"].append(Stage(self.rejoin, 1.0))
        return super()._return(x)

    def _reduce(self, site: Site, x: Tensor) -> Tensor:
        found, prefix = self.fit.at(site, self._view(site, x), self.memory), self.parts.shape.prefix
        if isinstance(found, Relaxed):
            self.size, self.present = found.size, found.present
            if found.index is not None:
                place = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
                self.position = (place if self.position is None else self.position).gather(1, found.index)
            left, x = found.present[:, prefix:].mean(), found.hidden.to(x.dtype)
        elif isinstance(found, Reduction):
            left, x = (found.count - prefix) / self.parts.shape.tokens, self._apply(site, found, x)
        else:
            left, x = (found.shape[1] - prefix) / self.parts.shape.tokens, found.to(x.dtype)
        self.memory["left"].append(Stage(site, left))
        return x
