"""What blocks are called with beside the hidden states of a prompt, remembered in little room."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tprune.core.weights import pack_bits, unpack_bits

MOST = 8
"""Tensors that others are compared with; a model has few kinds of them (cosines and sines, for every kind of layer)."""


class Bits:
    """A bool tensor, a bit for every entry."""

    def __init__(self, mask: Tensor):
        self.shape, self.device, self.packed = mask.shape, mask.device, pack_bits(mask)

    def unpack(self) -> Tensor:
        """The tensor again."""
        return unpack_bits(self.packed, self.shape).to(self.device)


class Compact:
    """Makes arguments small that many prompts bring: masks become bits; what begins as another's does, as cosines and
    sines of positions do, a part of that one.
    """

    def __init__(self) -> None:
        self._known: list[Tensor] = []

    def small(self, given: Any, done: dict[int, tuple[Any, Any]]) -> Any:
        """Arguments, nested in tuples and dicts, to keep; `done`: those of the same prompt, by identity."""
        if isinstance(given, dict):
            return {name: self.small(one, done) for name, one in given.items()}
        if isinstance(given, tuple):
            return tuple(self.small(one, done) for one in given)
        if not isinstance(given, Tensor):
            return given
        if id(given) not in done:
            kept = Bits(given) if given.dtype == torch.bool else self._part(given)
            done[id(given)] = given, kept
        return done[id(given)][1]

    def _part(self, given: Tensor) -> Tensor:
        """The beginning, along the second axis, of a tensor that is known already, or this one."""
        if given.dim() < 2:
            return given
        for place, known in enumerate(self._known):
            if _kind(known) == _kind(given):
                length = min(known.shape[1], given.shape[1])
                if torch.equal(known[:, :length], given[:, :length]):
                    longest = known if length == given.shape[1] else given
                    self._known[place] = longest
                    return longest[:, : given.shape[1]]
        if len(self._known) < MOST:
            self._known.append(given)
        return given


def whole(kept: Any) -> Any:
    """Arguments as blocks take them, of what `Compact` kept."""
    if isinstance(kept, dict):
        return {name: whole(one) for name, one in kept.items()}
    if isinstance(kept, tuple):
        return tuple(whole(one) for one in kept)
    return kept.unpack() if isinstance(kept, Bits) else kept


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.device, tensor.shape[:1], tensor.shape[2:]
