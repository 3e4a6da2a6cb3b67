"""How many of the processor's threads work on an operation."""

from __future__ import annotations

import torch

SMALL = 1 << 18
"""Elements up to which one thread is done before a second one has been woken."""


class FewThreads:
    """A `with` block around small operations: on the CPU, one thread where `elements` are few.

    An operation that is shared out waits for threads to wake, some 0.1 ms where they sleep between operations; the
    attention of one query over a pruned cache takes no longer than that altogether.
    """

    def __init__(self, elements: int, device: torch.device):
        self.few = device.type == "cpu" and elements <= SMALL

    def __enter__(self) -> None:
        if self.few:
            self.threads = torch.get_num_threads()
            torch.set_num_threads(1)

    def __exit__(self, *exception: object) -> None:
        if self.few:
            torch.set_num_threads(self.threads)
