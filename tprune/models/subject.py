"""A loaded model with what it needs to be fed and saved again."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from tprune.models.source import Source

if TYPE_CHECKING:
    from tprune.models.pages import Pages


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


def pages_of(model: nn.Module) -> Pages | None:
    """What reads a model's blocks from disk when they run; None where they are all in memory."""
    return getattr(model, "tprune_pages", None)


def named_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A model's parameters with their names, in memory while it is their turn, or `InFile`."""
    pages = pages_of(model)
    return model.named_parameters() if pages is None else pages.parameters()
