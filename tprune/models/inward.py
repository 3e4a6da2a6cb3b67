"""Sequences that end with tokens that are never pruned, shown to methods with all such tokens in front."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tprune.core.reduction import Reduction
from tprune.methods.attention import Attention


@dataclass(frozen=True)
class Inward:
    """Between the order [prefix, patches, suffix] of a model and the order [prefix, suffix, patches] of a view.

    Only what a method sees is in another order. The model keeps its own, so that nothing changes where nothing
    leaves; without a suffix both are the same, and nothing is copied.

    Attributes:
        prefix: tokens that are never pruned, those of the suffix among them.
        suffix: how many of these come last in the model.
        length: N, of the sequence.
    """

    prefix: int
    suffix: int
    length: int

    def order(self, device: torch.device | str) -> Tensor:
        """The place in the model of every token of the view, int64 [N]."""
        place, head = torch.arange(self.length, device=device), self.prefix - self.suffix
        tail = self.length - self.suffix
        return torch.cat([place[:head], place[tail:], place[head:tail]])

    def shown(self, x: Tensor | None) -> Tensor | None:
        """What belongs to tokens, [B, N, ...], in the order of the view."""
        return x if x is None or self.suffix == 0 else x[:, self.order(x.device)]

    def places(self, position: Tensor | None) -> Tensor | None:
        """The tokens' places in the model's first sequence [B, N], as places in the view's first sequence."""
        if position is None or self.suffix == 0:
            return position
        patches = self.shown(position)[:, self.prefix :] + self.suffix
        head = torch.arange(self.prefix, device=position.device).expand(len(position), -1)
        return torch.cat([head, patches], dim=1)

    def attention(self, seen: Attention | None) -> Attention | None:
        """The attention of a block, its queries and keys in the order of the view."""
        if seen is None or self.suffix == 0:
            return seen
        order = self.order(seen.query.device)
        bias, edited, output = seen.bias, seen.map, seen.output
        return replace(
            seen,
            query=seen.query[:, :, order],
            key=seen.key[:, :, order],
            value=seen.value[:, :, order],
            bias=None if bias is None else bias[..., order],
            map=None if edited is None else edited[:, :, order][..., order],
            output=None if output is None else output[:, :, order],
        )

    def outward(self, reduction: Reduction, device: torch.device | str) -> Reduction:
        """What a method makes of the view, as what happens to the model's sequence."""
        if self.suffix == 0:
            return reduction
        slot, head = torch.arange(reduction.count, device=device), self.prefix - self.suffix
        wanted = torch.cat([slot[:head], slot[self.prefix :], slot[head : self.prefix]])
        return reduction.reordered(self.order(device), wanted)
