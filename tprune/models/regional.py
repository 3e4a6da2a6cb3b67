"""One block by itself, in float32: run on chosen sequences, with gradients inside it."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from tprune.models.calibrate import Stream
from tprune.models.gradients import asking_for, summing_squares


class BlockStream(Stream):
    """The sequences of a stream before one of its blocks, which is float32 while a `with` lasts.

    Gradients want one sequence at a time, and what is compared with them is computed so too.

    Attributes:
        index: which block.
        matrices: its prunable matrices.
        sequences: how many there are.
    """

    def __init__(self, stream: Stream, index: int):
        self.decoder, self.feed, self.rows = stream.decoder, stream.feed, stream.rows
        self.hidden, self.sequences = stream.hidden.float(), len(stream.hidden)
        self.index, self.matrices = index, stream.decoder.matrices(index)
        self._stream, self._dtypes = stream, {}

    def __enter__(self) -> BlockStream:
        for tensor in self._tensors():
            self._dtypes[tensor] = tensor.dtype
            tensor.data = tensor.data.float()
        return self

    def __exit__(self, *exception: object) -> None:
        for tensor, dtype in self._dtypes.items():
            tensor.data = tensor.data.to(dtype)

    def _tensors(self) -> list[Tensor]:
        block = self.decoder.blocks[self.index]
        return [tensor for tensor in chain(block.parameters(), block.buffers()) if tensor.is_floating_point()]

    def arguments(self, index: int, size: int, first: int = 0) -> tuple[tuple, dict[str, Any]]:
        """What the block is called with, in float32."""
        return _wide(self._stream.arguments(index, size, first))

    def _one(self, place: int) -> Tensor:
        """What the block makes of one sequence, float32 [1, L, D]."""
        return self.run(self.index, self._cut(self.hidden, place), place)

    def _cut(self, values: Tensor, place: int) -> Tensor:
        """One sequence of [N, L, D], as long as it is: [1, l, D]."""
        return values[place : place + 1, : self.feed.lengths[place]]

    def parameters(self) -> list[nn.Parameter]:
        """The parameters that hold prunable matrices."""
        return list({matrix.parameter_name: matrix.parameter for matrix in self.matrices}.values())

    @torch.no_grad()
    def outputs(self) -> Tensor:
        """What the block makes of all sequences, float32 [N, L, D]."""
        found = torch.zeros_like(self.hidden)
        for place in range(self.sequences):
            self._cut(found, place).copy_(self._one(place))
        return found

    def gradients(self) -> dict[str, Tensor]:
        """sqrt(mean over sequences of the squared gradient of ‖output‖), float32 [out, in] by matrix."""
        held = {matrix.parameter_name: matrix.parameter for matrix in self.matrices}
        with summing_squares(self.decoder.blocks[self.index], held, self.hidden.device) as sums:
            for place in range(self.sequences):
                with torch.enable_grad():
                    torch.linalg.vector_norm(self._one(place)).backward()
        for total in sums.values():
            total.div_(self.sequences).sqrt_()
        return {matrix.name: matrix.cut(sums[matrix.parameter_name]) for matrix in self.matrices}

    def approach(self, target: Tensor, chosen: Tensor, optimiser: torch.optim.Optimizer) -> None:
        """One step for each of the sequences `chosen`, in turn, against Σ (output - target)²."""
        with asking_for(self.decoder.blocks[self.index], self.parameters()):
            for place in chosen.tolist():
                with torch.enable_grad():
                    (self._one(place) - self._cut(target, place)).square().sum().backward()
                optimiser.step()
                optimiser.zero_grad()


def _wide(value: Any) -> Any:
    """The value with all tensors of floating point in it as float32."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: _wide(part) for name, part in value.items()}
    return tuple(map(_wide, value)) if type(value) is tuple else value
