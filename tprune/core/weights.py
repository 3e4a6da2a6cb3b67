"""What a weight method does, as values: masks and new weights of a matrix, or removed structure."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, eq=False)
class WeightEdit:
    """One matrix: which weights are gone, and the new values of the rest where they change.

    Attributes:
        mask: bool [out, in], True where the weight is removed.
        weight: float32 [out, in], zero under the mask; None keeps the surviving weights as they are.
    """

    mask: Tensor
    weight: Tensor | None = None


@dataclass(frozen=True, eq=False)
class StructureEdit:
    """Structure taken out of one block.

    Attributes:
        block: index of the block.
        removed: the whole block goes.
        keep: per kind of unit ("heads", "channels"), the ascending indices of the units that stay.
        bias: per kind, float32 [out], what the output projection adds from now on.
    """

    block: int
    removed: bool = False
    keep: dict[str, Tensor] = field(default_factory=dict)
    bias: dict[str, Tensor] = field(default_factory=dict)
