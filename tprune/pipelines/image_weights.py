"""Pruning the weights of a vision transformer: which of the family's methods can, and what it is calibrated on."""

from __future__ import annotations

import torch
from torch import Tensor

from tprune.data import images
from tprune.errors import UserError
from tprune.methods import registry
from tprune.methods.weights import WeightMethod
from tprune.models import image_encoder
from tprune.models.anatomy import anatomy, classes
from tprune.models.feed import Pictures
from tprune.models.gradients import MEASURED
from tprune.models.subject import Subject
from tprune.models.vision_blocks import is_vision
from tprune.pipelines import image_task
from tprune.pipelines.drawn import CALIBRATION as CALIBRATION
from tprune.pipelines.drawn import drawn
from tprune.pipelines.masks_only import check_masks_only
from tprune.progress import Progress
from tprune.recipe import Recipe, Stage

VISION = "vision"
"""What methods that take structure out of vision transformers say they run on."""
Task = image_task.ImageTask
probe = image_task.probe


def admits(subject: Subject, recipe: Recipe) -> bool:
    """Whether this is a vision transformer."""
    return is_vision(subject.model)


def check(stage: Stage, method: WeightMethod, recipe: Recipe) -> None:
    """Refuse what reads text, or has no place in timm's files.

    Raises:
        UserError: naming the method or the option.
    """
    said = f"{recipe.model.name} is a vision transformer"
    if VISION not in method.runs_on:
        able = ", ".join(registry.running_on(VISION, "llm-weights"))
        check_masks_only(stage, method, said, f"; or, to take structure out, one of {able}")
    if stage.recover is not None:
        raise UserError(f"--recover {stage.recover}: {said}, and text is what recovers; leave it out")
    if recipe.length is not None:
        raise UserError(f"--length {recipe.length}: images have their own number of tokens; leave it out")


def calibration(
    recipe: Recipe, subject: Subject, method: WeightMethod, progress: Progress
) -> tuple[Pictures, Tensor | None]:
    """Scenes of training digits, or images of the folder that `--data` names, and their classes if all are known.

    Raises:
        UserError: no such images, or the method reads gradients and there are no classes that fit the model.
    """
    told, shape = classes(subject.model), anatomy(subject.model).shape
    found, chosen = drawn(recipe, images.TrainingScenes, images.read, image_task.IMAGES, progress)
    if not found.fits(told) and set(method.stats) & set(MEASURED):
        raise UserError(
            f"{method.id} reads gradients of a classifier's loss: --data FOLDER with a folder for each of the model's "
            f"{told} classes, or choose a method without, such as wanda"
        )
    samples = [found.sample(place) for place in chosen]
    pixels = torch.stack([image_encoder.pixels(subject, image) for image, _ in samples])
    labels = torch.tensor([label for _, label in samples]) if found.fits(told) else None
    return Pictures(pixels, shape.prefix + shape.tokens, labels), labels
