"""What pruning weights amounts to: the handle of an edit in place, and the report's rows."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tprune.core.weights import HALF_OF, HALVES, StructureEdit
from tprune.errors import UserError
from tprune.methods.weight_view import ModelView
from tprune.models import masks, shared
from tprune.models.blocks import Decoder
from tprune.models.pages import at_hand
from tprune.pipelines.base import Achieved, Handle
from tprune.pipelines.stream import grouped_axis


class WeightHandle(Handle):
    """Weights edited in place.

    Attributes:
        kind: the artifact it makes.
        found: the budget as it came out.
        rows: per block.
        edits: all edits as tensors, enough to make them again on the dense model.
        beside: what is stored beside the edited weights.
    """

    def __init__(
        self,
        kind: str,
        found: Achieved,
        rows: list[dict[str, Any]],
        edits: dict[str, Tensor],
        beside: dict[str, Tensor],
    ):
        self.kind, self.found, self.rows, self.edits, self.beside = kind, found, rows, edits, beside

    def remove(self) -> None:
        """Refused: what is gone is gone.

        Raises:
            UserError: always.
        """
        raise UserError("weights are edited in place and cannot be restored; load the model again")

    def __exit__(self, *exception: object) -> None:
        """Leaving a `with` block keeps the edit."""

    def achieved(self) -> Achieved:
        """The fraction of the prunable weights that was removed."""
        return self.found

    def per_layer(self) -> list[dict[str, Any]]:
        """What was removed in each block."""
        return self.rows

    def tensors(self, by_reference: bool) -> dict[str, Tensor]:
        """The masks beside the weights, or all edits where the weights are only named."""
        return self.edits if by_reference else self.beside


def mask_row(decoder: Decoder, index: int, edits: dict[str, Tensor]) -> dict[str, Any]:
    """The report's row of a block pruned by masks."""
    matrices = decoder.matrices(index)
    weights = sum(matrix.shape[0] * matrix.shape[1] for matrix in matrices)
    gone = sum(masks.removed(edits, matrix) for matrix in matrices)
    return {
        "block": index,
        "matrices": len(matrices),
        "weights": weights,
        "removed": gone,
        "sparsity": gone / max(weights, 1),
    }


def pattern_share(decoder: Decoder, pattern: tuple[int, int], groups_outputs: bool) -> float:
    """The fraction of groups of m weights with at most n left; 1 where the pattern holds."""
    good = total = 0
    for index in range(len(decoder.blocks)):
        with at_hand(decoder, index):
            for matrix in decoder.matrices(index):
                axis = grouped_axis(matrix, groups_outputs)
                left = (matrix.read().unflatten(axis, (-1, pattern[1])) != 0).sum(axis + 1)
                good, total = good + int((left <= pattern[0]).sum()), total + left.numel()
    return good / total


def sizes(decoder: Decoder) -> list[int]:
    """Prunable weights of every block."""
    return [
        sum(matrix.shape[0] * matrix.shape[1] for matrix in decoder.matrices(index)) + shared.size(block)
        for index, block in enumerate(decoder.blocks)
    ]


def structure_rows(edits: list[StructureEdit], view: ModelView, after: list[int]) -> list[dict[str, Any]]:
    """The report's rows of blocks that lost structure."""
    by_block = {edit.block: edit for edit in edits}
    apart = any(edit.halves for edit in edits)
    sizes = iter(after)
    rows = []
    for block in view.blocks:
        edit = by_block.get(block.index, StructureEdit(block.index))
        row: dict[str, Any] = {"block": block.index}
        if block.similarity is not None and not block.removable():
            row["influence"] = 1 - block.similarity
        if block.contrast is not None:
            row["loss"] = block.contrast
        for kind, unit in block.removable().items():
            kept = len(edit.keep[kind]) if kind in edit.keep else unit.count
            row[kind] = f"{0 if HALF_OF[kind] in edit.gone else kept} of {unit.count}"
        if apart:
            row |= {half: "gone" if half in edit.gone else "stays" for half in HALVES}
        left = 0 if edit.removed else next(sizes)
        rows.append(row | {"weights": block.parameters, "sparsity": 1 - left / block.parameters})
    return rows
