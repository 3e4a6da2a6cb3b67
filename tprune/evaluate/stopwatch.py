"""How long one part of a call takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tprune.evaluate.cost import timed


class Stopwatch:
    """Sums up, per lap, how long one method of an object works; the object is left as it was.

    Attributes:
        seconds: of every lap.
    """

    def __init__(self, target: Any, name: str, device: torch.device | str):
        self.target, self.name, self.device = target, name, device
        self.work = getattr(target, name)
        self.seconds: list[float] = []

    def __enter__(self) -> Stopwatch:
        setattr(self.target, self.name, self._timed)
        return self

    def __exit__(self, *exception: object) -> None:
        delattr(self.target, self.name)

    def lap(self, run: Callable[[], None]) -> None:
        """One more run, during which the method is timed."""
        self.seconds.append(0.0)
        run()

    def _timed(self, *arguments: Any) -> Any:
        result: list[Any] = []
        self.seconds[-1] += timed(lambda: result.append(self.work(*arguments)), self.device)
        return result[0]
