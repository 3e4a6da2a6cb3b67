"""Several processes that `accelerate launch` or `torchrun` started: each calibrates on its share of the sequences."""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor

from tprune.core.statistics import Inputs
from tprune.errors import UserError
from tprune.models.feed import Feed

T = TypeVar("T")

PATIENCE = timedelta(days=1)
"""How long processes wait for the first one, which measures the dense model before it prunes or fits."""


class Together:
    """The processes of this run; the one, where nothing was launched.

    Attributes:
        device: where statistics are.
        rank: of this process, from 0.
        count: how many there are.
    """

    def __init__(self, device: torch.device | str):
        self.device = device
        self.rank, self.count = 0, int(os.environ.get("WORLD_SIZE", "1"))
        if self.count > 1:
            from accelerate import PartialState

            self.rank = PartialState(cpu=torch.device(device).type == "cpu", timeout=PATIENCE).process_index

    def share(self, tokens: Tensor | Feed) -> Tensor | Feed:
        """The sequences of this process: consecutive ones, in the order of the ranks.

        Raises:
            UserError: there are fewer than processes.
        """
        if len(tokens) < self.count:
            raise UserError(
                f"--calibration {len(tokens)}: {self.count} processes share the sequences; give at least as many"
            )
        first, last = (len(tokens) * rank // self.count for rank in (self.rank, self.rank + 1))
        return tokens[first:last]

    def agree(self, value: T) -> T:
        """What the first process has, in all of them."""
        return self._of(0, value)

    def join(self, inputs: Iterable[Inputs]) -> None:
        """Make every process's statistics those of all sequences, summed in float64 in the order of the ranks."""
        if self.count > 1:
            for one in inputs:
                own = one.share()
                one.join((self._of(rank, own) for rank in range(self.count)), self.device)

    def _of(self, rank: int, value: T) -> T:
        """The value that the process `rank` has."""
        if self.count == 1:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value], from_process=rank)[0]
