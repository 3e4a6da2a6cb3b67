"""From an artifact on disk back to a ready model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from tprune import artifact
from tprune.models import save
from tprune.models.subject import Subject
from tprune.pipelines.base import Handle, Pipeline
from tprune.progress import Progress
from tprune.recipe import Recipe, read


@dataclass(eq=False)
class Opened:
    """An artifact in memory: its model, ready, and what edited it."""

    recipe: Recipe
    subject: Subject
    driver: Pipeline
    handles: list[Handle]


def open_artifact(
    folder: str | Path, progress: Progress, device: str | None = None, whole: bool = False
) -> Opened:
    """The model in an output folder, with its run-time methods in place.

    One that was pruned within `--max-memory` is read block by block again, unless it shall be in memory as a `whole`.

    Raises:
        UserError: not an artifact, damaged, or (by reference) its base weights are not the ones it names.
    """
    from tprune.pipelines.run import pipelines

    folder = Path(folder)
    report, recipe = artifact.read_report(folder), read(folder / artifact.RECIPE)
    if device is not None:
        recipe = replace(recipe, device=device)
    if whole:
        recipe = replace(recipe, max_memory=None)
    tensors_file = folder / artifact.TENSORS
    tensors = artifact.read_tensors(tensors_file) if tensors_file.exists() else {}
    drivers = pipelines(recipe, progress)
    if report["by_reference"]:
        save.check_reference(recipe, drivers[-1].source())
        subject = drivers[-1].load()
    else:
        subject = save.load(folder, recipe, report)
    handles = []
    for place, driver in enumerate(drivers):
        prefix = "" if len(drivers) == 1 else f"{place}."
        state = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        handles.append(driver.apply(subject, None, state))
    return Opened(recipe, subject, drivers[-1], handles)
