"""How long pruning takes, in units of one plain pass of the calibration tokens through the decoder blocks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tprune.evaluate.cost import PeakMemory, timed
from tprune.models.blocks import find_decoder
from tprune.models.calibrate import TOKENS_AT_ONCE
from tprune.models.subject import Subject
from tprune.pipelines.journal import Journal

if TYPE_CHECKING:
    from tprune.pipelines.llm_weights import LlmWeights


def bench(driver: LlmWeights, subject: Subject, rounds: int) -> dict[str, Any]:
    """Time a plain pass and a whole pruning run in turn.

    The plain pass sends the same tokens through the decoder without its head, in the same batches. Every pruning
    run works on a fresh copy of the model; copying, reading the text and tokenising it are not counted.

    Returns:
        `times` per part, the `ratios` to form, and the peak memory of a run above the loaded model in MB.
    """
    decoder = find_decoder(subject.model)
    method, sequences = driver.method, driver.calibration_tokens(subject, decoder)
    if sequences is None:
        sequences = torch.zeros(1, driver.length, dtype=torch.int64)
    budget, tokens = driver.budget(), sequences if method.stats else None
    rows = max(1, min(driver.recipe.batch_size, TOKENS_AT_ONCE // driver.length))

    def plain() -> None:
        for chunk in sequences.split(rows):
            decoder.core(input_ids=chunk.to(subject.device), use_cache=False)

    times: dict[str, list[float]] = {"plain pass": [], "pruning": []}
    above = 0.0
    with torch.no_grad():
        plain()
        for _ in range(rounds):
            times["plain pass"].append(timed(plain, subject.device))
            copied = find_decoder(copy.deepcopy(subject.model))
            before = _resident(subject.device)
            with PeakMemory(subject.device) as memory:
                run = timed(lambda: driver.prune(copied, budget, tokens, Journal(None, "")), subject.device)  # noqa: B023
            times["pruning"].append(run)
            above = max(above, memory.megabytes - before)
    return {
        "times": times,
        "ratios": {"plain_passes": ["pruning", "plain pass"]},
        "memory_above_model_mb": above,
        "calibration": f"{sequences.shape[0]} x {sequences.shape[1]} tokens",
    }


def _resident(device: torch.device | str) -> float:
    """Memory in use, in MB: the device's on CUDA, else the process's resident set (NaN where Linux does not tell)."""
    if torch.device(device).type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**20
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return float("nan")
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmRSS"))
