"""Vision Mamba: where its parts are, and tokens that leave it between blocks.

Methods see the class token in front; in the sequence it stays in the middle of the patches. What leaves is taken out of
the residual stream too.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from tprune.core.budget import Site
from tprune.core.reduction import Reduction
from tprune.methods.token_view import TokenView
from tprune.methods.tokens import Shape
from tprune.models.anatomy import Anatomy, classes
from tprune.models.relaxed import FitDriver
from tprune.models.vim import Gaps
from tprune.models.vit import TokenDriver


def vim(model: nn.Module) -> Anatomy:
    """The parts of a `VisionMamba`."""
    rows, columns = model.patch_embed.grid_size
    shape = Shape(
        depth=len(model.layers),
        tokens=rows * columns,
        prefix=1,
        has_cls=True,
        grid=(rows, columns),
        width=model.embed_dim,
        classes=classes(model),
        patch=(model.patch_embed.proj.in_channels, *model.patch_embed.patch_size),
        kind="state-space",
    )
    return Anatomy(model.patch_embed, model.layers, [block.mixer for block in model.layers], shape, model)


class StateSpace:
    """Puts a driver between the blocks of a Vim."""

    def _attach(self) -> None:
        self._hook(self.parts.entrance.register_forward_pre_hook(self._begin, with_kwargs=True))
        for layer, block in enumerate(self.parts.blocks):
            self._hook(block.register_forward_pre_hook(partial(self._enter, layer), with_kwargs=True))
            if Site(layer + 1) in self.counts:
                block.mixer.observe = self._see
                self.undo.callback(setattr, block.mixer, "observe", None)

    def _see(self, scanned: Tensor) -> None:
        self.scanned = scanned

    def _enter(self, layer: int, block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        hidden, self.residual = args
        if Site(layer) in self.counts:
            hidden = self._reduce(Site(layer), hidden)
        self.trace.entering.append(hidden.shape[1] - 1)
        if self.position is not None and self.method.decays():
            kwargs = kwargs | {"gaps": gaps(self.position)}
        return (hidden, self.residual), kwargs

    def _view(self, site: Site, x: Tensor) -> TokenView:
        order = in_front(x.shape[1], x.device)
        view = super()._view(site, x[:, order])
        view.position = None if self.position is None else self.position[:, order]
        view.signals["scan"] = lambda: self.scanned[..., order]
        return view

    def _apply(self, site: Site, reduction: Reduction, x: Tensor) -> Tensor:
        given = in_front(x.shape[1], x.device)
        wanted = in_front(reduction.count, x.device).argsort()
        reduction = reduction.reordered(given, wanted)
        self.residual = reduction.apply(self.residual)
        return super()._apply(site, reduction, x)


def in_front(length: int, device: torch.device | str) -> Tensor:
    """The places of a sequence with the class token in the middle, that token's first: int64 [length]."""
    places, middle = torch.arange(length, device=device), (length - 1) // 2
    return torch.cat([places[middle : middle + 1], places[:middle], places[middle + 1 :]])


def gaps(position: Tensor) -> Gaps:
    """How many patches have left just before and just after each token that is left, up to the next.

    The class token stays in the middle of what is left, and need not be where it was among the patches: then it stands
    next to the one that it would be in front of or behind.

    Args:
        position: [B, L], places in the first sequence, the class token's in the middle, patches ascending.
    """
    middle = (position.shape[1] - 1) // 2
    first = position[:, middle : middle + 1]
    place = (position - (position > first).to(position.dtype)).float()
    low, high = place[:, middle - 1 : middle] + 0.5, place[:, middle + 1 : middle + 2] - 0.5
    place = torch.cat([place[:, :middle], (first - 0.5).clamp(low, high), place[:, middle + 1 :]], 1)
    reach = torch.full((position.shape[1],), 0.5, device=position.device)
    reach[middle] = 0
    between = place.diff(dim=1) - (reach[1:] + reach[:-1])
    none = between.new_zeros(len(between), 1)
    return torch.cat([none, between], 1), torch.cat([between, none], 1)


class StateSpaceDriver(StateSpace, TokenDriver):
    """Runs a token method inside a Vim until removed."""


class StateSpaceFitDriver(StateSpace, FitDriver):
    """Runs a method's `Fit` inside a Vim until removed."""
