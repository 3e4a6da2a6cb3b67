"""Samples with their classes, whatever they are."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tprune.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Labelled:
    """Samples in a fixed order.

    Attributes:
        items: what is read, or where it is.
        labels: class indices, or None where there are none for this model.
        protocol: source, number and sha256, for the report.
        option: what named them; begins the errors.
    """

    items: tuple[Any, ...]
    labels: tuple[int, ...] | None
    protocol: dict[str, Any]
    option: str = "--data"

    def __len__(self) -> int:
        """How many there are."""
        return len(self.items)

    def fits(self, classes: int) -> bool:
        """Whether a model with so many classes can learn from the labels."""
        return self.labels is not None and classes > max(self.labels)

    def label(self, place: int) -> int:
        """The class of one sample, -1 where there is none."""
        return -1 if self.labels is None else self.labels[place]


@contextmanager
def data_folder(source: str, option: str, wanted: str) -> Iterator[Path]:
    """The folder `source`, to be looked through inside; errors begin with `option` and say what is `wanted`.

    Raises:
        UserError: there is none, or it may not be read.
    """
    if not Path(source).is_dir():
        raise UserError(f"{option} {source}: no such folder; give {wanted}")
    try:
        yield Path(source)
    except PermissionError:
        raise UserError(f"{option} {source}: no permission to read it") from None


def folders(root: Path) -> list[Path]:
    """The folders in a folder, by name."""
    return sorted(entry for entry in root.iterdir() if entry.is_dir())


def dealt(groups: Sequence[Sequence[T]], limit: int | None) -> list[tuple[int, T]]:
    """The first `limit` items, one of every group in turn, each with the place of its group."""
    deepest = max(len(group) for group in groups)
    order = [
        (place, group[i]) for i in range(deepest) for place, group in enumerate(groups) if i < len(group)
    ]
    return order[:limit]


def describe(source: str, root: Path, files: Sequence[Path], samples: int) -> dict[str, Any]:
    """Source, number and sha256 (of the files' names), for the report."""
    names = "\0".join(str(file.relative_to(root)) for file in files)
    return {"source": source, "samples": samples, "sha256": hashlib.sha256(names.encode()).hexdigest()}
