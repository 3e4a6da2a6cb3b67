"""Every method at every budget under one protocol; each point is kept as soon as it is measured."""

from __future__ import annotations

import json
import os
import traceback
from pathlib import Path
from typing import Any

from tprune.artifact import finite, read_tensors
from tprune.errors import BudgetError, UserError
from tprune.evaluate.protocol import key, of_quality
from tprune.pipelines.base import Quality, Sample
from tprune.pipelines.trials import Trial, Trials
from tprune.progress import Progress
from tprune.recipe import Recipe, Stage


class Store:
    """The points of a sweep in a folder, one JSON file each; a file appears whole or not at all."""

    def __init__(self, folder: Path):
        self.folder, self.points, self.dense = folder, folder / "points", folder / "dense"
        try:
            self.points.mkdir(parents=True, exist_ok=True)
            self.dense.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {folder}: cannot write there: {error.strerror}") from None

    def read(self, name: str) -> dict[str, Any] | None:
        """The point called `name`; None where it is not there, or not whole."""
        return _json(self.points / f"{name}.json")

    def write(self, name: str, point: dict[str, Any]) -> None:
        """Keep a point."""
        _write_json(self.points / f"{name}.json", point)

    def all(self) -> list[dict[str, Any]]:
        """Every point, of this sweep and of earlier ones."""
        found = (_json(file) for file in sorted(self.points.glob("*.json")))
        return [point for point in found if point is not None]

    def read_dense(self, name: str) -> tuple[dict[str, Any], Quality] | None:
        """The dense model's figures and predictions, where they were measured before."""
        figures, tensors = _json(self.dense / f"{name}.json"), self.dense / f"{name}.safetensors"
        if figures is None or not tensors.exists():
            return None
        return figures, Quality({}, read_tensors(tensors)["predictions"])

    def write_dense(self, name: str, figures: dict[str, Any], quality: Quality) -> None:
        """Keep the dense model's."""
        from safetensors.torch import save_file

        partial = self.dense / f".{name}.{os.getpid()}"
        save_file({"predictions": quality.predictions.contiguous()}, partial)
        partial.replace(self.dense / f"{name}.safetensors")
        _write_json(self.dense / f"{name}.json", figures)

    def draw(self, name: str, content: bytes) -> dict[str, str]:
        """Keep a picture; where it is, for its point."""
        (self.folder / "pictures").mkdir(exist_ok=True)
        (self.folder / "pictures" / name).write_bytes(content)
        return {"file": f"pictures/{name}"}


def _json(file: Path) -> dict[str, Any] | None:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _write_json(file: Path, content: dict[str, Any]) -> None:
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    partial.write_text(json.dumps(finite(content), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(file)


class Sweep:
    """Measures the points of a grid that are not measured yet.

    Attributes:
        trials: the dense model.
        store: where points are kept.
        rounds: timed calls of dense and pruned in turn; 0 to measure no latency.
        sample: what pictures show; None for none.
    """

    def __init__(self, trials: Trials, store: Store, rounds: int, sample: Sample | None, progress: Progress):
        self.trials, self.store, self.rounds, self.sample = trials, store, rounds, sample
        self.progress = progress
        trials.protocol["latency"] = {"rounds": rounds} if rounds else None
        self.protocol = of_quality(trials.protocol)
        self._dense: tuple[dict[str, Any], Quality] | None = None

    def dense(self) -> tuple[dict[str, Any], Quality]:
        """The dense model's figures and predictions, measured once per protocol."""
        if self._dense is None:
            name = key(self.protocol)
            self._dense = self.store.read_dense(name)
            if self._dense is None:
                self.progress.say("measuring the dense model")
                self._dense = self.trials.dense()
                self.store.write_dense(name, *self._dense)
        return self._dense

    def run(self, recipes: list[Recipe], again: bool = False) -> list[dict[str, Any]]:
        """The points of `recipes`, in their order; those that failed before are tried again.

        Args:
            again: measure what is already measured, too.
        """
        found = []
        for place, recipe in enumerate(recipes, start=1):
            name = key([recipe.key(), self.protocol])
            point = None if again else self.store.read(name)
            if point is None or point["status"] == "failed":
                with self.progress.step(f"{place} of {len(recipes)}: {label(recipe)}"):
                    point = self.measure(recipe) | {"key": name}
                self.store.write(name, point)
                self.progress.say(f"[{place}/{len(recipes)}] {label(recipe)}: {outcome(point)}")
            found.append(point)
        return found

    def measure(self, recipe: Recipe) -> dict[str, Any]:
        """One point: a report, or why there is none."""
        dense, quality = self.dense()
        stage = recipe.stage
        point = {
            "status": "ok",
            "family": stage.family,
            "method": stage.method,
            "model": recipe.model.name,
            "set": stage.set,
            "fit_on": stage.fit,
            "asked": asked(stage),
            "seed": recipe.seed,
            "recipe": recipe.to_yaml(),
            "protocol": self.trials.protocol | {"seed": recipe.seed},
        }
        try:
            with self.trials.pruned(recipe) as trial:
                pruned = self.trials.figures(trial, quality)
                report = self.trials.report(trial, dense, pruned)
                if self.rounds:
                    for name, figures in self.trials.latency(trial, self.rounds).items():
                        report[name] = report[name] | figures
                return point | report | {"pictures": self.pictures(trial)}
        except BudgetError as error:
            return point | {"status": "unreachable", "reason": str(error), "reach": [error.low, error.high]}
        except UserError as error:
            return point | {"status": "unfit", "reason": str(error)}
        except Exception as error:
            # Whatever one method does wrong, the others still have their turn; `tprune sweep` exits with status 1.
            trace = traceback.format_exc()
            return point | {"status": "failed", "reason": f"{type(error).__name__}: {error}", "trace": trace}

    def pictures(self, trial: Trial) -> list[dict[str, str]]:
        """What the method did to one sample, for families and methods that can be drawn: files and their titles."""
        if self.sample is None or trial.recipe.seed != self.trials.protocol["seed"]:
            return []
        try:
            trial.driver.prepare(self.trials.subject)
            drawn = trial.driver.pictures(trial.subject, trial.handle, self.sample)
        except UserError:
            return []
        name = "-".join(label(trial.recipe).replace("/", "-").split())
        return [self.store.draw(f"{name}-{one.name}", one.content) | {"title": one.title} for one in drawn]


def asked(stage: Stage) -> dict[str, Any]:
    """The budget of a stage as it was given."""
    given = {name: getattr(stage, name) for name in ("keep", "sparsity", "pattern")}
    return {name: value for name, value in given.items() if value is not None}


def label(recipe: Recipe) -> str:
    """A point in a few words."""
    stage = recipe.stage
    words = [stage.method, *(f"{name}={value}" for name, value in stage.set.items())]
    words += [f"fit={stage.fit}"] if stage.fit else []
    words += [f"{name} {value}" for name, value in asked(stage).items()]
    return " ".join([*words, *([f"seed {recipe.seed}"] if recipe.seed else [])])


def outcome(point: dict[str, Any]) -> str:
    """A point's result in a few words."""
    if point["status"] != "ok":
        return f"{point['status']}: {point['reason']}"
    figures = point["pruned"]
    told = [f"{name} {figures[name]:.4g}" for name in ("accuracy", "perplexity") if figures.get(name)]
    told.append(f"{figures['flops'] / point['dense']['flops']:.1%} of FLOPs")
    if "latency_ms" in figures:
        told.append(f"{figures['latency_ratio']:.1%} of latency")
    return ", ".join(told)
