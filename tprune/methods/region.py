"""Methods that prune a block as a whole: they may run it, ask for gradients inside it, and train it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from tprune.methods.weights import WeightBudget, WeightMethod

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from tprune.methods.weight_view import LinearView


class Region(Protocol):
    """One block, in float32, with the calibration sequences at its input (the blocks before it are pruned).

    Attributes:
        sequences: how many calibration sequences there are.
    """

    sequences: int

    def parameters(self) -> list[nn.Parameter]:
        """The parameters that hold prunable matrices."""

    def linears(self, chosen: Tensor | None = None) -> Iterator[tuple[LinearView, WeightBudget]]:
        """Every matrix as it stands, with what it shall lose, in the order in which the block reaches them.

        Their norms are of the inputs that the block as pruned so far gives them.

        Args:
            chosen: int64, the sequences that norms are taken over; all by default.
        """

    def remove(self, linear: LinearView, mask: Tensor) -> None:
        """Set what `mask` [out, in] marks to zero; the last mask of a matrix is its outcome."""

    def gradients(self) -> dict[str, Tensor]:
        """Of every matrix, by its name: the root of the mean over sequences of the squared gradient of the norm of the
        block's output, float32 [out, in]."""

    def outputs(self) -> Tensor:
        """What the block as it stands makes of all sequences, float32 [N, L, D]."""

    def approach(self, target: Tensor, chosen: Tensor, optimiser: torch.optim.Optimizer) -> None:
        """One step for each of the sequences `chosen`, in turn, against the summed squared distance from `target`."""


@dataclass(frozen=True)
class RegionMethod(WeightMethod):
    """A method of scope "block" that is asked once per block."""

    def prune_block(self, region: Region, generator: torch.Generator) -> None:
        """Prune the block and, if need be, change what is left."""
        raise NotImplementedError
