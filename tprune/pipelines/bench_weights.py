"""How long pruning takes, in units of one plain pass of the calibration tokens through the decoder blocks."""

from __future__ import annotations

import copy
import gc
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

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
    model = (Copied if driver.recipe.max_memory is None else Paged).of(driver, subject)
    decoder, feed = driver.decoder(model.subject.model), model.feed
    batch, length = driver.recipe.batch_size, feed.shape[1]
    rows = max(1, min(batch, MANY_TOKENS // length)) if feed.alike else 1

    def plain() -> None:
        for first in range(0, len(feed), rows):
            feed.call(decoder, slice(first, first + rows))

    times: dict[str, list[float]] = {"plain pass": [], "pruning": []}
    above = float("-inf")
    with torch.no_grad():
        plain()
        for _ in range(rounds):
            times["plain pass"].append(timed(plain, subject.device))
            seconds, memory = model.time()
            times["pruning"].append(seconds)
            above = max(above, memory)
        alive, kept = model.tensors()
    streams = isinstance(model.tokens, Tensor | Feed)
    size = next(decoder.core.parameters()).element_size() if streams else 0
    return {
        "times": times,
        "ratios": {"plain_passes": ["pruning", "plain pass"]},
        "tensors_above_model_mb": alive,
        "masks_mb": kept,
        "resident_above_model_mb": above,
        "activations_mb": len(feed) * length * decoder.config.hidden_size * size / 2**20,
        "largest_block_mb": max(_bytes(block) for block in decoder.blocks) / 2**20,
        "workers": model.workers(),
        "calibration": f"{len(feed)} x {length} tokens",
    }


@dataclass(eq=False)
class Copied:
    """Pruning of copies of a model that is in memory.

    Attributes:
        subject: the model itself.
        tokens: what it is calibrated with; None where the method reads nothing.
    """

    driver: LlmWeights
    subject: Subject
    budget: WeightBudget
    tokens: Samples | None

    @classmethod
    def of(cls, driver: LlmWeights, subject: Subject) -> Copied:
        """Of the loaded model."""
        return cls(
            driver,
            subject,
            driver.budget(),
            driver.calibration_tokens(subject, driver.decoder(subject.model)),
        )

    @cached_property
    def feed(self) -> Feed:
        """What the plain pass is of: the calibration samples, also where the method reads none."""
        driver, tokens = self.driver, self.tokens
        if tokens is None and driver.kind is not None:
            tokens, _ = driver.kind.calibration(driver.recipe, self.subject, driver.method, driver.progress)
        if tokens is None:
            tokens = torch.zeros(1, driver.length, dtype=torch.int64)
        if isinstance(tokens, TripleSets):
            return tokens.texts
        return Tokens(tokens) if isinstance(tokens, Tensor) else tokens

    def workers(self) -> int:
        """How many threads send sequences through a block at the same time."""
        feed, batch, device = self.feed, self.driver.recipe.batch_size, self.subject.device
        together = rows_at_once(batch, feed.shape[1], device) if feed.alike else 1
        return workers_at_once(batch, together, feed.shape, device)

    def copy(self) -> nn.Module:
        """Another model of the same weights."""
        return copy.deepcopy(self.subject.model)

    @contextmanager
    def pruning(self) -> Iterator[tuple[Callable[[], Handle], Path]]:
        """Pruning of a copy, to be called once, and the folder of its journal.

        What the copy before left behind is given back.
        """
        copied = self.driver.decoder(self.copy())
        gc.collect()
        give_back()
        with tempfile.TemporaryDirectory(prefix="tprune-bench-") as folder:
            journal = Journal(Path(folder), "bench")
            yield (
                lambda: prune_weights.prune(self.driver, copied, self.budget, self.tokens, journal),
                Path(folder),
            )

    def time(self) -> tuple[float, float]:
        """Seconds of pruning a copy, and by how many MB the process (on CUDA: what is allocated) grew meanwhile."""
        with self.pruning() as (prune, _):
            before = _resident(self.subject.device)
            with PeakMemory(self.subject.device) as memory:
                seconds = timed(prune, self.subject.device)
        return seconds, memory.megabytes - before

    def tensors(self) -> tuple[float, float]:
        """Peak memory of tensors while a copy is pruned, and the size of the masks on disk, in MB."""
        kept: list[float] = []
        with self.pruning() as (prune, folder):
            run = partial(_run, prune, kept)
            if self.workers() > 1:
                return peak_heap(run), kept[0]
            return peak_tensors(run, self.subject.device, folder), kept[0]


class Paged(Copied):
    """Pruning of models whose blocks are read from their files; `subject` is all of it in memory."""

    @classmethod
    def of(cls, driver: LlmWeights, subject: Subject) -> Paged:
        """Of the model loaded once more."""
        return super().of(
            driver, save.load_as(replace(driver.recipe, max_memory=None), driver.source(), driver.family)
        )

    def workers(self) -> int:
        """One: pages serve one at a time."""
        return 1

    def copy(self) -> nn.Module:
        """Another one of the same files."""
        return self.driver.load().model

    def time(self) -> tuple[float, float]:
        """As `Copied`; what was there before counts the whole model once more."""
        before = _resident(self.subject.device) + _bytes(self.subject.model) / 2**20
        with self.pruning() as (prune, _), PeakMemory(self.subject.device) as memory:
            seconds = timed(prune, self.subject.device)
        return seconds, memory.megabytes - before

    def tensors(self) -> tuple[float, float]:
        """As `Copied`; opening the files counts, the whole model does not."""
        kept: list[float] = []

        def with_copy() -> None:
            with self.pruning() as (prune, _):
                _run(prune, kept)

        device = self.subject.device
        on_cpu = torch.device(device).type == "cpu"
        peak = peak_heap(with_copy) if on_cpu else peak_tensors(with_copy, device)
        return peak - _bytes(self.subject.model) / 2**20, kept[0]


def _run(prune: Callable[[], Handle], kept: list[float]) -> None:
    """Prune, and note the MB of the masks."""
    recorded = masks.only_masks(prune().tensors(by_reference=True))
    kept.append(sum(mask.nbytes for mask in recorded.values()) / 2**20)


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
