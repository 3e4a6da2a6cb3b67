"""Samples with their classes, whatever they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Labelled:
    """Samples in a fixed order.

    Attributes:
        items: what is read, or where it is.
        labels: class indices, or None where there are none for this model.
        protocol: source, number and sha256, for the report.
    """

    items: tuple[Any, ...]
    labels: tuple[int, ...] | None
    protocol: dict[str, Any]

    def __len__(self) -> int:
        """How many there are."""
        return len(self.items)

    def fits(self, classes: int) -> bool:
        """Whether a model with so many classes can learn from the labels."""
        return self.labels is not None and classes > max(self.labels)

    def label(self, place: int) -> int:
        """The class of one sample, -1 where there is none."""
        return -1 if self.labels is None else self.labels[place]
