"""A loaded model with what it needs to be fed and saved again."""

from __future__ import annotations

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
