"""Methods whose norms are over tokens that they choose, for every matrix others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tprune.methods.weights import WeightMethod

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SelectiveMethod(WeightMethod):
    """A method of scope "block" that is asked which calibration tokens a matrix's norms are over."""

    stats = ("norm",)

    def select(self, outputs: Tensor, attention: Tensor, visual: Tensor | None) -> Tensor:
        """Which tokens count, bool [B, L].

        Args:
            outputs: [B, L, R], what the matrix makes of every token.
            attention: float32 [B, L], what the block's last query pays to each, the mean over heads.
            visual: bool [B, L], which show images; None where all are text.
        """
        raise NotImplementedError
