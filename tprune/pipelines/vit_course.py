"""Vision transformers and labelled images, as a fit wants them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from tprune.data.clips import Clips
from tprune.data.images import Images, TrainingScenes
from tprune.data.regions import Covering, Regions
from tprune.errors import UserError
from tprune.methods.fit import Fit
from tprune.methods.tokens import TokenMethod
from tprune.models.anatomy import Anatomy
from tprune.models.image_encoder import unit
from tprune.models.kinds import fit_driver, token_driver
from tprune.models.ragged import check_head
from tprune.models.relaxed import FitDriver
from tprune.pipelines.course import Course
from tprune.pipelines.fit_loop import Batches
from tprune.pipelines.tokens import solve


class VitCourse(Course):
    """Learns from the classes of images, or from what their patches show.

    Args:
        method: which of both it learns from.
        parts: the model's anatomy.
        data: training images, or clips.
        prepare: an image as the model wants it, [3, H, W].
        logits: the model's outputs for images, [B, C].
    """

    def __init__(
        self,
        method: TokenMethod,
        parts: Anatomy,
        data: Images | TrainingScenes | Clips | Regions,
        prepare: Callable[[Any], Tensor],
        logits: Callable[[Tensor], Tensor],
    ):
        self.named = method.labels == "patches"
        if parts.suffix and not self.named:
            raise UserError(
                f"{method.id} learns from classes of images, and a {type(parts.model).__name__} has none; "
                "take a method that is fitted to a detector, bavit"
            )
        self.model, self.parts, self.data, self.prepare = parts.model, parts, data, prepare
        self.logits, self.unit = logits, unit(parts.model)
        self.shape = replace(parts.shape, names=data.names) if self.named else parts.shape
        self.labelled = self.named or data.fits(parts.shape.classes)

    def admit(self, method: TokenMethod) -> None:
        """Where counts vary, the head must read the class token."""
        if method.varies() and not method.restores:
            check_head(self.parts.model, method.id)

    def lessons(self, size: int, seed: int, share: tuple[int, int] = (0, 1)) -> Batches:
        """Images with their classes, or with what covers their patches."""
        if self.named:
            return Batches(Covering(self.data, self.prepare, self.parts.shape.grid), None, size, seed, share)
        return Batches(self.data, self.prepare, size, seed, share)

    def samples(self, size: int, seed: int) -> Batches:
        """Images."""
        return Batches(self.data, self.prepare, size, seed)

    def outputs(self, inputs: Tensor) -> Tensor:
        """Logits of images, [B, C]."""
        return self.logits(inputs)

    def driver(self, method: TokenMethod, fit: Fit, seed: int) -> FitDriver:
        """The driver of this kind of model."""
        return fit_driver(self.parts, method, fit, seed)

    def measured(self, method: TokenMethod, batches: Sequence[Tensor], seed: int) -> float:
        """Over images [B, 3, H, W]."""
        driver = token_driver(self.parts, method, solve(method, self.parts.shape, None), seed)
        try:
            for pixels in batches:
                self.logits(pixels)
            return sum(driver.entering) / (len(driver.entering) * self.parts.shape.tokens)
        finally:
            driver.remove()
