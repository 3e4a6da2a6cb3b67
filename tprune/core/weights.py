"""What a weight method does, as values: masks and new weights of a matrix, or removed structure."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class WeightEdit:
    """One matrix: which weights are gone, and the new values of the rest where they change.

    Attributes:
        mask: bool [out, in], True where the weight is removed.
        weight: float32 [out, in], zero under the mask; None keeps the surviving weights as they are.
        around: blocks of A [out / b, b, b] and B [in / b, b, b], where the layer becomes A W B; the b may differ.
    """

    mask: Tensor
    weight: Tensor | None = None
    around: tuple[Tensor, Tensor] | None = None


HALVES = ("attention", "mlp")
"""What a decoder block is made of, each half with its norms."""
HALF_OF = {"channels": "mlp", "heads": "attention", "experts": "mlp"}
"""Which half the units of a kind are in."""


@dataclass(frozen=True)
class Shared:
    """How a block borrows another's weights.

    Attributes:
        base: the other block.
        rank: of the difference that it adds to each matrix.
        scale: of what its attention and its MLP add to the residual stream, normalised; None: as it comes.
    """

    base: int
    rank: int
    scale: float | None


@dataclass(frozen=True, eq=False)
class StructureEdit:
    """Structure taken out of one block.

    Attributes:
        block: index of the block.
        removed: the whole block goes.
        halves: which of its `HALVES` go.
        keep: per kind of unit ("heads", "channels", "experts"), the ascending indices of the units that stay.
        bias: per kind, float32 [out], what the output projection adds from now on.
        weight: per kind new weights of what stays: of the output projection float32 [out, in]; of experts their
            neurons [E, m, 3 D] (rows of gate and up, column of down), in the model's dtype.
        shared: from whom it borrows all its matrices, instead of having its own.
    """

    block: int
    removed: bool = False
    halves: tuple[str, ...] = ()
    keep: dict[str, Tensor] = field(default_factory=dict)
    bias: dict[str, Tensor] = field(default_factory=dict)
    weight: dict[str, Tensor] = field(default_factory=dict)
    shared: Shared | None = None

    @property
    def gone(self) -> tuple[str, ...]:
        """The halves that go, both where the block does."""
        return HALVES if self.removed else self.halves


def pack_bits(mask: Tensor) -> Tensor:
    """A bool tensor of any shape as uint8 [ceil(numel / 8)] on the CPU, the first entry in the lowest bit."""
    return torch.from_numpy(np.packbits(mask.detach().cpu().flatten().numpy(), bitorder="little"))


def unpack_bits(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The bool tensor of `shape` that `pack_bits` made `packed` of, on the device of `packed`."""
    bits = np.unpackbits(packed.cpu().numpy(), count=math.prod(shape), bitorder="little")
    return torch.from_numpy(bits).view(torch.bool).view(shape).to(packed.device)
