"""A model whose matrices are masked by scores that are trained with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tprune.core.relax import masked_weight
from tprune.models.matrix import Matrix


class Scored(nn.Module):
    """What stands between a parameter and its layer: a score for every weight, and which weights are kept.

    Attributes:
        score: float32, of the parameter's shape, 0 at the start.
        kept: bool, of the same shape.
    """

    def __init__(self, parameter: Tensor):
        super().__init__()
        self.score = nn.Parameter(torch.zeros_like(parameter, dtype=torch.float32))
        self.register_buffer("kept", torch.ones_like(parameter, dtype=torch.bool), persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that the layer sees."""
        return masked_weight(weight, self.score, self.kept)


class Scores:
    """The scores of all matrices of a model.

    Attributes:
        matrices: in order.
        parts: by the name of the parameter that holds a matrix.
    """

    def __init__(self, matrices: Sequence[Matrix], parts: dict[str, Scored]):
        self.matrices, self.parts = matrices, parts

    def values(self) -> list[Tensor]:
        """float32 [out, in] of every matrix, with a gradient."""
        return [matrix.cut(self.parts[matrix.parameter_name].score) for matrix in self.matrices]

    @torch.no_grad()
    def mask(self, removed: Sequence[Tensor]) -> None:
        """Mask what bool [out, in] marks in every matrix, and nothing else."""
        for part in self.parts.values():
            part.kept.fill_(True)
        for matrix, gone in zip(self.matrices, removed, strict=True):
            matrix.remove(gone, self.parts[matrix.parameter_name].kept)

    def masks(self) -> list[Tensor]:
        """What is masked now, bool [out, in] of every matrix."""
        return [~matrix.cut(self.parts[matrix.parameter_name].kept) for matrix in self.matrices]


@contextmanager
def scored(model: nn.Module, matrices: Sequence[Matrix]) -> Iterator[Scores]:
    """Scores for `matrices` of `model`, which in here runs with what they keep; its parameters are as trained after."""
    held = {matrix.parameter_name: matrix.parameter for matrix in matrices}
    parts = {name: Scored(parameter) for name, parameter in held.items()}
    owners = {
        name: (model.get_submodule(path), last) for name in held for path, _, last in [name.rpartition(".")]
    }
    for name, (module, last) in owners.items():
        parametrize.register_parametrization(module, last, parts[name])
    try:
        yield Scores(matrices, parts)
    finally:
        for module, last in owners.values():
            parametrize.remove_parametrizations(module, last, leave_parametrized=False)
