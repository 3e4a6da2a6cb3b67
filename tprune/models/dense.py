"""Full-length features from a shortened sequence, for heads that read every patch."""

from __future__ import annotations

import torch
from torch import Tensor

from tprune.core.reduction import Reduction, gather_tokens, restore


class Canvas:
    """The whole sequence, while only part of it is processed.

    Blocks receive the tokens that are left and give back full-length outputs: a merged token's value stands at the
    places of all it was made of, a dropped token keeps the last value it had (`Reduction.restore`).
    """

    def __init__(self) -> None:
        self.full: Tensor | None = None
        self.short: Tensor | None = None
        self.owner: Tensor | None = None

    def enter(self, x: Tensor, position: Tensor | None) -> Tensor:
        """What a block processes, [B, K, D], of the full-length output `x` [B, N, D] of the block before.

        `position` [B, K] names the token that stands for each slot (None: nothing has left). It is read only where
        something between the blocks has touched `x`; else what left the last block comes back as it was.
        """
        if position is None:
            return x
        return self.short if x is self.full else gather_tokens(x, position)

    def follow(self, reduction: Reduction, x: Tensor) -> None:
        """Before `reduction` is applied to `x` [B, K, D]: dropped tokens keep the value they have now."""
        if self.owner is None:
            self.full, self.owner = x, torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        else:
            self.full = restore(x, self.owner, self.full)
        left = reduction.owner().gather(1, self.owner.clamp_min(0))
        self.owner = torch.where(self.owner < 0, -1, left)

    def leave(self, y: Tensor) -> Tensor:
        """A block's output at full length, [B, K, D] -> [B, N, D]."""
        if self.owner is None:
            return y
        self.short, self.full = y, restore(y, self.owner, self.full)
        return self.full
