"""Cached keys and values in another form than two dense tensors.

A `Stored` is a run of parts, each of which can show itself densely, some hundreds or thousands of entries at a time (a
tile), or be read as it is: attention goes from one to the next, and the whole of a long context is never dense.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from tprune.core.tiles import Beside, Seen

TILE = 256
"""Entries of a head in one tile, where a part has no reason for others."""


class Part(ABC):
    """Some entries of every row and key-value head."""

    grows: ClassVar[bool] = False
    """Whether later entries can be held in the same form (`like` and `join`)."""
    splits: ClassVar[bool] = True
    """Whether a further part begins where one that grows holds as many entries as a tile."""
    asks: ClassVar[bool] = False
    """Whether it remembers what queries chose (`asked`)."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """What it takes in memory."""

    @abstractmethod
    def tiles(self) -> Iterator[Seen]:
        """All of it, a tile at a time."""

    def seen_by(self, query: Tensor) -> Iterator[Seen]:
        """What queries [B, H, q, d] attend to; tiles may then hold other entries for every query head (G = H)."""
        return self.tiles()

    def asked(self, query: Tensor) -> Part:
        """The part once a later token's queries [B, H, 1, d] have chosen what they see."""
        return self

    @property
    def nbytes_read(self) -> int:
        """How much of it a later token reads."""
        return self.nbytes

    @abstractmethod
    def each_row(self, change: Callable[[Tensor], Tensor]) -> Part:
        """The part with `change` applied to the rows (the first axis) of everything it holds."""

    def codes(self, inputs: Tensor) -> tuple[Tensor, Tensor] | None:
        """What `like` takes for later entries, made of the layer's inputs [B, t, D]; None: keys and values."""
        return None

    def like(self, key: Tensor, value: Tensor) -> Part:
        """Other entries [B, G, t, d] in the same form; by their codes, where there are any."""
        raise NotImplementedError

    def join(self, later: Part) -> Part:
        """This part and a `later` one of its kind as one."""
        raise NotImplementedError

    @property
    def length(self) -> int:
        """How many entries a head holds, of parts that grow."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Stored:
    """Parts one behind the other; a value, so that copies of a cache may share it."""

    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        """What all parts take."""
        return sum(part.nbytes for part in self.parts)

    @property
    def nbytes_read(self) -> int:
        """What a later token reads of all parts."""
        return sum(part.nbytes_read for part in self.parts)

    def tiles(self) -> Iterator[Seen]:
        """All tiles."""
        for part in self.parts:
            yield from part.tiles()

    def seen_by(self, query: Tensor) -> Iterator[Seen]:
        """As `Part.seen_by`, of all parts."""
        for part in self.parts:
            yield from part.seen_by(query)

    @property
    def asks(self) -> bool:
        """Whether any part remembers what queries chose."""
        return any(part.asks for part in self.parts)

    def asked(self, query: Tensor, real: Tensor | None = None) -> Stored:
        """As `Part.asked`, of all parts; rows where `real` [B] is False ask nothing."""
        last = self.parts[-1]
        if real is None and not isinstance(last, Rows):
            return replace(self, parts=tuple(part.asked(query) for part in self.parts))
        rows = self._rows(len(query))
        taken = [True] * len(rows) if real is None else real.tolist()
        found = zip(rows, query.split(1), taken, strict=True)
        return Stored((Rows(tuple(row.asked(one) if there else row for row, one, there in found)),))

    def _rows(self, count: int) -> Sequence[Stored]:
        """Each of so many rows by itself."""
        last = self.parts[-1]
        if isinstance(last, Rows):
            return last.rows
        return [self.each_row(_only(row)) for row in range(count)]

    def each_row(self, change: Callable[[Tensor], Tensor]) -> Stored:
        """As `Part.each_row`, of all parts."""
        return replace(self, parts=tuple(part.each_row(change) for part in self.parts))

    @property
    def grows(self) -> bool:
        """Whether it can take in later entries."""
        last = self.parts[-1]
        return all(row.grows for row in last.rows) if isinstance(last, Rows) else last.grows

    def codes(self, inputs: Tensor) -> tuple[Tensor, Tensor] | None:
        """As `Part.codes`; rows have as many as the row with the most, the others' last being zero."""
        last = self.parts[-1]
        if not isinstance(last, Rows):
            return last.codes(inputs)
        found = [row.codes(one) for row, one in zip(last.rows, inputs.split(1), strict=True)]
        return (
            None if found[0] is None else tuple(torch.cat(widened(rows)) for rows in zip(*found, strict=True))
        )

    def absorb(self, key: Tensor, value: Tensor, real: Tensor | None = None) -> Stored:
        """With later entries [B, G, t, d], or their codes; of rows where `real` [B] is False nothing is taken in."""
        last = self.parts[-1]
        if isinstance(last, Rows) or real is not None:
            rows = self._rows(len(key))
            taken = [True] * len(rows) if real is None else real.tolist()
            states = zip(rows, key.split(1), value.split(1), taken, strict=True)
            return Stored((Rows(tuple(row.absorb(k, v) if there else row for row, k, v, there in states)),))
        new = last.like(key, value)
        full = last.splits and last.length >= TILE
        return Stored((*self.parts, new) if full else (*self.parts[:-1], last.join(new)))


def _only(row: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x[row : row + 1]


@dataclass(frozen=True, eq=False)
class Encode:
    """Of a prompt's entries the latest stay dense, and the others are held in another form.

    Attributes:
        stored: in which form.
        dense: how many of the latest stay as they are; where `stored` grows, an entry joins it as soon as so many
            later ones are there.
        block: or, where given, as soon as so many entries are dense: then all of them join it.
        codes: of the dense entries, where `stored` takes in codes: [B, 1, dense, R] for keys and for values.
    """

    stored: Stored
    dense: int = 0
    block: int | None = None
    codes: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True, eq=False)
class Rows(Part):
    """Rows that hold different numbers of entries, each by itself."""

    rows: tuple[Stored, ...]

    @property
    def asks(self) -> bool:
        """Whether any row does."""
        return any(row.asks for row in self.rows)

    @property
    def nbytes(self) -> int:
        """What all rows take."""
        return sum(row.nbytes for row in self.rows)

    @property
    def nbytes_read(self) -> int:
        """What a later token reads of all rows."""
        return sum(row.nbytes_read for row in self.rows)

    def tiles(self) -> Iterator[Seen]:
        """The rows' tiles side by side."""
        return map(Beside, zip_longest(*(row.tiles() for row in self.rows)))

    def seen_by(self, query: Tensor) -> Iterator[Seen]:
        """The same of what each row's query attends to."""
        pairs = zip(self.rows, query.split(1), strict=True)
        return map(Beside, zip_longest(*(row.seen_by(one) for row, one in pairs)))

    def each_row(self, change: Callable[[Tensor], Tensor]) -> Rows:
        """Whole rows are exchanged."""
        return Rows(tuple(self.rows[row] for row in change(torch.arange(len(self.rows))).tolist()))


def widened(rows: Sequence[Tensor]) -> list[Tensor]:
    """Rows [..., R] of different widths R, the narrower ones filled up with zeros."""
    widest = max(row.shape[-1] for row in rows)
    return [pad(row, (0, widest - row.shape[-1])) for row in rows]


def stack_stored(rows: Sequence[Stored]) -> Stored:
    """Rows as one batch."""
    return rows[0] if len(rows) == 1 else Stored((Rows(tuple(rows)),))
