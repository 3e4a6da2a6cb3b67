"""Fitting a method that learns, in a model and to a budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from tprune.data.images import Images, TrainingScenes
from tprune.data.regions import Covering, Regions
from tprune.errors import UserError
from tprune.methods.base import TokenMethod
from tprune.models.anatomy import Anatomy
from tprune.models.kinds import fit_driver, token_driver
from tprune.models.ragged import check_head
from tprune.pipelines.fit_loop import Batches, Learner, Loop
from tprune.pipelines.tokens import solve
from tprune.progress import Progress

SETTLE_IMAGES = 256
SETTLE_BATCH = 16
SETTLE_STEPS = 12
SETTLE_TOLERANCE = 0.0025


@dataclass(eq=False)
class Fitting:
    """What is fitted, where and on what.

    Attributes:
        method: before.
        keep: the budget, or None.
        seed: of initial values, order and noise.
        parts: the model's anatomy.
        data: training images.
        prepare: an image as the model wants it, [3, H, W].
        logits: the model's outputs for images, [B, C].
        work: a folder for the checkpoint, or None.
        progress: where to say what goes on.
    """

    method: TokenMethod
    keep: float | None
    seed: int
    parts: Anatomy
    data: Images | TrainingScenes | Regions
    prepare: Callable[[Any], Tensor]
    logits: Callable[[Tensor], Tensor]
    work: Path | None
    progress: Progress

    def run(self) -> tuple[TokenMethod, dict[str, Any]]:
        """The method with what it learned, and the facts of the fit for the report.

        The model's own weights stay as they were, unless the method tunes them.
        """
        named = self.method.labels == "patches"
        if self.parts.suffix and not named:
            raise UserError(
                f"{self.method.id} learns from classes of images, and a {type(self.parts.model).__name__} has none; "
                "take a method that is fitted to a detector, bavit"
            )
        shape = replace(self.parts.shape, names=self.data.names) if named else self.parts.shape
        fit = self.method.fit(shape, self.keep, self.seed).to(self.device)
        bound = self.method.bind(fit.state())
        if (bound if self.keep is None else bound.counted()).varies() and not self.method.restores:
            check_head(self.parts.model, self.method.id)
        labelled = named or self.data.fits(shape.classes)
        if not labelled:
            self.progress.say("no labels that fit this model: fitting to the dense model's outputs")
        driver = fit_driver(self.parts, self.method, fit, self.seed)
        with trained(self.parts.model, fit.tunes), torch.enable_grad():
            learner = Learner(self.parts.model, fit, driver, self.logits, labelled)
            file = None if self.work is None else self.work / f"fit-{self.method.id}.safetensors"
            loop = Loop(learner, fit.plan, len(self.data), file, self.progress)
            accelerator = self.accelerator()
            share = accelerator.process_index, accelerator.num_processes
            try:
                loop.run(self.lessons(fit.plan.batch, share), accelerator, self.seed)
            finally:
                driver.remove()
        method, looped = self.method.bind(fit.state()), time.monotonic()
        if self.keep is not None and method.counted().varies():
            method = self.settled(method)
        facts = {"data": self.data.protocol, "labels": "the data's" if labelled else "the dense model's"}
        facts |= (
            {"tuned": fit.tunes == "all"}
            | loop.figures()
            | {"learned": {name: list(tensor.shape) for name, tensor in method.state.items()}}
        )
        return method, facts | {"seconds": round(loop.seconds + time.monotonic() - looped, 1)}

    def lessons(self, size: int, share: tuple[int, int]) -> Batches:
        """The training images with what is learned from them, `size` per step."""
        if self.method.labels == "patches":
            return Batches(
                Covering(self.data, self.prepare, self.parts.shape.grid), None, size, self.seed, share
            )
        return Batches(self.data, self.prepare, size, self.seed, share)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.parts.model.parameters()).device

    def accelerator(self) -> Accelerator:
        """Of one process, or of those that `accelerate launch` started; bfloat16 on a GPU for float32 models."""
        mixed = self.device.type == "cuda" and next(self.parts.model.parameters()).dtype == torch.float32
        return Accelerator(
            cpu=self.device.type == "cpu", device_placement=False, mixed_precision="bf16" if mixed else "no"
        )

    def settled(self, method: TokenMethod) -> TokenMethod:
        """`method` loosened or tightened until it keeps what was asked, measured on training images.

        While fitting nothing leaves, and what then really leaves differs a little.
        """
        with self.progress.step("meeting the budget"):
            read = Batches(self.data, self.prepare, SETTLE_BATCH, self.seed)
            batches = list(read.read(range(min(SETTLE_IMAGES, len(self.data)) // SETTLE_BATCH or 1)))
            low, high, knob = 0.0, 1.0, 0.5
            best: tuple[float, TokenMethod] | None = None
            for _ in range(SETTLE_STEPS):
                found = method.loosened(knob, self.parts.shape)
                missed = self.measured(found, [pixels for pixels, _ in batches]) - self.keep
                if best is None or abs(missed) < best[0]:
                    best = abs(missed), found
                if abs(missed) <= SETTLE_TOLERANCE:
                    break
                low, high = (knob, high) if missed < 0 else (low, knob)
                knob = (low + high) / 2
        if best[0] > 2 * SETTLE_TOLERANCE:
            self.progress.warn(f"{method.id} misses the budget by {best[0]:.3f} on the training images")
        return best[1]

    def measured(self, method: TokenMethod, batches: list[Tensor]) -> float:
        """The mean fraction of tokens that enter a sublayer, over images [B, 3, H, W]."""
        stages = solve(method, self.parts.shape, None)
        driver = token_driver(self.parts, method, stages, self.seed)
        try:
            with torch.no_grad():
                for pixels in batches:
                    self.logits(pixels)
            return sum(driver.entering) / (len(driver.entering) * self.parts.shape.tokens)
        finally:
            driver.remove()


@contextmanager
def trained(model: nn.Module, tunes: str) -> Iterator[None]:
    """A model whose weights learn, or stand still; as it was afterwards."""
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(tunes == "all").train(tunes == "all")
    try:
        yield
    finally:
        model.eval()
        for parameter, before in wanted.items():
            parameter.requires_grad_(before)
            parameter.grad = None
