"""How many of the processor's threads work on an operation, and how many operations at the same time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache
from math import inf
from threading import Condition
from typing import TypeVar

import torch

T = TypeVar("T")
MOST = 1 << 10
"""Threads side by side, more than any machine has for one process."""
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


@contextmanager
def threads(count: int) -> Iterator[None]:
    """A `with` block in which `count` threads work on an operation."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def side_by_side(work: Callable[[int], T], count: int) -> list[T]:
    """What `work(0)` … `work(count - 1)` give, computed at the same time and without gradients, in that order.

    Each has its share of torch's threads: where a step is hardly longer than waking a second thread, cores that go
    their own ways are faster than cores that meet after every operation.

    Raises:
        Exception: the first that one of them raised, when all have ended.
    """
    if count == 1:
        return [torch.no_grad()(work)(0)]
    share = max(1, torch.get_num_threads() // count)

    @torch.no_grad()
    def one(place: int) -> T:
        torch.set_num_threads(share)
        return work(place)

    # The number is this thread's own for OpenMP, and everybody's for MKL.
    with threads(share):
        started = [_pool().submit(one, place) for place in range(count)]
        try:
            return [future.result() for future in started]
        finally:
            wait(started)  # also when interrupted: what they read is about to change


class Turns:
    """Numbered jobs, 0, 1, …, done side by side, pass places one after the other in the order of their numbers.

    Sums that all add to are so the same however fast each is. A worker takes its jobs in ascending order.
    """

    def __init__(self) -> None:
        self._changed = Condition()
        self._passed: dict[str, int] = {}
        self._done: float = 0

    @contextmanager
    def job(self, number: int) -> Iterator[None]:
        """Inside, a job is done; if it fails, nobody waits for another one any more."""
        done = inf
        try:
            yield
            done = number + 1
        finally:
            with self._changed:
                self._changed.wait_for(lambda: done == inf or self._done >= number)
                self._done = max(self._done, done)
                self._changed.notify_all()

    @contextmanager
    def at(self, place: str, number: int) -> Iterator[None]:
        """Inside, a job has a place for itself, once all before it have been there or are done; it comes there once."""
        with self._changed:
            self._changed.wait_for(lambda: max(self._passed.get(place, 0), self._done) >= number)
        yield
        with self._changed:
            self._passed[place] = number + 1
            self._changed.notify_all()


@cache
def _pool() -> ThreadPoolExecutor:
    """Threads that stay, as many as were ever at work together: each has memory of its own, from the C library and from
    BLAS, which new ones would add to. None waits for another to end, since those at work may wait for it.
    """
    return ThreadPoolExecutor(MOST, thread_name_prefix="tprune")
