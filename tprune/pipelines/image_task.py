"""What a vision transformer is good for, in any family: classes of images, or the features that it answers with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tprune.data import clips, images
from tprune.models import image_encoder
from tprune.models.anatomy import classes, clip_length, detects
from tprune.models.subject import Subject
from tprune.pipelines.base import Quality, Workload
from tprune.progress import Progress
from tprune.recipe import Recipe

IMAGES = 500
"""How many are measured where the recipe does not say."""


def samples(model: nn.Module, source: str | None, limit: int) -> images.Images | clips.Clips:
    """The first `limit` images of `--data`; clips for a model of videos."""
    frames = clip_length(model)
    return clips.read(source, limit, frames) if frames else images.read(source, limit)


def training(model: nn.Module, source: str) -> images.Images | images.TrainingScenes | clips.Clips:
    """The images that `--fit` names; clips for a model of videos."""
    frames = clip_length(model)
    return clips.read(source, None, frames, "--fit") if frames else images.training(source)


class ImageTask:
    """Images as a recipe names them, for a vision transformer with or without a classifier.

    Args:
        recipe: names the data, the limit and the batch size.
        subject: the model.
        progress: where to say what goes on.

    Attributes:
        images: what is read.
        classes: how many the model tells apart.
        labels: int64 [S], or None where they do not fit the model.
    """

    def __init__(self, recipe: Recipe, subject: Subject, progress: Progress):
        self.recipe, self.progress = recipe, progress
        self.images = samples(subject.model, recipe.data, recipe.limit or IMAGES)
        self.classes = classes(subject.model)
        known = self.images.labels
        built_in = recipe.data is None
        fits = known is not None and (self.classes == 10 if built_in else self.classes > max(known))
        self.labels = torch.tensor(known) if fits else None
        if self.labels is None:
            why = "no labels that fit this model"
            if detects(subject.model):
                why = "a detector, and no boxes to measure mean average precision with"
            self.progress.say(f"{why}: only agreement with the dense model is measured")

    @property
    def protocol(self) -> dict[str, Any]:
        """Which images."""
        return self.images.protocol

    def batch(self, subject: Subject, places: Sequence[int]) -> Tensor:
        """Some of the images, [B, 3, H, W]; clips, [B, F, 3, H, W]."""
        return torch.stack([image_encoder.pixels(subject, self.images.open(place)) for place in places])

    @torch.no_grad()
    def evaluate(self, subject: Subject) -> Quality:
        """Top-1 accuracy; what is predicted for every image."""
        size, count = self.recipe.batch_size, len(self.images.items)
        predicted = torch.cat(
            [
                image_encoder.answers(
                    subject.model, self.batch(subject, range(start, min(start + size, count)))
                )
                .argmax(-1)
                .cpu()
                for start in self.progress.track(range(0, count, size), "evaluating")
            ]
        )
        if self.labels is None:
            return Quality({}, predicted)
        accuracy = (predicted == self.labels).double().mean().item()
        return Quality({"accuracy": accuracy}, predicted, chance=1 / self.classes)

    def workload(self, subject: Subject) -> Workload:
        """One batch of noise."""
        batch = image_encoder.noise(subject.model, self.recipe.batch_size, self.recipe.seed)
        unit = image_encoder.unit(subject.model)
        return Workload(lambda: image_encoder.answers(subject.model, batch), len(batch), unit)


def probe(subject: Subject, seed: int) -> dict[str, Tensor]:
    """Two noise images and the model's answers."""
    batch = image_encoder.noise(subject.model, 2, seed)
    with torch.no_grad():
        return {"input": batch, "output": image_encoder.answers(subject.model, batch).cpu()}
