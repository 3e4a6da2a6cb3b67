"""Which samples of labelled data calibrate, where some of it is measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tprune.progress import Progress
from tprune.recipe import Recipe

CALIBRATION = 128
"""How many samples."""


def drawn(
    recipe: Recipe,
    built_in: Callable[[int], Any],
    read: Callable[[str, int | None], Any],
    measured: int,
    progress: Progress,
) -> tuple[Any, list[int]]:
    """Data, and the places in it of the samples that calibrate.

    Scenes of training digits; or of a folder as many as `--calibration` says, drawn from the seed behind those that are
    measured, of all where all are.

    Args:
        recipe: names the folder, or none.
        built_in: so many scenes -> data.
        read: (folder, None) -> data, all of it.
        measured: how many are, where the recipe does not say.
        progress: where to say what goes on.
    """
    count = recipe.calibration or CALIBRATION
    if recipe.data is None:
        return built_in(count), list(range(count))
    found = read(recipe.data, None)
    first = recipe.limit or measured
    if len(found) <= first:
        progress.say(
            "calibrating on data that is measured too: --limit N leaves some of it out of the measure"
        )
        first = 0
    order = torch.randperm(len(found) - first, generator=torch.Generator().manual_seed(recipe.seed))
    return found, (order[:count] + first).tolist()
