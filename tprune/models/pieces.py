"""A block's feed-forward network on some of its tokens after the other, which no other token has a part in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from tprune.models.blocks import CHANNELS, is_linear, part_of
from tprune.models.inputs import LastInput

TOKENS_IN_PIECE = 128
"""A feed-forward network's inner tensors are several times as wide as its input; a product of so many rows costs a few
percent more than one of all."""


@contextmanager
def in_pieces(block: nn.Module) -> Iterator[None]:
    """Inside, the block's feed-forward network takes at most `TOKENS_IN_PIECE` of every sequence at once.

    A block with experts, or without a module of its own for the network (OPT), stays as it is. `LastInput` is passed
    on when all tokens have come to it.
    """
    network = _network(block)
    if network is None:
        yield
        return
    whole = network.forward

    def forward(x: Tensor, *others: Any, **named: Any) -> Any:
        if others or named or x.dim() != 3:
            return whole(x, *others, **named)
        done = []
        for piece in x.split(TOKENS_IN_PIECE, dim=1):
            with suppress(LastInput):
                done.append(whole(piece))
        if not done:
            raise LastInput
        return torch.cat(done, dim=1) if len(done) > 1 else done[0]

    network.forward = forward
    try:
        yield
    finally:
        del network.forward


def _network(block: nn.Module) -> nn.Module | None:
    """The submodule that holds the dense projections of the feed-forward network and nothing else of the block."""
    for name, feeds, reader in CHANNELS:
        found = part_of(block, name) if name else None
        if found is not None and all(
            (part := part_of(found, linear)) is not None and is_linear(part) for linear in (*feeds, reader)
        ):
            return found
    return None
