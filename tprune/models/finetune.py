"""Fine-tuning of a model that weights were pruned from: what is zero stays zero."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from tprune.core.weights import unpack_bits
from tprune.errors import UserError
from tprune.models.blocks import Matrix, find_decoder
from tprune.models.masks import MASK


class KeepZeros(TrainerCallback):
    """For transformers' `Trainer`: sets what was pruned to zero after every step of the optimiser.

    Attributes:
        masks: packed masks by the name of the matrix.
    """

    def __init__(self, masks: Mapping[str, Tensor]):
        self.masks = dict(masks)
        self._held: list[tuple[Matrix, Tensor]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **given: Any) -> None:
        """Find the matrices.

        Raises:
            UserError: the masks are of another model, or its weights are not whole in this process.
        """
        decoder = find_decoder(model)
        blocks = range(len(decoder.blocks))
        matrices = {matrix.name: matrix for index in blocks for matrix in decoder.matrices(index)}
        self._held = []
        for name, packed in self.masks.items():
            matrix = matrices.get(name)
            if matrix is None or (matrix.shape[0] * matrix.shape[1] + 7) // 8 != len(packed):
                raise UserError(
                    f"the mask of {name} does not fit this model; train the model that it belongs to, unsharded"
                )
            mask = unpack_bits(packed.to(matrix.parameter.device), matrix.shape)
            self._held.append((matrix, mask))
        self._remove()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """After a step: what moved away from zero goes back."""
        self._remove()

    @torch.no_grad()
    def _remove(self) -> None:
        for matrix, mask in self._held:
            matrix.remove(mask)


def masks_of(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The packed masks among stored tensors (of several stages, too), by the name of the matrix.

    Raises:
        UserError: there are none.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        stage, mark, matrix = name.rpartition(MASK)
        if mark and (not stage or stage.rstrip(".").isdigit()):
            found[matrix] = found[matrix] | tensor if matrix in found else tensor
    if not found:
        raise UserError(
            f"{where} has no masks: none are stored with --loadable plain, and methods that remove structure have none"
        )
    return found
