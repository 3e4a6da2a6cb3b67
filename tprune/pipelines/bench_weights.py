"""How long pruning takes, in units of one plain pass of the calibration tokens through the decoder blocks."""

from __future__ import annotations

import copy
import gc
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tprune.evaluate.cost import PeakMemory, peak_heap, peak_tensors, timed
from tprune.methods.weights import WeightBudget
from tprune.models import masks, save
from tprune.models.calibrate import MANY_TOKENS, rows_at_once, workers_at_once
from tprune.models.embeddings import TripleSets
from tprune.models.feed import Feed, Tokens
from tprune.models.memory import give_back
from tprune.models.subject import Subject
from tprune.pipelines import prune_weights
from tprune.pipelines.base import Handle
from tprune.pipelines.journal import Journal
from tprune.pipelines.weights_kinds import Samples

if TYPE_CHECKING:
    from tprune.pipelines.llm_weights import LlmWeights


def bench(driver: LlmWeights, subject: Subject, rounds: int) -> dict[str, Any]:
    """Time a plain pass and a whole pruning run in turn.

    The plain pass sends the same tokens through the decoder without its head, in batches as large as `--batch-size`
    and `MANY_TOKENS` allow (pruning takes smaller ones where that saves memory). Every pruning run works on a fresh
    copy of the model and journals its blocks, as with `--out`; copying, reading the text and tokenising it are not
    counted. With `--max-memory` the copy is one whose blocks are read from their files, and that reading is counted;
    the plain pass is of the model in memory, and "above the loaded model" stays above all of that: less than nothing
    where pruning needs less than the model.

    Memory is told twice, both in MB above the loaded model: `tensors_above_model_mb` is what was alive at the worst
    moment of one more run, not timed (`peak_tensors`; of several `workers` `peak_heap`, since the other sees one thread
    alone); `resident_above_model_mb` is what the process grew by, the most of the timed runs, with the BLAS's buffers
    for every thread and what the C library has not yet given back (on a GPU: the same as the first). `activations_mb`
    and `largest_block_mb` are what to measure them by; `masks_mb` is what the journal holds of the outcome, a bit per
    weight.

    Returns:
        `times` per part, the `ratios` to form, and the memory.
    """
    if driver.recipe.max_memory is not None:
        subject = save.load_as(replace(driver.recipe, max_memory=None), driver.source(), driver.family)
    decoder = driver.decoder(subject.model)
    budget, tokens = driver.budget(), driver.calibration_tokens(subject, decoder)
    feed = _plain_feed(driver, subject, tokens)
    batch, length = driver.recipe.batch_size, feed.shape[1]
    rows = max(1, min(batch, MANY_TOKENS // length)) if feed.alike else 1

    def plain() -> None:
        for first in range(0, len(feed), rows):
            feed.call(decoder, slice(first, first + rows))

    together = rows_at_once(batch, length, subject.device) if feed.alike else 1
    paged = driver.recipe.max_memory is not None
    workers = 1 if paged else workers_at_once(batch, together, feed.shape, subject.device)
    times: dict[str, list[float]] = {"plain pass": [], "pruning": []}
    above = float("-inf")
    with torch.no_grad():
        plain()
        for _ in range(rounds):
            times["plain pass"].append(timed(plain, subject.device))
            seconds, memory = _time(driver, subject, budget, tokens)
            times["pruning"].append(seconds)
            above = max(above, memory)
        alive, kept = _tensors(driver, subject, budget, tokens, workers)
    streams = isinstance(tokens, Tensor | Feed)
    size = next(decoder.core.parameters()).element_size() if streams else 0
    return {
        "times": times,
        "ratios": {"plain_passes": ["pruning", "plain pass"]},
        "tensors_above_model_mb": alive,
        "masks_mb": kept,
        "resident_above_model_mb": above,
        "activations_mb": len(feed) * length * decoder.config.hidden_size * size / 2**20,
        "largest_block_mb": max(_bytes(block) for block in decoder.blocks) / 2**20,
        "workers": workers,
        "calibration": f"{len(feed)} x {length} tokens",
    }


def _plain_feed(driver: LlmWeights, subject: Subject, tokens: Samples | None) -> Feed:
    """What the plain pass is of: the calibration samples, also where the method reads none."""
    if tokens is None and driver.kind is not None:
        tokens, _ = driver.kind.calibration(driver.recipe, subject, driver.method, driver.progress)
    if tokens is None:
        tokens = torch.zeros(1, driver.length, dtype=torch.int64)
    if isinstance(tokens, TripleSets):
        return tokens.texts
    return Tokens(tokens) if isinstance(tokens, Tensor) else tokens


@contextmanager
def _on_a_copy(
    driver: LlmWeights, subject: Subject, budget: WeightBudget, tokens: Samples | None
) -> Iterator[tuple[Callable[[], Handle], Path]]:
    """Pruning of a copy of the model, to be called once, and the folder of its journal.

    What the copy before left behind is given back.
    """
    paged = driver.recipe.max_memory is not None
    copied = driver.decoder(driver.load().model if paged else copy.deepcopy(subject.model))
    gc.collect()
    give_back()
    with tempfile.TemporaryDirectory(prefix="tprune-bench-") as folder:
        journal = Journal(Path(folder), "bench")
        yield lambda: prune_weights.prune(driver, copied, budget, tokens, journal), Path(folder)


def _tensors(
    driver: LlmWeights,
    subject: Subject,
    budget: WeightBudget,
    tokens: Samples | None,
    workers: int,
) -> tuple[float, float]:
    """Peak memory of tensors while a copy is pruned, and the size of the masks on disk, in MB."""
    kept: list[float] = []

    def run(prune: Callable[[], Handle]) -> None:
        recorded = masks.only_masks(prune().tensors(by_reference=True))
        kept.append(sum(mask.nbytes for mask in recorded.values()) / 2**20)

    def with_copy() -> None:
        with _on_a_copy(driver, subject, budget, tokens) as (prune, _):
            run(prune)

    if driver.recipe.max_memory is not None:
        on_cpu = torch.device(subject.device).type == "cpu"
        peak = peak_heap(with_copy) if on_cpu else peak_tensors(with_copy, subject.device)
        return peak - _bytes(subject.model) / 2**20, kept[0]
    with _on_a_copy(driver, subject, budget, tokens) as (prune, folder):
        if workers > 1:
            peak = peak_heap(lambda: run(prune))
        else:
            peak = peak_tensors(lambda: run(prune), subject.device, folder)
    return peak, kept[0]


def _time(
    driver: LlmWeights, subject: Subject, budget: WeightBudget, tokens: Samples | None
) -> tuple[float, float]:
    """Seconds of pruning a copy, and by how many MB the process (on CUDA: what is allocated) grew meanwhile."""
    before = _resident(subject.device) + _bytes(subject.model) / 2**20
    with _on_a_copy(driver, subject, budget, tokens) as (prune, _):
        if driver.recipe.max_memory is None:
            before = _resident(subject.device)
        with PeakMemory(subject.device) as memory:
            seconds = timed(prune, subject.device)
    return seconds, memory.megabytes - before


def _bytes(module: torch.nn.Module) -> int:
    """Bytes of a module's parameters."""
    return sum(parameter.nbytes for parameter in module.parameters())


def _resident(device: torch.device | str) -> float:
    """Memory in use, in MB: the device's on CUDA, else the process's resident set (NaN where Linux does not tell)."""
    if torch.device(device).type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**20
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return float("nan")
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmRSS"))
