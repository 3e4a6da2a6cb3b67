"""What a method is fitted in and learns from: the one thing that differs from family to family in a fit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tprune.methods.base import Method
from tprune.methods.cache import CacheShape
from tprune.methods.fit import Fit
from tprune.methods.tokens import Shape
from tprune.pipelines.fit_loop import Batches


class Course(ABC):
    """A model and its training data.

    Attributes:
        model: whole.
        shape: what the method may know of it.
        data: what every step draws from: `len()`, `protocol`.
        labelled: whether its labels fit the model; if not, the dense model's outputs take their place.
        unit: what the data consists of.
    """

    model: nn.Module
    shape: Shape | CacheShape
    data: Any
    labelled: bool
    unit: str = "images"

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def admit(self, method: Method) -> None:  # noqa: B027  (most have nothing to refuse)
        """Refuse a method, as it will run once it is fitted, that the model cannot run.

        Raises:
            UserError: why.
        """

    def tuned(self, tunes: str) -> list[nn.Parameter]:
        """The model's own weights that learn with a fit which `tunes` this of it."""
        return list(self.model.parameters()) if tunes == "all" else []

    @abstractmethod
    def lessons(self, size: int, seed: int, share: tuple[int, int] = (0, 1)) -> Batches:
        """The training data in steps of `size`, with what is learned from it."""

    @abstractmethod
    def samples(self, size: int, seed: int) -> Batches:
        """The same without what is learned from it, for measurements."""

    @abstractmethod
    def outputs(self, inputs: Any) -> Tensor:
        """What the loss sees of the model: logits [n, C]."""

    @abstractmethod
    def driver(self, method: Method, fit: Fit, seed: int) -> Any:
        """`fit` put into the model: `memory` of the last forward, `away()` without it, `remove()`."""

    def measured(self, method: Method, batches: Sequence[Any], seed: int) -> float:
        """The mean fraction of tokens that enter a sublayer with this fitted method, over some inputs.

        Asked only where counts vary from input to input.
        """
        raise NotImplementedError
