"""Forms of a pruned model for special kernels: `--export sparse24`, measured beside the same weights as they are."""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Any

import torch

from tprune.errors import UserError
from tprune.evaluate.cost import interleaved
from tprune.models.semi_structured import convert
from tprune.models.subject import Subject, twin
from tprune.pipelines.base import Pipeline
from tprune.recipe import Recipe

ROUNDS = 10
CAPABILITY = (8, 0)
"""The first generation of GPUs with sparse tensor cores."""


def check(export: str, recipe: Recipe) -> None:
    """Refuse a form that there is not, and what does not go with it.

    Raises:
        UserError: with the mend.
    """
    if export != "sparse24":
        raise UserError(f"--export {export}: expected sparse24")
    last = recipe.stages[-1]
    if last.family != "llm-weights" or last.pattern != "2:4":
        raise UserError("--export sparse24: two of four weights must go; give --pattern 2:4")
    device = torch.device(recipe.device)
    if device.type != "cuda":
        raise UserError(
            f"--export sparse24: sparse kernels run on a CUDA device, not on {recipe.device}; give --device cuda, "
            "or leave it out: the pruned model itself needs no such device"
        )
    found = torch.cuda.get_device_capability(device)
    if found < CAPABILITY:
        raise UserError(
            f"--export sparse24: {torch.cuda.get_device_name(device)} has compute capability {found[0]}.{found[1]}, "
            "and sparse kernels need 8.0"
        )
    if recipe.dtype == "float32":
        raise UserError(
            "--export sparse24: sparse kernels take half precision; give --dtype bfloat16 or float16"
        )


def export(driver: Pipeline, subject: Subject) -> dict[str, Any]:
    """Layers that have the form, and the median milliseconds of the workload with them and without.

    What is stored stays as it is, for stock loaders: the form is made in memory.
    """
    sparse = replace(subject, model=twin(subject.model))
    counts = convert(sparse.model)
    if counts["converted"] == 0:
        raise UserError("--export sparse24: no layer has the form; their sizes must divide by 32 and 64")
    runs = {
        "dense_ms": driver.workload(subject).run,
        "sparse_ms": driver.workload(sparse).run,
    }
    times = interleaved(runs, subject.device, ROUNDS)
    medians = {name: 1000 * statistics.median(seconds) for name, seconds in times.items()}
    return {"kind": "sparse24", **counts, **medians, "speed_up": medians["dense_ms"] / medians["sparse_ms"]}
