"""Activations that do not fit into memory: in a file, read and written a few sequences at a time."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from tprune.models.memory import as_bytes


class Spilled:
    """Hidden states [N, L, D] in a file without a name, gone with the object; not mapped, so that no size is too much.

    Args:
        folder: where the file is.
        shape: (N, L, D).
        dtype, device: of what is read.
    """

    def __init__(self, folder: Path, shape: torch.Size, dtype: torch.dtype, device: torch.device):
        self.shape, self.dtype, self.device = shape, dtype, device
        self._bytes = math.prod(shape[1:]) * dtype.itemsize
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115  (it lives as long as this does)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, chosen: Tensor) -> Tensor:
        """The sequences at the places `chosen`, int64 [n]: [n, L, D]."""
        return torch.cat([self.read(place, 1) for place in chosen.tolist()])

    def read(self, first: int, count: int) -> Tensor:
        """Sequences from the place `first` on, [count, L, D], fewer at the end."""
        count = min(count, len(self) - first)
        found = torch.empty(count, *self.shape[1:], dtype=self.dtype)
        room = as_bytes(found)
        self._file.seek(first * self._bytes)
        while len(room):
            room = room[self._file.readinto(room) :]
        return found.to(self.device)

    def write(self, first: int, hidden: Tensor) -> None:
        """Put sequences [n, L, D] at the place `first`."""
        held = hidden.to("cpu", self.dtype).contiguous()
        left = as_bytes(held)
        self._file.seek(first * self._bytes)
        while len(left):
            left = left[self._file.write(left) :]

    def split(self, rows: int) -> Iterator[Tensor]:
        """All sequences, `rows` at a time."""
        for first in range(0, len(self), rows):
            yield self.read(first, rows)
