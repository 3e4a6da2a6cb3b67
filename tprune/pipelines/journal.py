"""The journal of a long run: one file per finished block, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from tprune.artifact import read_tensors


class Journal:
    """Tensors of finished blocks in a folder; without a folder nothing is kept."""

    def __init__(self, folder: Path | None, name: str):
        self.folder, self.name = folder, name

    def _file(self, block: int) -> Path:
        return self.folder / f"{self.name}-{block:05}.safetensors"

    def read(self, block: int) -> dict[str, Tensor] | None:
        """What was written for `block`; None if it is not finished."""
        if self.folder is None or not self._file(block).exists():
            return None
        return read_tensors(self._file(block))

    def write(self, block: int, tensors: dict[str, Tensor]) -> None:
        """Keep the tensors of a finished block; the file appears whole or not at all."""
        if self.folder is None:
            return
        partial = self._file(block).with_suffix(".partial")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
        partial.replace(self._file(block))
