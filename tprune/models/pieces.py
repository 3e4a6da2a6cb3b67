"""A block's feed-forward network on some of its tokens after the other, which no other token has a part in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from tprune.models.blocks import CHANNELS, is_linear, part_of
from tprune.models.inputs import LastInput, piece
from tprune.models.replaced import replaced

TOKENS_IN_PIECE = 128
"""A feed-forward network's inner tensors are several times as wide as its input. A product of so many rows takes 14%
longer than one of 512, since it reads the weights as often; of 256, 4%."""


@contextmanager
def in_pieces(block: nn.Module) -> Iterator[None]:
    """Inside, the block's feed-forward network takes at most `TOKENS_IN_PIECE` of every sequence at once; twice as
    many where it can do with fewer inner tensors.

    A block with experts, or without a module of its own for the network (OPT), stays as it is. `LastInput` is passed
    on when all tokens have come to it.
    """
    network = _network(block)
    if network is None:
        yield
        return
    whole, lean = network.forward, _lean(network)
    size, part = (TOKENS_IN_PIECE, whole) if lean is None else (2 * TOKENS_IN_PIECE, lean)

    def forward(x: Tensor, *others: Any, **named: Any) -> Any:
        if others or named or x.dim() != 3:
            return whole(x, *others, **named)
        done, pieces = [], x.split(size, dim=1)
        for place, one in enumerate(pieces, 1):
            with piece(more=place < len(pieces)), suppress(LastInput):
                done.append(part(one))
        if not done:
            raise LastInput
        return torch.cat(done, dim=1) if len(done) > 1 else done[0]

    with replaced(network, forward):
        yield


@torch.no_grad()
def _lean(network: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """What a network of gate, up and down projection computes, with two inner tensors instead of three at a time.

    For use without gradients: the product is made in place. None where the network computes something else, which
    two tokens show, one so large that an inner tensor with limits (DeepSeek V4's) reaches them.
    """
    names = ("gate_proj", "act_fn", "up_proj", "down_proj")
    if not all(isinstance(getattr(network, name, None), nn.Module) for name in names):
        return None

    def forward(x: Tensor) -> Tensor:
        inner = network.act_fn(network.gate_proj(x))
        inner *= network.up_proj(x)
        return network.down_proj(inner)

    weight = network.gate_proj.weight
    token = torch.linspace(-1, 1, weight.shape[1], dtype=weight.dtype, device=weight.device)
    tokens = torch.stack([token, 1000 * token]).unsqueeze(0)
    out = network(tokens)
    return forward if isinstance(out, Tensor) and torch.equal(forward(tokens), out) else None


def _network(block: nn.Module) -> nn.Module | None:
    """The submodule that holds the dense projections of the feed-forward network and nothing else of the block."""
    for name, feeds, reader in CHANNELS:
        found = part_of(block, name) if name else None
        if found is not None and all(
            (part := part_of(found, linear)) is not None and is_linear(part) for linear in (*feeds, reader)
        ):
            return found
    return None
