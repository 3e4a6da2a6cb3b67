"""The journal of a long run: one file per finished block, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from tprune.artifact import read_tensors


class Journal:
    """Tensors of finished blocks in a folder; without a folder nothing is kept.

    Args:
        folder: where, or None.
        name: of the files.
        agree: tells several processes what the first one found, so that they leave out the same blocks.
    """

    def __init__(self, folder: Path | None, name: str, agree: Callable[[Any], Any] = lambda found: found):
        self.folder, self.name, self.agree = folder, name, agree

    def part(self, name: str) -> Journal:
        """A journal beside this one."""
        return Journal(self.folder, f"{self.name}-{name}", self.agree)

    def _file(self, block: int) -> Path:
        return self.folder / f"{self.name}-{block:05}.safetensors"

    def read(self, block: int) -> dict[str, Tensor] | None:
        """What was written for `block`; None if it is not finished."""
        there = self.folder is not None and self._file(block).exists()
        return self.agree(read_tensors(self._file(block)) if there else None)

    def write(self, block: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Keep the tensors of a finished block; the file appears whole or not at all.

        Returns:
            The same, now in the file and read from it when they are used; without a folder, as they were given.
        """
        if self.folder is None:
            return tensors
        partial = self._file(block).with_suffix(".partial")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
        partial.replace(self._file(block))
        return read_tensors(self._file(block))
