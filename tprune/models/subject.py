"""A loaded model with what it needs to be fed and saved again."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from torch import nn

from tprune.models.source import Source


@dataclass(eq=False)
class Subject:
    """A model under study.

    Attributes:
        model: in eval mode, on its device.
        processor: what turns samples into inputs: a transform, a tokenizer or a processor.
        source: where it came from.
    """

    model: nn.Module
    processor: Any
    source: Source

    @property
    def device(self) -> Any:
        """Where the first parameter lives."""
        return next(self.model.parameters()).device


def twin(model: nn.Module) -> nn.Module:
    """A second model with the same tensors, to be run unhooked beside the first."""
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, shared)
