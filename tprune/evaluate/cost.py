"""What a call costs: FLOPs counted by torch, latency measured, peak memory read from the system."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from tprune.models.memory import give_back, in_use
from tprune.pipelines.base import Workload


def flops(run: Callable[[], Any]) -> int:
    """Floating-point operations of one call (a multiply-add counts two), matrix products and attention.

    Fused attention on the CPU counts too: the call is taken apart into its two products.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def synchronise(device: torch.device | str) -> None:
    """Wait for a GPU, so that a clock read afterwards means something."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


class PeakMemory:
    """Peak memory in MB during a `with` block: the device's on CUDA, else the process's resident set."""

    def __init__(self, device: torch.device | str):
        self.cuda = torch.device(device).type == "cuda"
        self.megabytes = float("nan")

    def __enter__(self) -> PeakMemory:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            # Linux: 5 resets the high-water mark of the resident set.
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")
        return self

    def __exit__(self, *exception: object) -> None:
        if self.cuda:
            self.megabytes = torch.cuda.max_memory_allocated() / 2**20
            return
        try:
            status = Path("/proc/self/status").read_text()
            line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
            self.megabytes = int(line.split()[1]) / 1024
        except (OSError, StopIteration):
            import resource

            self.megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def peak_memory(run: Callable[[], Any], device: torch.device | str) -> float:
    """Peak memory of one call in MB, with all that was there before it."""
    give_back()
    with torch.no_grad(), PeakMemory(device) as memory:
        run()
    return memory.megabytes


def peak_tensors(run: Callable[[], Any], device: torch.device | str, mapped: Path | None = None) -> float:
    """Peak MB of what torch allocated on the device during one call and had not freed again: tensors and scratch.

    On a CPU from torch's profiler, which slows the call down: not for timing. Unlike the resident set it leaves out
    what BLAS and numpy take for themselves, pages of libraries touched for the first time, and freed memory that the
    C library keeps.

    Args:
        run: what is measured.
        device: where.
        mapped: a folder whose files tensors may be mapped from: the profiler counts these, and they are no memory.
    """
    if torch.device(device).type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    with profile(use_cpu=True, profile_memory=True) as profiled:
        run()
    found = [event for event in profiled.kineto_results.events() if event.name() == "[memory]"]
    files = set() if mapped is None else {file.stat().st_size for file in mapped.iterdir()}
    ordered = (event.nbytes() for event in sorted(found, key=lambda event: event.start_ns()))
    changes = (change for change in ordered if abs(change) not in files)
    return max(accumulate(changes, initial=0)) / 2**20


def peak_heap(run: Callable[[], Any]) -> float:
    """Peak MB that one call, with all its threads, held of the C library's memory; NaN where that does not tell.

    Looked at every half millisecond or so: what is held for less may be missed. Scratch that BLAS and numpy take for
    themselves counts, unless an earlier call left it.
    """
    try:
        before = in_use()
    except (OSError, AttributeError):
        run()
        return float("nan")
    ended = threading.Event()

    def watch() -> int:
        most = in_use()
        while not ended.wait(0.0005):
            most = max(most, in_use())
        return most

    with ThreadPoolExecutor(1) as pool:
        most = pool.submit(watch)
        try:
            run()
        finally:
            ended.set()
    return (most.result() - before) / 2**20


def timed(run: Callable[[], Any], device: torch.device | str) -> float:
    """Seconds of one call."""
    synchronise(device)
    start = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - start


def cost(workload: Workload, device: torch.device | str, repeats: int = 5) -> dict[str, float]:
    """FLOPs and latency of one call, throughput in items per second, peak memory.

    The first call warms up; latency is the median of `repeats` more.
    """
    with torch.no_grad(), PeakMemory(device) as memory:
        operations = flops(workload.run)
        seconds = statistics.median(timed(workload.run, device) for _ in range(repeats))
    give_back()  # logits of a whole window among it
    return {
        "flops": operations,
        "latency_ms": 1000 * seconds,
        "throughput": workload.items / seconds,
        "peak_memory_mb": memory.megabytes,
    }


def interleaved(
    runs: dict[str, Callable[[], Any]], device: torch.device | str, rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds per call of every run, taken in turn, so that a busy machine slows all alike.

    Every other round goes backwards: what a call finds in the processor's caches depends on the one before it.
    """
    with torch.no_grad():
        for _ in range(warmup):
            for run in runs.values():
                run()
        times: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(rounds):
            for name in list(runs) if turn % 2 == 0 else reversed(runs):
                times[name].append(timed(runs[name], device))
    return times


def quartiles(times: list[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile."""
    if len(times) == 1:
        return times[0], times[0], times[0]
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return low, middle, high


def nonzero_bytes(model: nn.Module) -> int:
    """Bytes of all parameters that are not zero; tied ones count once.

    A file without zeros needs the places of the others on top, and a dense file holds the zeros too.
    """
    return sum(int(torch.count_nonzero(p)) * p.element_size() for p in model.parameters())
