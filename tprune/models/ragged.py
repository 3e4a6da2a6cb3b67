"""Images that keep different numbers of tokens: fillers at the end of rows are hidden, real tokens counted."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tprune.core.reduction import Reduction
from tprune.errors import UserError


class Ragged:
    """Which tokens of a batch are real, and how many of them entered every sublayer so far.

    Args:
        depth: number of blocks.
        prefix: leading tokens that are not counted.

    Attributes:
        real: bool [B, K], False for fillers; None while there are none.
        images: how many images were counted.
    """

    def __init__(self, depth: int, prefix: int):
        self.depth, self.prefix = depth, prefix
        self.real: Tensor | None = None
        self.reset()

    def reset(self) -> None:
        """Count anew."""
        self.images = 0
        self.sums: list[Tensor | int] = [0] * (2 * self.depth)

    def begin(self, batch: int) -> None:
        """A forward of `batch` images."""
        self.real = None
        self.images += batch

    def follow(self, reduction: Reduction) -> None:
        """What is real after one more reduction."""
        if reduction.valid is not None:
            self.real = reduction.valid
        elif self.real is not None:
            self.real = reduction.gather(self.real)

    def count(self, sublayer: int, x: Tensor) -> None:
        """`x` [B, K, D] enters `sublayer`; the sums stay on their device."""
        tokens = x.shape[0] * x.shape[1] if self.real is None else self.real.sum()
        self.sums[sublayer] = self.sums[sublayer] + tokens - x.shape[0] * self.prefix

    def means(self) -> list[float] | None:
        """Mean real tokens entering every sublayer, without the prefix; None before the first image."""
        if self.images == 0:
            return None
        return [float(total) / self.images for total in self.sums]

    def hide(self, bias: Tensor | None, x: Tensor) -> Tensor | None:
        """A bias on the keys [B, 1, 1, K] that hides fillers from every query, on top of `bias`."""
        if self.real is None:
            return bias
        if bias is None:
            bias = torch.zeros(self.real.shape, dtype=x.dtype, device=x.device)[:, None, None, :]
        return bias.masked_fill(~self.real[:, None, None, :], -torch.inf)


def check_head(model: nn.Module, method: str) -> None:
    """Refuse a model whose head averages over patches, fillers among them.

    Raises:
        UserError: the head reads more than the class token.
    """
    averages = getattr(model, "global_pool", "token") not in ("token", "") or type(model).__name__.startswith(
        "Dinov2"
    )
    if averages and not type(model).__name__.endswith("Model"):
        raise UserError(
            f"{method} keeps different numbers of tokens per image, and the head of this {type(model).__name__} "
            "averages over tokens; use --keep without thresholds, or a model that reads the class token"
        )
