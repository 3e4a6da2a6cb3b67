"""Many methods on one model: it is loaded once, and every trial prunes a twin of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from tprune.evaluate.cost import Workload, flops, interleaved, nonzero_bytes, quartiles
from tprune.evaluate.protocol import protocol
from tprune.methods.weights import WeightMethod
from tprune.models.subject import Subject, twin
from tprune.pipelines.base import Handle, Pipeline, Quality
from tprune.pipelines.run import agreement, check_device, describe, pipeline, warn_if_silly
from tprune.progress import Progress
from tprune.recipe import Recipe

QUIET = Progress(quiet=True)


@dataclass(eq=False)
class Trial:
    """A pruned twin of the dense model."""

    recipe: Recipe
    driver: Pipeline
    subject: Subject
    handle: Handle


class Trials:
    """The dense model and its measurements.

    Attributes:
        base: the pipeline that loads, evaluates and times, the same for the dense model and every trial.
        subject: the dense model; never edited.
        protocol: of every figure measured here.
        losses: what searches have measured of it: the next one, at another budget, asks much the same.
    """

    def __init__(self, recipe: Recipe, progress: Progress):
        """Load the model and read the data of `recipe`, whose only stage is a method that needs no budget yet.

        Raises:
            UserError: what is wrong with the model, the data or the device, and so with every trial.
        """
        check_device(recipe)
        self.progress, self.losses = progress, {}
        self.base = pipeline(recipe, recipe.stage, progress)
        with progress.step("loading the model"):
            self.subject = self.base.load()
        self.base.prepare(self.subject)
        self.protocol = protocol(recipe, self.subject, self.base.describe_data())

    def on(self, recipe: Recipe) -> Trials:
        """The same model on other data, such as more samples of it."""
        other = copy.copy(self)
        other.base = pipeline(recipe, recipe.stage, self.progress)
        other.base.prepare(self.subject)
        other.protocol = protocol(recipe, self.subject, other.base.describe_data())
        return other

    def dense(self) -> tuple[dict[str, Any], Quality]:
        """The dense model's quality and cost."""
        quality = self.base.evaluate(self.subject)
        warn_if_silly(quality, self.progress)
        figures = quality.metrics | {"agreement": 1.0, "flops": self.flops(self.subject)}
        return figures | self.storage(self.subject), quality

    @contextmanager
    def pruned(self, recipe: Recipe) -> Iterator[Trial]:
        """A twin of the dense model, pruned as `recipe` says; the dense model's tensors stay as they are.

        Raises:
            BudgetError: out of the method's reach.
            UserError: the method does not fit the model.
        """
        driver = pipeline(recipe, recipe.stage, QUIET)
        driver.known_losses = self.losses
        driver.check()
        edits = isinstance(driver.method, WeightMethod) or recipe.stage.fit is not None
        model = copy.deepcopy(self.subject.model) if edits else twin(self.subject.model)
        subject = replace(self.subject, model=model)
        handle = driver.apply(subject, None)
        try:
            yield Trial(recipe, driver, subject, handle)
        finally:
            if not edits:
                handle.remove()

    def figures(self, trial: Trial, reference: Quality) -> dict[str, Any]:
        """Quality and cost of a trial, and its agreement with the dense model."""
        with trial.handle.counting():
            quality = self.base.evaluate(trial.subject)
        same, work = agreement(quality, reference), self.workload(trial.subject, trial)
        figures = quality.metrics | {"agreement": same, "flops": flops(work.run)}
        return figures | self.storage(trial.subject)

    def report(self, trial: Trial, dense: dict[str, Any], pruned: dict[str, Any]) -> dict[str, Any]:
        """What `tprune FAMILY --json` would print, with the protocol."""
        if trial.driver.acting.varies() or trial.driver.unpruning(trial.handle) is not None:
            dense = dense | {"flops": flops(self.unpruned_run(trial))}
        record = self.protocol | {"seed": trial.recipe.seed}
        found = describe(trial.recipe, [trial.driver], [trial.handle], dense, pruned, trial.subject)
        return found | {"protocol": record}

    def flops(self, subject: Subject) -> int:
        """Of one timed call, where the data decides nothing."""
        return flops(self.base.workload(subject).run)

    def workload(self, subject: Subject, trial: Trial) -> Workload:
        """The timed call: on data where that decides how many tokens the trial's method keeps."""
        base = copy.copy(self.base)
        base.method, base.stage = trial.driver.method, trial.driver.stage
        return base.workload(subject)

    def unpruned_run(self, trial: Trial) -> Callable[[], Any]:
        """The call that the trial's is compared with."""
        if trial.driver.unpruning(trial.handle) is None:
            return self.workload(self.subject, trial).run
        run = self.workload(trial.subject, trial).run

        def unpruned() -> None:
            with trial.driver.unpruning(trial.handle):
                run()

        return unpruned

    def storage(self, subject: Subject) -> dict[str, float]:
        """Megabytes of weights that are not zero, in the family that removes weights."""
        return (
            {"weight_mb": nonzero_bytes(subject.model) / 2**20} if self.base.family == "llm-weights" else {}
        )

    def latency(self, trial: Trial, rounds: int) -> dict[str, dict[str, float]]:
        """One call timed on the dense and on the pruned model in turn.

        Returns:
            Of each, milliseconds: median and quartiles. Of the pruned model also its ratio to the dense call just
            before it, median and quartiles over the rounds: what slows the machine for a while slows both.
        """
        runs = {
            "dense": self.unpruned_run(trial),
            "pruned": self.workload(trial.subject, trial).run,
        }
        times = interleaved(runs, self.subject.device, rounds)
        told = {name: spread("latency", [1000 * t for t in each], "_ms") for name, each in times.items()}
        pairs = zip(times["pruned"], times["dense"], strict=True)
        told["pruned"] |= spread("latency", [pruned / dense for pruned, dense in pairs], "_ratio")
        return told

    def latency_alone(self, rounds: int) -> float:
        """Milliseconds of the dense model's call: the median."""
        times = interleaved({"dense": self.base.workload(self.subject).run}, self.subject.device, rounds)
        return 1000 * quartiles(times["dense"])[1]


def spread(name: str, values: list[float], unit: str) -> dict[str, float]:
    """Median and quartiles: name + unit, name_q1 + unit, name_q3 + unit."""
    low, middle, high = quartiles(values)
    return {f"{name}{unit}": middle, f"{name}_q1{unit}": low, f"{name}_q3{unit}": high}
