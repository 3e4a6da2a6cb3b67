"""One prunable matrix of a model, wherever its weights are held."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(eq=False)
class Matrix:
    """One prunable matrix in the model.

    Attributes:
        name: its full name, with a suffix for a part of a fused or stacked parameter.
        block: index of its block.
        parameter: the parameter that holds it, and `parameter_name` its name in the model.
        input: whose statistics belong to it: the name of its module, with a suffix for experts.
        expert: index into a 3-D parameter, or None.
        transposed: whether the parameter is stored [in, out].
        rows: its output rows in the parameter, int64, ascending; None for all.
        reader: of a matrix that feeds the channels of an MLP, the `input` of the one that reads them; else None.
        module: the linear layer that holds it; None for experts.
    """

    name: str
    block: int
    parameter: nn.Parameter
    parameter_name: str
    input: str
    expert: int | None = None
    transposed: bool = False
    rows: Tensor | None = None
    reader: str | None = None
    module: nn.Module | None = None

    def _view(self, held: Tensor | None = None) -> Tensor:
        """The parameter, or a tensor of its shape, as [all rows, in], sharing its memory."""
        held = self.parameter.data if held is None else held
        data = held if self.expert is None else held[self.expert]
        return data.t() if self.transposed else data

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        rows, width = self.parameter.shape[-2:]
        if self.transposed:
            rows, width = width, rows
        return (rows if self.rows is None else len(self.rows)), width

    def read(self) -> Tensor:
        """A float32 copy [out, in]."""
        view = self._view() if self.rows is None else self._view()[self.rows]
        return torch.empty(view.shape, device=view.device).copy_(view)

    def cut(self, held: Tensor) -> Tensor:
        """The part [out, in] of a tensor of the parameter's shape that belongs to the matrix."""
        view = self._view(held)
        return view if self.rows is None else view[self.rows]

    def write(self, weight: Tensor) -> None:
        """Put `weight` [out, in] in its place, in the parameter's own dtype."""
        view = self._view()
        if self.rows is None:
            view.copy_(weight)
        else:
            view[self.rows] = weight.to(view.dtype)

    def remove(self, mask: Tensor, held: Tensor | None = None) -> None:
        """Set what `mask` [out, in] marks to zero, here or in a tensor of the parameter's shape; the rest stays."""
        view = self._view(held)
        if self.rows is None:
            _clear(view, mask)
        else:
            view[self.rows] = _clear(view[self.rows], mask)


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _clear(tensor: Tensor, mask: Tensor) -> Tensor:
    """Set what `mask` marks to zero, in place: a product of its bits, which on a CPU is seven times `masked_fill_`."""
    tensor.view(_BITS[tensor.element_size()]).mul_(~mask)
    return tensor
