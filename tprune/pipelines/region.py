"""One block as a method of regions sees it, and what became of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from tprune.core.statistics import Inputs
from tprune.core.weights import WeightEdit
from tprune.methods.weight_view import LinearView
from tprune.methods.weights import WeightBudget
from tprune.models.calibrate import Stream
from tprune.models.matrix import Matrix
from tprune.models.regional import BlockStream

View = Callable[[Matrix, dict[str, Inputs]], tuple[LinearView, WeightBudget]]
"""A matrix with the statistics of its inputs, and what it shall lose."""


class LiveRegion(BlockStream):
    """A block with its matrices in the order in which they are reached (`methods.region.Region`)."""

    def __init__(self, stream: Stream, index: int, view: View):
        super().__init__(stream, index)
        self._view = view
        self._masks: dict[str, Tensor] = {}

    def linears(self, chosen: Tensor | None = None) -> Iterator[tuple[LinearView, WeightBudget]]:
        """Every matrix and its budget; statistics are gathered anew for those that read the same."""
        for matrices in self._in_order():
            modules = sorted({matrix.parameter_name.rpartition(".")[0] for matrix in matrices})
            inputs = self.gather(self.index, ("norm",), modules, chosen)
            for matrix in matrices:
                yield self._view(matrix, inputs)

    def _in_order(self) -> list[list[Matrix]]:
        """The matrices of the block, those with the same inputs together."""
        seen = self.gather(self.index, ("norm",), None, torch.zeros(1, dtype=torch.int64))
        groups: dict[object, list[Matrix]] = {}
        for matrix in self.matrices:
            stage = (matrix.parameter_name.rpartition(".")[0], matrix.input.rpartition(".")[2])
            place = seen[matrix.input] if matrix.expert is None else stage
            groups.setdefault(place, []).append(matrix)
        return list(groups.values())

    def remove(self, linear: LinearView, mask: Tensor) -> None:
        """Set what `mask` [out, in] marks to zero."""
        next(matrix for matrix in self.matrices if matrix.name == linear.name).remove(mask)
        self._masks[linear.name] = mask

    def edits(self) -> Iterator[tuple[Matrix, WeightEdit]]:
        """What became of every matrix."""
        for matrix in self.matrices:
            yield matrix, WeightEdit(self._masks[matrix.name], matrix.read())
