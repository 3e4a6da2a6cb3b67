"""How well a method's own heads name the patches of images, with early exits and without any."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tprune.data import regions
from tprune.methods.tokens import TokenMethod
from tprune.models.anatomy import Anatomy
from tprune.models.kinds import token_driver
from tprune.models.subject import Subject
from tprune.models.vit import TokenDriver
from tprune.pipelines.tokens import solve

if TYPE_CHECKING:
    from tprune.pipelines.vit import VitHandle, VitPipeline


def measured(
    driver: VitPipeline, subject: Subject, handle: VitHandle
) -> tuple[dict[str, float], dict[str, float]]:
    """The quality of the maps of a method that `restores` and makes some, pruned and with all tokens going on.

    Returns:
        Of both, patches named right, the mean IoU of the names that occur, and agreement with the latter; nothing
        where the data does not say what patches show.
    """
    data = regions.evaluation(driver.recipe.data, driver.recipe.limit or driver.default_limit)
    if data is None:
        driver.progress.say("no annotations beside the images: the map is not measured")
        return {}, {}
    size, grid = driver.recipe.batch_size, handle.driver.parts.shape.grid
    samples = regions.Covering(data, lambda image: driver.pixels(subject, image), grid)
    truth, pruned, whole = [], [], []
    for start in driver.progress.track(range(0, len(data), size), "evaluating the map"):
        batch = [samples.sample(place) for place in range(start, min(start + size, len(data)))]
        pixels, shares = (torch.stack(part) for part in zip(*batch, strict=True))
        truth.append(shares.argmax(-1))
        pruned.append(named(driver, subject, handle.driver, pixels))
        with untouched(handle.driver) as other:
            whole.append(named(driver, subject, other, pixels))
    truth, pruned, whole = torch.cat(truth), torch.cat(pruned), torch.cat(whole)
    return figures(pruned, truth, whole), figures(whole, truth, whole)


@contextmanager
def untouched(driver: TokenDriver) -> Iterator[TokenDriver]:
    """The same heads in the same model for a while, with nothing leaving."""
    with driver.away():
        other = unpruned(driver.method, driver.parts, driver.seed)
        try:
            yield other
        finally:
            other.remove()


def unpruned(method: TokenMethod, parts: Anatomy, seed: int) -> TokenDriver:
    """The method's heads at work, with nothing leaving."""
    method = method.unpruned()
    return token_driver(parts, method, solve(method, parts.shape, 1.0), seed)


def named(driver: VitPipeline, subject: Subject, inner: TokenDriver, pixels: Tensor) -> Tensor:
    """The likeliest name of every patch, int64 [B, N]."""
    with torch.no_grad():
        driver.outputs(subject, pixels)
    return inner.memory["map"].argmax(-1).cpu()


def figures(found: Tensor, truth: Tensor, whole: Tensor) -> dict[str, float]:
    """Of names int64 [B, N]."""
    names = 1 + int(torch.stack([found, truth]).max())
    table = torch.bincount((truth * names + found).flatten(), minlength=names**2).view(names, names).double()
    union = table.sum(0) + table.sum(1) - table.diagonal()
    return {
        "patch_accuracy": (found == truth).double().mean().item(),
        "mean_iou": (table.diagonal() / union)[union > 0].mean().item(),
        "patch_agreement": (found == whole).double().mean().item(),
    }
