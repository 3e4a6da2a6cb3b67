"""Fine-tuning of a model that weights were pruned from: what is zero stays zero."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback

from tprune.models.masks import matched, remove
from tprune.models.matrix import Matrix


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
        self._held = matched(model, self.masks)
        remove(self._held)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """After a step: what moved away from zero goes back."""
        remove(self._held)
