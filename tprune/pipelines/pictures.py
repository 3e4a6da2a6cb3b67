"""What token methods did to one image, as pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tprune.core.budget import PROJECTOR, Site
from tprune.core.reduction import follow_all
from tprune.data import images
from tprune.errors import UserError
from tprune.evaluate.pictures import Panel, Picture, patches
from tprune.models.anatomy import classes
from tprune.models.decoder import DecoderDriver
from tprune.models.pixels import as_image
from tprune.models.run import Tally
from tprune.models.state_space import in_front
from tprune.models.subject import Subject
from tprune.pipelines.base import Pipeline, Sample
from tprune.pipelines.image_task import samples
from tprune.pipelines.vit import VitHandle, VitPipeline


def opened(read: Callable[[int], Any], place: int) -> Any:
    """The evaluation data up to `place`; `read(limit)` gives its first samples.

    Raises:
        UserError: there are not so many.
    """
    found = read(place + 1)
    if not 0 <= place < len(found.items):
        raise UserError(f"--sample {place}: the evaluation data has {len(found.items)} samples, from 0 on")
    return found


def heading(driver: Pipeline, sample: Sample) -> str:
    """Method, model, budget and sample."""
    stage = driver.stage
    budget = "" if stage.keep is None else f", keep {stage.keep:g}"
    return f"{stage.method} on {driver.recipe.model.name}{budget}: {sample.name.replace('-', ' ')}"


def site_name(site: Site, part: str) -> str:
    """Where tokens left, for people; `part` is what the model's layers are called."""
    if site == PROJECTOR:
        return "projector"
    return f"in {part} {site.layer}" if site.between else f"before {part} {site.layer}"


def on_grid(stands: Tensor, places: Tensor) -> np.ndarray:
    """What stands for the tokens of a grid, counted within the grid.

    Args:
        stands: int64 [M], per token of the sequence the one that stands for it, -1 where it was dropped.
        places: int64 [N], the places of the grid's tokens in the sequence, row by row; -1 where a patch has none.

    Returns:
        int64 [N]; -1 where a patch has no token left, -2 where it never had one, N where a token outside the grid
        stands for it.
    """
    within = torch.full((len(stands),), len(places))
    there = places >= 0
    within[places[there]] = torch.arange(len(places))[there]
    heirs = torch.where(there, stands[places.clamp_min(0)], -2)
    return torch.where(heirs < 0, heirs, within[heirs.clamp_min(0)]).numpy()


def panels(steps: Sequence[tuple[Site, Tensor]], places: Tensor, part: str) -> list[Panel]:
    """A panel per site, of the tokens at `places` (`on_grid`)."""
    return [Panel(site_name(site, part), on_grid(stands.cpu(), places)) for site, stands in steps]


@contextmanager
def undisturbed(driver: DecoderDriver) -> Iterator[DecoderDriver]:
    """The driver, and afterwards as it was: what is counted in between is forgotten."""
    tally, prunable_of = driver.tally, driver.prunable_of
    driver.tally = Tally(tally.depth)
    try:
        yield driver
    finally:
        driver.tally, driver.prunable_of, driver.trace = tally, prunable_of, None


def of_vit(driver: VitPipeline, subject: Subject, handle: VitHandle, sample: Sample) -> list[Picture]:
    """An image with what is left of its patches after every site of a vision transformer."""
    if sample.prompt is not None:
        raise UserError("--prompt: an image model reads no text; give --image FILE or --sample N")
    inner, shape = handle.driver, handle.driver.parts.shape
    if sample.image is None:
        read = opened(lambda limit: samples(subject.model, driver.recipe.data, limit), sample.place)
        image = read.open(sample.place)
    elif shape.video is None:
        image = images.open_file(sample.image, "--image")
    else:
        raise UserError("--image: this model sees videos; give --sample N")
    pixels = driver.pixels(subject, image)
    inner.record = True
    try:
        with torch.no_grad():
            found = driver.outputs(subject, pixels[None])[0]
    finally:
        inner.record = False
    sites = [site for site, _ in inner.trace.reductions]
    stands = follow_all([reduction for _, reduction in inner.trace.reductions])
    steps = [(site, one[0]) for site, one in zip(sites, stands, strict=True)]
    places = shape.prefix - inner.parts.suffix + torch.arange(shape.tokens)
    if shape.kind == "state-space":
        places = in_front(shape.prefix + shape.tokens, "cpu")[shape.prefix :]
    title = heading(driver, sample)
    title += f", class {int(found.argmax())}" if classes(subject.model) else ""
    grid = shape.grid
    if shape.video is not None:
        # The first of the frames that each token joins, from top to bottom.
        frames, rows, columns = shape.video
        pixels = pixels[:: len(pixels) // frames].transpose(0, 1).flatten(1, 2)
        grid = frames * rows, columns
    shown = as_image(pixels, subject.processor)
    return [patches(sample.name, title, shown, grid, panels(steps, places, "block"))]
