"""Safetensors files without mapping them: tensors, or rows of them, are read into memory that is there, and written a
piece at a time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
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
    "I16": torch.int16,
    "I8": torch.int8,
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

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Refuse a tensor that has another shape than is wanted.

        Raises:
            UserError: it has.
        """
        entry = self.entries[name]
        if entry.shape != tuple(shape):
            raise UserError(
                f"{entry.file}: {name} is {list(entry.shape)}, and the configuration says {list(shape)}"
            )

    def read(self, name: str, out: Tensor) -> None:
        """Fill `out`, contiguous, with the tensor `name`, in `out`'s own dtype and on its device.

        Raises:
            UserError: it has another shape, or the file is shorter than its header says.
        """
        self.check(name, out.shape)
        self._fill(name, [(0, out.numel())], out)

    def rows(self, name: str, index: Tensor, out: Tensor) -> None:
        """The same of the rows `index`, int64 [n], of a matrix [R, C]: `out` is [n, C].

        Rows that follow one another are read together.

        Raises:
            UserError: they have another width, or the file is shorter than its header says.
            IndexError: there is no such row.
        """
        count = self.entries[name].shape[0]
        self.check(name, (count, *out.shape[1:]))
        if len(index) == 0:
            return
        lowest, highest = (int(one) for one in index.aminmax())
        if lowest < 0 or highest >= count:
            raise IndexError(f"{name} has the rows 0 to {count - 1}, and {lowest} to {highest} are asked for")
        at = index.to("cpu")
        starts = torch.cat([torch.zeros_like(at[:1]), at.diff().ne(1).nonzero().flatten() + 1])
        lengths = starts.diff(append=torch.full_like(at[:1], len(at)))
        runs = zip(at[starts].tolist(), lengths.tolist(), strict=True)
        width = out.shape[1]
        self._fill(name, [(first * width, length * width) for first, length in runs], out)

    def _fill(self, name: str, runs: list[tuple[int, int]], out: Tensor) -> None:
        """Fill `out` with runs of a tensor's values, each told by its first value and its length."""
        entry = self.entries[name]
        straight = entry.dtype == out.dtype and out.device.type == "cpu"
        held = out if straight else torch.empty(out.shape, dtype=entry.dtype)
        room, size = as_bytes(held), entry.dtype.itemsize
        with entry.file.open("rb", buffering=0) as stream:
            for first, length in runs:
                stream.seek(entry.start + first * size)
                part, room = room[: length * size], room[length * size :]
                while len(part):
                    count = stream.readinto(part)
                    if not count:
                        raise UserError(f"{entry.file} ends within {name}; get or write it again")
                    part = part[count:]
        if not straight:
            out.copy_(held)


def write(file: Path, tensors: Mapping[str, Tensor], pieces: Callable[[Tensor], Iterable[Tensor]]) -> None:
    """Write a safetensors file of which no more than a piece is in memory.

    Args:
        file: where.
        tensors: by name; those of one memory are written again and again.
        pieces: what gives a tensor's rows, in order.
    """
    names, place = {dtype: name for name, dtype in DTYPES.items()}, 0
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    # The widest first: so each starts at a multiple of its width.
    ordered = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    for name in ordered:
        tensor = tensors[name]
        header[name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [place, place + tensor.nbytes],
        }
        place += tensor.nbytes
    said = json.dumps(header, separators=(",", ":")).encode()
    said += b" " * (-len(said) % 8)
    with file.open("wb") as stream:
        stream.write(len(said).to_bytes(8, "little") + said)
        for name in ordered:
            for piece in pieces(tensors[name]):
                held = piece.detach().to("cpu").contiguous()
                stream.write(as_bytes(held))
