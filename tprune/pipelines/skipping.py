"""Choosing what a vision transformer can do without, by what it makes of calibration images without it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tprune.core.budget import Site, Stage
from tprune.data.images import BUILT_IN
from tprune.methods.tokens import TokenMethod
from tprune.models.anatomy import Anatomy
from tprune.models.subject import Subject
from tprune.models.vit import TokenDriver
from tprune.pipelines import image_task

if TYPE_CHECKING:
    from tprune.pipelines.vit import VitPipeline


def calibrated(driver: VitPipeline, subject: Subject, parts: Anatomy) -> TokenMethod:
    """The driver's method with what it learned from calibration images.

    These are `--calibration` images, or as many as the method wants, of what it is fitted on, else of `--data`, else
    of the built-in training scenes.
    """
    batches: list[Tensor] = []

    def outputs(layers: Sequence[int]) -> Tensor:
        """What the model makes of the images while the attention of these blocks is skipped, float [S, C]."""
        if not batches:
            batches.extend(read(driver, subject))
        stages = [Stage(Site(layer), parts.shape.tokens, skips=True) for layer in sorted(layers)]
        skipping = TokenDriver(parts, driver.method, stages, driver.recipe.seed)
        try:
            with torch.no_grad():
                return torch.cat([driver.outputs(subject, batch) for batch in batches])
        finally:
            skipping.remove()

    with driver.progress.step("calibrating"):
        found = driver.method.calibrate(parts.shape, driver.stage.keep, outputs)
    return driver.method.bind(found)


def read(driver: VitPipeline, subject: Subject) -> list[Tensor]:
    """The calibration images, in batches [B, 3, H, W]."""
    recipe, wanted = driver.recipe, driver.recipe.calibration or driver.method.images
    if driver.stage.fit is None and recipe.data is not None:
        data = image_task.samples(subject.model, recipe.data, wanted)
    else:
        data = image_task.training(subject.model, driver.stage.fit or BUILT_IN)
    pixels = [driver.pixels(subject, data.sample(place)[0]) for place in range(min(wanted, len(data)))]
    return list(torch.stack(pixels).split(recipe.batch_size))
