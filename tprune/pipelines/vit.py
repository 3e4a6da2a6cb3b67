"""The driver of `tprune vit`: patch tokens of image classifiers and vision towers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tprune.core.budget import Stage, counts_entering
from tprune.data import clips, images, regions
from tprune.errors import UserError
from tprune.evaluate.stopwatch import Stopwatch
from tprune.methods.tokens import Shape, TokenMethod
from tprune.models import image_encoder
from tprune.models import vit as adapter
from tprune.models.anatomy import Anatomy
from tprune.models.kinds import admit, dissect, token_driver
from tprune.models.subject import Subject
from tprune.pipelines import image_task, segmenting
from tprune.pipelines.base import Achieved, Handle, Pipeline, Quality, Sample, Workload
from tprune.pipelines.image_task import ImageTask
from tprune.pipelines.learned import stored, untuned
from tprune.pipelines.skipping import calibrated
from tprune.pipelines.tokens import for_timing, solve


class VitHandle(Handle):
    """A token method at work inside a vision transformer."""

    kind = "wrapped"

    def __init__(self, driver: adapter.TokenDriver, fitted: dict[str, Any] | None = None):
        self.driver, self.fitted = driver, fitted
        self.counted: list[float] | None = None

    @property
    def entering(self) -> list[float]:
        """Tokens entering every sublayer; where they vary, the mean of the evaluation images, or of all seen so far."""
        return self.driver.entering if self.counted is None else self.counted

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Where tokens vary, what is reported of them is what happens inside."""
        if self.driver.ragged is not None:
            self.driver.ragged.reset()
        yield
        if self.driver.ragged is not None:
            self.counted = self.driver.entering

    def tensors(self, by_reference: bool) -> dict[str, Tensor]:
        """What the method learned, and what of the model it tuned."""
        return stored(self.driver.method, self.driver.parts.model, self.fitted, by_reference)

    def remove(self) -> None:
        """Take all hooks out again."""
        self.driver.remove()

    def achieved(self) -> Achieved:
        """The mean fraction of patch tokens that entered a sublayer: as planned, or measured where it varies."""
        shape, entering = self.driver.parts.shape, self.entering
        left = entering
        if any(stage.seen for stage in self.driver.stages):
            stages = [replace(stage, seen=0) for stage in self.driver.stages]
            left = counts_entering(stages, shape.tokens, shape.depth)
        leaving = [*map(max, left[2::2], left[3::2]), left[-1]]
        details = {
            "tokens": shape.tokens,
            "tokens_entering_mean": sum(entering) / len(entering),
            "tokens_leaving_mean": sum(leaving) / len(leaving),
        }
        return Achieved(sum(entering) / (len(entering) * shape.tokens), details)

    def per_layer(self) -> list[dict[str, Any]]:
        """Tokens entering the attention and the MLP of every block."""
        shape, entering = self.driver.parts.shape, self.entering
        if shape.lengths is not None:
            entering = [n * shape.lengths[place // 2] / shape.tokens for place, n in enumerate(entering)]
        if shape.kind == "state-space":
            return [{"block": layer, "tokens": entering[2 * layer]} for layer in range(shape.depth)]
        return [
            {"block": layer, "tokens_attention": entering[2 * layer], "tokens_mlp": entering[2 * layer + 1]}
            for layer in range(shape.depth)
        ]


class VitPipeline(Pipeline):
    """Load, measure and prune a vision transformer."""

    family = "vit"
    default_limit = image_task.IMAGES
    handle: VitHandle | None = None
    fitted: dict[str, Any] | None = None
    lessons: images.Images | images.TrainingScenes | clips.Clips | regions.Regions | None = None
    """What `--fit` names, once it is read."""

    def check(self) -> None:
        """A fit is asked for where there is one to make, and tokens leave by one method."""
        names = [stage.method for stage in self.recipe.stages if stage.family == self.family]
        if len(names) > 1:
            raise UserError(
                f"one method at a time prunes tokens of a vision transformer; keep one of {', '.join(names)}"
            )
        self.method.check_fit(self.stage.fit)

    def prepare(self, subject: Subject) -> None:
        """Read the images; refuse a method or a budget that does not fit before anything is measured."""
        parts = dissect(subject.model)
        admit(self.method, parts)
        self.planned(parts.shape)
        self.task = ImageTask(self.recipe, subject, self.progress)
        if self.stage.fit is not None and self.method.state is None:
            self.lessons = self.read_lessons(subject)
            self.progress.say(f"{len(self.lessons):,} samples to learn from")
        self.say_unfitted()

    def read_lessons(
        self, subject: Subject
    ) -> images.Images | images.TrainingScenes | clips.Clips | regions.Regions:
        """What `--fit` names."""
        if self.method.labels == "patches":
            return regions.training(self.stage.fit)
        return image_task.training(subject.model, self.stage.fit)

    def evaluate(self, subject: Subject) -> Quality:
        """Top-1 accuracy, and what is right in the map of a method that makes one."""
        with self.counting():
            quality = self.task.evaluate(subject)
        if self.handle is not None and self.method.restores:
            mapped, self.handle.whole = segmenting.measured(self, subject, self.handle)
            quality.metrics |= mapped
        return quality

    def pixels(self, subject: Subject, image: Any) -> Tensor:
        """One image as the model's own preprocessing makes it, [3, H, W]; the frames of a clip, [F, 3, H, W]."""
        return image_encoder.pixels(subject, image)

    def outputs(self, subject: Subject, batch: Tensor) -> Tensor:
        """Logits [B, C], of a detector's queries [B, Q, C], or pooled features where there is no classifier [B, D]."""
        return image_encoder.answers(subject.model, batch)

    def workload(self, subject: Subject) -> Workload:
        """One batch of noise images; of evaluation images where what they show decides how many tokens are kept."""
        if not self.acting.varies():
            return self.task.workload(subject)
        batch = self.task.batch(subject, range(min(self.recipe.batch_size, len(self.task.images.items))))
        return Workload(lambda: self.outputs(subject, batch), len(batch), image_encoder.unit(subject.model))

    def apply(self, subject: Subject, work: Path | None, state: dict[str, Tensor] | None = None) -> VitHandle:
        """Put the method in place."""
        parts = dissect(subject.model)
        admit(self.method, parts)
        if self.stage.positions not in (None, "original"):
            raise UserError(
                f"--positions {self.stage.positions}: a vision transformer's tokens keep their positions"
            )
        if state or (state is not None and self.stage.fit is not None):
            self.method = self.method.bind(untuned(subject, state))
        self.method.check_fit(self.stage.fit)
        known = self.method.state is not None
        if not known and self.method.calibrates:
            self.method = calibrated(self, subject, parts)
        if not known and self.stage.fit is not None:
            self.method, self.fitted = self.fit(subject, parts, work)
        method, stages = self.planned(parts.shape)
        self.handle = VitHandle(token_driver(parts, method, stages, self.recipe.seed), self.fitted)
        return self.handle

    def planned(self, shape: Shape) -> tuple[TokenMethod, tuple[Stage, ...]]:
        """The method as it runs at this budget, and its stages; counts that vary have met it when they were learned."""
        method = self.acting
        return method, solve(method, shape, None if method.varies() else self.stage.keep)

    @property
    def acting(self) -> TokenMethod:
        """The method, with counts that `stages` fixes under --keep where it has such a form."""
        return self.method if self.stage.keep is None else self.method.counted()

    def fit(self, subject: Subject, parts: Anatomy, work: Path | None) -> tuple[TokenMethod, dict[str, Any]]:
        """The method with what it learned from `--fit`, and the facts of the fit."""
        from tprune.pipelines.fit import Fitting
        from tprune.pipelines.vit_course import VitCourse

        course = VitCourse(
            self.method,
            parts,
            self.lessons or self.read_lessons(subject),
            prepare=lambda image: self.pixels(subject, image),
            logits=lambda pixels: self.outputs(subject, pixels),
        )
        return Fitting(self.method, self.stage.keep, self.recipe.seed, course, work, self.progress).run()

    def probe(self, subject: Subject) -> dict[str, Tensor]:
        """Two noise images and their outputs."""
        return image_task.probe(subject, self.recipe.seed)

    def describe_data(self) -> dict[str, Any]:
        """Which images."""
        return self.task.protocol

    def pictures(self, subject: Subject, handle: Handle, sample: Sample) -> list[Any]:
        """The image with what is left of its patches after every site."""
        from tprune.pipelines.pictures import of_vit

        return of_vit(self, subject, handle, sample)

    def bench(self, subject: Subject, rounds: int) -> dict[str, Any]:
        """Dense and pruned batches in turn: speed-up measured, by FLOPs, and their ratio."""
        if self.stage.fit is None:
            parts = dissect(subject.model)
            admit(self.method, parts)
            self.method = for_timing(self.method, parts.shape, self.recipe.seed, subject.device)
        batch = image_encoder.noise(subject.model, self.recipe.batch_size, self.recipe.seed)
        found = self.beside_dense(subject, lambda one: self.outputs(one, batch), rounds)
        return found | {"items": len(batch), "unit": image_encoder.unit(subject.model)}

    def unpruning(self, handle: Handle) -> AbstractContextManager[Any] | None:
        """Of a method that makes a map of its own: its heads are at work, and no token leaves."""
        return segmenting.untouched(handle.driver) if self.method.restores else None

    def unpruned(self, subject: Subject) -> Subject:
        """The dense model; with the heads of a method that makes a map of its own."""
        dense = super().unpruned(subject)
        if self.method.restores:
            segmenting.unpruned(self.method, dissect(dense.model), self.recipe.seed)
        return dense

    def scoring(
        self, subject: Subject, handle: Handle, rounds: int, call: Callable[[], Any]
    ) -> dict[str, list[float]]:
        """What a method does at its sites: signals, choice, and moving the tokens."""
        if not isinstance(handle, VitHandle):
            return {}
        with torch.no_grad(), Stopwatch(handle.driver, "_reduce", subject.device) as watch:
            for _ in range(rounds):
                watch.lap(call)
        return {"scoring": watch.seconds}


PIPELINE = VitPipeline
