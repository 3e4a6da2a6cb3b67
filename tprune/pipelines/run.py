"""A command's whole life: recipe -> pipeline -> edited model -> measurements -> artifact -> report."""

from __future__ import annotations

import gc
import importlib
import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tprune import artifact
from tprune.errors import UserError
from tprune.evaluate.cost import cost, flops
from tprune.evaluate.protocol import protocol
from tprune.methods import registry
from tprune.models import save
from tprune.models.memory import give_back
from tprune.models.subject import Subject
from tprune.pipelines.base import Handle, Pipeline, Quality
from tprune.progress import Progress
from tprune.recipe import Recipe, Stage, check_budget, check_read

SILLY_PERPLEXITY = 10_000


def pipeline(recipe: Recipe, stage: Stage, progress: Progress) -> Pipeline:
    """The driver of a stage, with its method built, its budget and the recipe's fields checked."""
    check_budget(stage)
    check_read([one.family for one in recipe.stages], vars(recipe))
    method = registry.build(stage.method, stage.family, stage.set, stage.fit)
    clash = [name for name in stage.set if name.replace("-", "_") in getattr(method, "native", ())]
    if clash and stage.keep is not None:
        raise UserError(f"--keep and --set {clash[0]} are both budgets of {stage.method}; give one of them")
    inside = stage.family == "llm-context" and "encoder" in method.runs_on
    name = "encoders" if inside else registry.folder(stage.family)
    module = importlib.import_module(f"tprune.pipelines.{name}")
    return module.PIPELINE(recipe, stage, method, progress)


def pipelines(recipe: Recipe, progress: Progress) -> list[Pipeline]:
    """One driver per stage."""
    return [pipeline(recipe, stage, progress) for stage in recipe.stages]


def check_device(recipe: Recipe) -> None:
    """Refuse a device or a precision that is not there."""
    try:
        computes = not torch.empty(0, device=recipe.device).is_meta
    except (RuntimeError, AssertionError, ImportError):
        computes = False
    if not computes:
        there = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        raise UserError(f"--device {recipe.device}: no such device; there is {', '.join(there)}")
    if recipe.dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"--dtype {recipe.dtype}: expected float32, bfloat16 or float16")


def check_paged(recipe: Recipe) -> None:
    """Refuse `--max-memory` for a family that holds its model in memory."""
    if recipe.max_memory is not None and any(stage.family != "llm-weights" for stage in recipe.stages):
        raise UserError(
            f"--max-memory {recipe.max_memory}: only llm-weights reads a model block by block; leave it out"
        )


def check_memory(recipe: Recipe, out: str | None, by_reference: bool) -> None:
    """Refuse `--max-memory` where blocks cannot go to disk as they are finished."""
    check_paged(recipe)
    if recipe.max_memory is not None and (out is None or by_reference):
        raise UserError(
            f"--max-memory {recipe.max_memory}: pruned blocks go to a folder; give --out DIR, and no --by-reference"
        )


def execute(
    recipe: Recipe,
    progress: Progress,
    *,
    out: str | None = None,
    force: bool = False,
    by_reference: bool = False,
    evaluate: bool = True,
    max_minutes: float | None = None,
    export: str | None = None,
) -> dict[str, Any]:
    """Prune as the recipe says; measure before and after; write the artifact if `out` is given.

    Returns:
        The report, as `--json` prints it.

    Raises:
        UserError: anything that does not fit, before anything is written.
    """
    check_device(recipe)
    check_memory(recipe, out, by_reference)
    if export is not None:
        from tprune.pipelines import export as exports

        exports.check(export, recipe)
    if out is not None:
        artifact.check_free(out, force)
    drivers = pipelines(recipe, progress)
    for driver in drivers:
        driver.max_minutes = max_minutes
        driver.check()
    place = artifact.staging(out, recipe.key(), force) if out is not None else nullcontext((None, None))
    with place as (folder, parts):
        report, handles, subject = _prune(recipe, drivers, progress, parts, evaluate, export)
        if folder is not None:
            report["out"] = str(out)
            with progress.step("writing"):
                write(folder, recipe, drivers, handles, subject, report, by_reference)
                # The model goes before what was written of it is read: one of them is in memory at a time.
                del handles, subject, driver
                drivers.clear()
                gc.collect()
                give_back()
                verify(folder, recipe, progress)
    return artifact.finite(report)


def _prune(
    recipe: Recipe,
    drivers: list[Pipeline],
    progress: Progress,
    parts: Path | None,
    evaluate: bool,
    export: str | None,
) -> tuple[dict[str, Any], list[Handle], Subject]:
    """Load, prune and measure: the report, what was done, and the model."""
    last = drivers[-1]
    with progress.step("loading the model"):
        subject = last.load()
    for driver in drivers:
        driver.prepare(subject)
        driver.plan(subject)
    record = protocol(recipe, subject, last.describe_data())
    dense, reference = measure(last, subject, None, evaluate, progress, "dense")
    handles = []
    for driver in drivers:
        handle = driver.apply(subject, parts)
        if driver.stage.recover is not None:
            before, _ = measure(last, subject, reference, evaluate, progress, "unrecovered", costs=False)
            handle.recovered = driver.recover(subject, handle, parts) | {"before": before}
        handles.append(handle)
    pruned, _ = measure(last, subject, reference, evaluate, progress, "pruned")
    unpruning = last.unpruning(handles[-1])
    if unpruning is not None:
        with unpruning:
            dense |= cost(last.workload(subject), subject.device)
    dense = handles[-1].whole | dense
    report = describe(recipe, drivers, handles, dense, pruned, subject) | {"protocol": record}
    if export is not None:
        from tprune.pipelines import export as exports

        report["export"] = exports.export(last, subject)
    return report, handles, subject


def assist(recipe: Recipe) -> None:
    """What a process beside the first one does: its share of what is fitted, and nothing else.

    Raises:
        UserError: as `execute`.
    """
    if recipe.device == "cuda":
        recipe = replace(recipe, device=f"cuda:{os.environ['LOCAL_RANK']}")
    check_device(recipe)
    drivers = pipelines(recipe, Progress(quiet=True))
    for driver in drivers:
        driver.check()
    subject = drivers[-1].load()
    for driver in drivers:
        driver.prepare(subject)
    for driver in drivers:
        handle = driver.apply(subject, None)
        if driver.stage.recover is not None:
            driver.recover(subject, handle, None)


def measure(
    driver: Pipeline,
    subject: Subject,
    reference: Quality | None,
    evaluate: bool,
    progress: Progress,
    name: str,
    costs: bool = True,
) -> tuple[dict[str, Any], Quality | None]:
    """Quality and cost (where it is asked for) of the model; agreement with `reference` where there is one."""
    found: dict[str, Any] = {}
    quality = None
    if evaluate:
        progress.say(f"measuring the {name} model")
        quality = driver.evaluate(subject)
        same = 1.0 if reference is None else agreement(quality, reference)
        found = quality.metrics | {"agreement": same}
        if reference is None:
            warn_if_silly(quality, progress, name)
    if not costs:
        return found, quality
    workload = driver.workload(subject)
    if driver.recipe.max_memory is not None:
        # Blocks that come from disk say nothing about speed.
        return found | {"flops": flops(workload.run)}, quality
    return found | cost(workload, subject.device), quality


def agreement(quality: Quality, reference: Quality) -> float:
    """The fraction of predictions that are the dense model's; the mean cosine with them where they are embeddings."""
    if quality.predictions.is_floating_point():
        return torch.cosine_similarity(quality.predictions, reference.predictions, dim=-1).mean().item()
    return (quality.predictions == reference.predictions).double().mean().item()


def warn_if_silly(quality: Quality, progress: Progress, name: str = "dense") -> None:
    """Say so when the dense (or given) model itself is broken, before anyone blames a method."""
    perplexity, accuracy = quality.metrics.get("perplexity"), quality.metrics.get("accuracy")
    if perplexity is not None and not perplexity <= SILLY_PERPLEXITY:
        progress.warn(
            f"the {name} model's perplexity is {perplexity:,.0f}: wrong weights, tokenizer or data?"
        )
    if accuracy is not None and quality.chance is not None and accuracy <= 1.2 * quality.chance:
        progress.warn(
            f"the {name} model's accuracy, {accuracy:.1%}, is that of guessing: wrong weights or labels?"
        )


def describe(
    recipe: Recipe,
    drivers: list[Pipeline],
    handles: list[Handle],
    dense: dict[str, Any],
    pruned: dict[str, Any],
    subject: Subject,
) -> dict[str, Any]:
    """The report."""
    last, handle = drivers[-1], handles[-1]
    stage, achieved = last.stage, handle.achieved()
    asked = stage.pattern or (stage.sparsity if stage.family == "llm-weights" else stage.keep)
    kinds = [one.kind for one in handles]
    return {
        "family": stage.family,
        "method": stage.method,
        "model": recipe.model.name,
        "params": last.method.settings(),
        "seed": recipe.seed,
        "budget": {"asked": asked, "achieved": achieved.value, **achieved.details},
        "dense": dense,
        "pruned": pruned,
        "per_layer": handle.per_layer(),
        "fit": handle.fitted,
        "recovery": next((one.recovered for one in reversed(handles) if one.recovered), None),
        "out": None,
        "kind": next(kind for kind in ("wrapped", "masked", "plain") if kind in kinds),
        "parameters": sum(p.numel() for p in subject.model.parameters()),
    }


def write(
    folder: Path,
    recipe: Recipe,
    drivers: list[Pipeline],
    handles: list[Handle],
    subject: Subject,
    report: dict[str, Any],
    by_reference: bool,
) -> None:
    """The artifact: weights and config (or a reference to them), recipe, tensors, probe, report."""
    from safetensors.torch import save_file

    tensors = {
        (name if len(handles) == 1 else f"{place}.{name}"): tensor.contiguous()
        for place, handle in enumerate(handles)
        for name, tensor in handle.tensors(by_reference).items()
    }
    if by_reference:
        recipe = save.by_reference(recipe, subject)
    else:
        save.model(subject, folder)
    report["by_reference"] = by_reference
    if tensors:
        save_file(tensors, folder / artifact.TENSORS)
    probe = {name: tensor.contiguous() for name, tensor in drivers[-1].probe(subject).items()}
    save_file(probe, folder / artifact.PROBE)
    (folder / artifact.RECIPE).write_text(recipe.to_yaml(), encoding="utf-8")
    artifact.write_json(folder / artifact.REPORT, report)


def verify(folder: Path, recipe: Recipe, progress: Progress) -> None:
    """Open the folder again, in this process, and compare its outputs on the stored probe."""
    from tprune.pipelines.load import open_artifact

    expected = artifact.read_tensors(folder / artifact.PROBE)["output"]
    again = open_artifact(folder, progress, device=recipe.device)
    found = again.driver.probe(again.subject)["output"]
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-4, atol=1e-5):
        raise RuntimeError(
            f"the artifact does not reproduce its outputs on the probe (largest difference "
            f"{(found - expected).abs().max().item() if found.shape == expected.shape else 'of shape'}); "
            "nothing was kept; please report this"
        )
    # The process ends with the most that it maps, of every library: what it read here should not come on top.
    del again
    gc.collect()
    give_back()
