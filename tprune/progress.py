"""Progress on the terminal, on stderr, and nothing at all when piped or quiet."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


class Progress:
    """Says what goes on; bars only on a terminal."""

    def __init__(self, quiet: bool = True):
        self.quiet = quiet
        self.bars = not quiet and sys.stderr.isatty()

    def track(self, items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
        """The items, with a bar while they are worked on."""
        if not self.bars:
            yield from items
            return
        from rich.console import Console
        from rich.progress import track

        yield from track(items, label, total=total, console=Console(stderr=True), transient=True)

    @contextmanager
    def step(self, label: str) -> Iterator[None]:
        """A spinner during a step of unknown length."""
        if not self.bars:
            yield
            return
        from rich.console import Console

        with Console(stderr=True).status(label):
            yield

    def say(self, line: str) -> None:
        """One line for people, on stderr."""
        if not self.quiet:
            print(line, file=sys.stderr, flush=True)

    def warn(self, line: str) -> None:
        """One warning, on stderr, even when quiet."""
        print(f"warning: {line}", file=sys.stderr, flush=True)
