"""What stands in for a model's blocks while the rest of it runs: to note what they are given, or to answer for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import Tensor

from tprune.models.blocks import Decoder
from tprune.models.replaced import replaced


def noting(
    decoder: Decoder, parts: list[Tensor], arguments: dict[tuple[int, int], tuple[tuple, dict[str, Any]]]
) -> AbstractContextManager[None]:
    """Every block answers with its own input and notes what it was called with, by its index and the batch size.

    Sequences that are alike have the same length and no padding, so the arguments depend on the size alone.
    """

    def stand_in(index: int) -> Callable[..., Tensor]:
        def forward(hidden_states: Tensor, *positional: Any, **named: Any) -> Tensor:
            arguments[index, hidden_states.shape[0]] = positional, named
            if index == 0:
                parts.append(hidden_states)
            return hidden_states

        return forward

    return standing_in(decoder, stand_in)


def answering(decoder: Decoder, hidden: Tensor) -> AbstractContextManager[None]:
    """Whatever goes in, `hidden` [B, L, D] leaves the last block: what follows up to the logits is the model's own."""
    return standing_in(decoder, lambda index: lambda *positional, **named: hidden)


@contextmanager
def standing_in(decoder: Decoder, stand_in: Callable[[int], Callable[..., Tensor]]) -> Iterator[None]:
    """Block i runs `stand_in(i)` instead of its own forward."""
    with ExitStack() as stack:
        for index, block in enumerate(decoder.blocks):
            stack.enter_context(replaced(block, stand_in(index)))
        yield
