"""What a token method did to the image of a question, as pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tprune.data import images, questions
from tprune.errors import UserError
from tprune.evaluate.pictures import Picture, patches
from tprune.models.layout import units
from tprune.models.pixels import as_image
from tprune.models.run import Inputs
from tprune.models.subject import Subject
from tprune.models.vlm import anatomy, image_tokens
from tprune.pipelines.base import Sample
from tprune.pipelines.pictures import heading, opened, panels, undisturbed
from tprune.pipelines.vlm import VlmHandle, VlmPipeline
from tprune.pipelines.vlm_answers import LONGEST_ANSWER, question_inputs, told

QUESTION = "What is in this image?"
"""What is asked about an image of one's own."""
NOTHING = "(nothing)"


@dataclass(frozen=True, eq=False)
class Crop:
    """An image, or a part of it that the tower sees by itself.

    Attributes:
        slots: int64 [N], the place of every token in the prompt, row by row; -1 where there is none.
        pixels: uint8 [H, W, 3], as the model saw it.
        grid: rows and columns of its tokens.
    """

    slots: Tensor
    pixels: np.ndarray
    grid: tuple[int, int]


def of_vlm(driver: VlmPipeline, subject: Subject, handle: VlmHandle, sample: Sample) -> list[Picture]:
    """What is left of an image's tokens after every site, and the answer with and without the others.

    An image that is cut into crops is a picture per crop.
    """
    image, asked, expected = question(driver, sample)
    inputs = question_inputs(subject, [image], [asked])
    longest = LONGEST_ANSWER
    if expected is not None:
        tokens = subject.processor.tokenizer(expected, add_special_tokens=False)["input_ids"]
        longest = min(len(tokens), LONGEST_ANSWER)
    with torch.no_grad(), undisturbed(handle.driver) as inner:
        inner.trace = steps = []
        pruned = told(subject, inputs, longest)[0].strip()
        inner.trace, inner.prunable_of = None, lambda inputs: None
        dense = told(subject, inputs, longest)[0].strip()
    answers = {"question": asked, "expected": expected, "dense": dense, "pruned": pruned}
    line = f"{asked}   dense: {dense or NOTHING}   pruned: {pruned or NOTHING}"
    line += f"   expected: {expected}" if expected else ""
    steps = [(site, stands[0]) for site, stands in steps]
    found = crops(subject, inputs, image)
    drawn = []
    for number, crop in enumerate(found):
        name = sample.name + (f"-crop-{number}" if len(found) > 1 else "")
        title = f"{heading(driver, sample)}\n{line}"
        shown = panels(steps, crop.slots, "layer")
        drawn.append(patches(name, title, crop.pixels, crop.grid, shown, answers))
    return drawn


def question(driver: VlmPipeline, sample: Sample) -> tuple[Image.Image, str, str | None]:
    """The image, what is asked about it, and the right answer where it is known."""
    if sample.image is not None:
        return images.open_file(sample.image, "--image"), sample.prompt or QUESTION, None
    if sample.prompt is not None:
        raise UserError("--prompt: a question needs an image; give --image FILE too, or --sample N alone")
    read = opened(lambda limit: questions.read(driver.recipe.data, limit), sample.place)
    item = read.items[sample.place]
    return read.open(sample.place), item.prompt, item.answer


def crops(subject: Subject, inputs: Inputs, image: Image.Image) -> list[Crop]:
    """The image of a prompt, or its crops; without those whose tokens form no grid.

    Raises:
        UserError: none is left.
    """
    model, pixels = subject.model, inputs["pixel_values"]
    mask = image_tokens(model, inputs)
    found = []
    for unit in units(anatomy(model).outer, model.config, inputs, mask, by_crop=True):
        if inputs.get("image_grid_thw") is not None:
            seen, grid = resized(image, inputs["image_grid_thw"][unit.image], model.config.vision_config)
        elif pixels.dim() >= 4:
            seen = as_image(pixels.flatten(0, -4)[unit.crop], subject.processor)
            rows = round((len(unit.slot) * seen.shape[0] / seen.shape[1]) ** 0.5)
            grid = rows, len(unit.slot) // max(1, rows)
        else:
            break
        if grid[0] * grid[1] == len(unit.slot):
            found.append(Crop(unit.slot, seen, grid))
    if not found:
        raise UserError(f"the image tokens of {type(model).__name__} form no grid that can be drawn")
    return found


def resized(image: Image.Image, cut: Tensor, config: Any) -> tuple[np.ndarray, tuple[int, int]]:
    """An image in the size that Qwen's towers see it in, and its grid; `cut` holds frames, rows, columns of patches."""
    _, rows, columns = cut.tolist()
    size = columns * config.patch_size, rows * config.patch_size
    merge = config.spatial_merge_size
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC)), (rows // merge, columns // merge)
