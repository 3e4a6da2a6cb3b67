"""Fitting a method that learns, in a model and to a budget."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import nn

from tprune.errors import UserError
from tprune.methods.base import Method
from tprune.methods.fit import Fit
from tprune.models.together import PATIENCE
from tprune.pipelines.course import Course
from tprune.pipelines.fit_loop import Learner, Loop
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
        course: the model and the training data.
        work: a folder for the checkpoint, or None.
        progress: where to say what goes on.
    """

    method: Method
    keep: float | None
    seed: int
    course: Course
    work: Path | None
    progress: Progress

    def run(self) -> tuple[Method, dict[str, Any]]:
        """The method with what it learned, and the facts of the fit for the report.

        The model's own weights stay as they were, unless the method tunes them.
        """
        course = self.course
        fit = self.method.fit(course.shape, self.keep, self.seed).to(course.device)
        bound = self.method.bind(fit.state())
        course.admit(bound if self.keep is None else bound.counted())
        if not course.labelled:
            self.progress.say("no labels that fit this model: fitting to the dense model's outputs")
        driver = course.driver(self.method, fit, self.seed)
        try:
            with trained(course, fit.tunes), torch.enable_grad():
                loop = self._looped(fit, driver)
        finally:
            driver.remove()
        method, ended = self.method.bind(fit.state()), time.monotonic()
        if self.keep is not None and method.counted().varies():
            method = self.settled(method)
        facts = {
            "data": course.data.protocol,
            "unit": course.unit,
            "labels": "the data's" if course.labelled else "the dense model's",
        }
        facts |= (
            {"tuned": fit.tunes != "nothing"}
            | loop.figures()
            | {"learned": {name: list(tensor.shape) for name, tensor in method.state.items()}}
        )
        return method, facts | {"seconds": round(loop.seconds + time.monotonic() - ended, 1)}

    def _looped(self, fit: Fit, driver: Any) -> Loop:
        """All steps of `fit`, which `driver` has put into the model."""
        course, plan = self.course, fit.plan
        fit.begin(self.forwards(plan.batch, driver))
        learner = Learner(course.model, fit, driver, course.outputs, course.labelled)
        file = None if self.work is None else self.work / f"fit-{self.method.id}.safetensors"
        loop = Loop(learner, plan, len(course.data), file, self.progress, course.unit)
        accelerator = processes(course.model, plan.batch)
        share = accelerator.process_index, accelerator.num_processes
        loop.run(course.lessons(plan.batch, self.seed, share), accelerator, self.seed)
        fit.end(self.forwards(plan.batch, driver))
        return loop

    def forwards(self, size: int, driver: Any) -> Iterator[dict[str, Any]]:
        """What forwards on the training data leave in `driver.memory`, `size` samples each."""
        for inputs, _ in self.course.lessons(size, self.seed).read(count()):
            with torch.no_grad():
                self.course.outputs(inputs)
            yield driver.memory | {"inputs": inputs, "again": self.course.outputs}

    def settled(self, method: Method) -> Method:
        """`method` loosened or tightened until it keeps what was asked, measured on training images.

        While fitting nothing leaves, and what then really leaves differs a little.
        """
        course = self.course
        with self.progress.step("meeting the budget"), torch.no_grad():
            read = course.samples(SETTLE_BATCH, self.seed)
            steps = range(min(SETTLE_IMAGES, len(course.data)) // SETTLE_BATCH or 1)
            batches = [inputs for inputs, _ in read.read(steps)]
            low, high, knob = 0.0, 1.0, 0.5
            best: tuple[float, Method] | None = None
            for _ in range(SETTLE_STEPS):
                found = method.loosened(knob, course.shape)
                missed = course.measured(found, batches, self.seed) - self.keep
                if best is None or abs(missed) < best[0]:
                    best = abs(missed), found
                if abs(missed) <= SETTLE_TOLERANCE:
                    break
                low, high = (knob, high) if missed < 0 else (low, knob)
                knob = (low + high) / 2
        if best[0] > 2 * SETTLE_TOLERANCE:
            self.progress.warn(
                f"{method.id} misses the budget by {best[0]:.3f} on the training {course.unit}"
            )
        return best[1]


def processes(model: nn.Module, batch: int, option: str = "--set batch") -> Accelerator:
    """One process, or those that were started together; bfloat16 on a GPU for float32 models.

    Raises:
        UserError: `batch` samples per step do not divide among them.
    """
    parameter = next(model.parameters())
    mixed = parameter.device.type == "cuda" and parameter.dtype == torch.float32
    found = Accelerator(
        cpu=parameter.device.type == "cpu",
        device_placement=False,
        mixed_precision="bf16" if mixed else "no",
        kwargs_handlers=[
            # A loss need not read all that learns: dtop's never asks the model's own head.
            DistributedDataParallelKwargs(find_unused_parameters=True),
            InitProcessGroupKwargs(timeout=PATIENCE),
        ],
    )
    if batch % found.num_processes:
        raise UserError(
            f"{option}={batch}: does not divide among {found.num_processes} processes; give a multiple"
        )
    return found


@contextmanager
def trained(course: Course, tunes: str) -> Iterator[None]:
    """A model whose weights learn, or stand still; as it was afterwards."""
    model, learning = course.model, course.tuned(tunes)
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False).train(bool(learning))
    for parameter in learning:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        model.eval()
        for parameter, before in wanted.items():
            parameter.requires_grad_(before)
            parameter.grad = None
