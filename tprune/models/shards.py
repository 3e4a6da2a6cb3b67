"""Tensors of a folder of safetensors files, read one at a time into memory that is there, without mapping a file."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tprune.errors import UserError
from tprune.models.memory import as_bytes

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Dtypes that models are stored in, by their names in safetensors headers."""


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: its file, dtype, shape, and its first byte there."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int


class Shards:
    """The tensors of safetensors files, by name; a file is mapped by no one, so that its size does not matter.

    Raises:
        UserError: a file is damaged, or holds what this does not read.
    """

    def __init__(self, files: list[Path]):
        self.entries: dict[str, Entry] = {}
        for file in files:
            self._list(file)

    def _list(self, file: Path) -> None:
        """Note what a file holds: eight bytes of length, a JSON header, then the tensors."""
        try:
            with file.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                if length > file.stat().st_size:
                    raise ValueError("its header is longer than the file")
                header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            for name, told in header.items():
                first, last = told["data_offsets"]
                entry = Entry(file, DTYPES[told["dtype"]], tuple(told["shape"]), 8 + length + first)
                if last - first != math.prod(entry.shape) * entry.dtype.itemsize:
                    raise ValueError(f"{name} is not as long as its shape says")
                self.entries[name] = entry
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{file} is not a readable safetensors file ({error}); get or write it again"
            ) from None

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def read(self, name: str, out: Tensor) -> None:
        """Fill `out`, contiguous, with the tensor `name`, in `out`'s own dtype and on its device.

        Raises:
            UserError: it has another shape, or the file is shorter than its header says.
        """
        entry = self.entries[name]
        if entry.shape != tuple(out.shape):
            raise UserError(
                f"{entry.file}: {name} is {list(entry.shape)}, and the configuration says {list(out.shape)}"
            )
        straight = entry.dtype == out.dtype and out.device.type == "cpu"
        held = out if straight else torch.empty(entry.shape, dtype=entry.dtype)
        room = as_bytes(held)
        with entry.file.open("rb", buffering=0) as stream:
            stream.seek(entry.start)
            while len(room):
                count = stream.readinto(room)
                if not count:
                    raise UserError(f"{entry.file} ends within {name}; get or write it again")
                room = room[count:]
        if not straight:
            out.copy_(held)
