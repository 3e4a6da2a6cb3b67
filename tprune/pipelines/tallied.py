"""What is reported of a method that drops tokens inside a decoder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from tprune.models.run import Tally
from tprune.pipelines.base import Handle


class Counts(Protocol):
    """What counts the tokens that enter each layer."""

    tally: Tally


class TalliedHandle(Handle):
    """A method at work whose `driver` counts the tokens that enter each layer."""

    driver: Counts
    counted: Tally | None = None

    @contextmanager
    def counting(self) -> Iterator[None]:
        """What is reported of tokens is what happens inside."""
        before = self.driver.tally
        self.driver.tally = Tally(before.depth)
        yield
        self.counted, self.driver.tally = self.driver.tally, before

    @property
    def tally(self) -> Tally:
        """Of the evaluation's prompts, or of all so far."""
        return self.driver.tally if self.counted is None else self.counted
