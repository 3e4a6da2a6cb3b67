"""The hyperparameters with which a method does best at a fixed budget: Bayesian optimisation within given ranges."""

from __future__ import annotations

import math
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy

from tprune.core.bayes import propose, spread
from tprune.errors import UserError
from tprune.evaluate.points import METRICS
from tprune.methods import registry
from tprune.pipelines.search import drop
from tprune.pipelines.trials import Trials
from tprune.recipe import Recipe

SPREAD = 5
"""Settings per number that are tried before the first is proposed, at most half of all."""
TIE = 0.01
"""What a point of disagreement with the dense model counts, in points of quality: settings of equal quality differ."""


@dataclass(frozen=True)
class Space:
    """What is tried: the hyperparameters and, of each, the numbers it is made of, with their ranges.

    Attributes:
        ranges: by name, (low, high) of each of its numbers; both are the same for one that stands.
        lists: the names whose values are lists.
        whole: the names whose numbers are whole.
    """

    ranges: dict[str, list[tuple[float, float]]]
    lists: frozenset[str]
    whole: frozenset[str]

    @classmethod
    def of(cls, family: str, method: str, ranges: dict[str, list[tuple[float, float]]]) -> Space:
        """Those of `method`.

        Raises:
            UserError: a method that must be trained; a hyperparameter that it does not have, that is no number, or a
                budget, or a bound that it cannot take.
        """
        kind = registry.load(method, family)
        if kind.learns == "required":
            raise UserError(
                f"{method} must be trained, which tune does not do; tprune sweep --grid FILE --fit DATA trains it with "
                "every value of a list"
            )
        hints, lists, whole = typing.get_type_hints(kind), set(), set()
        known = {field.name: hints[field.name] for field in kind.hyperparameters()}
        for name in ranges:
            if name not in known:
                raise UserError(f"--set {name}: {method} has {', '.join(known) or 'no hyperparameters'}")
            if name in getattr(kind, "native", ()):
                raise UserError(f"--set {name}: it is a budget of {method} itself; give ranges of others")
            kinds = {*typing.get_args(known[name])} or {known[name]}
            if not kinds & {int, float}:
                raise UserError(f"--set {name}: ranges are for numbers; give a value")
            lists |= {name} if typing.get_origin(known[name]) is tuple else set()
            whole |= {name} if int in kinds else set()
        space = cls(ranges, frozenset(lists), frozenset(whole))
        for corner in (numpy.zeros, numpy.ones):
            registry.build(method, family, space.settings(corner(len(space.bounds))))
        return space

    @property
    def bounds(self) -> numpy.ndarray:
        """Low and high of every number that does not stand: float64 [width, 2]."""
        return numpy.array([both for own in self.ranges.values() for both in own if both[0] < both[1]])

    def settings(self, point: numpy.ndarray) -> dict[str, Any]:
        """The hyperparameters at a point of the unit cube [width]."""
        moving, found = iter(point.tolist()), {}
        for name, own in self.ranges.items():
            numbers = [low + (high - low) * next(moving) if low < high else low for low, high in own]
            numbers = [round(one) if name in self.whole else float(f"{one:.4g}") for one in numbers]
            found[name] = numbers if name in self.lists else numbers[0]
        return found


@dataclass
class Tried:
    """Settings and what came of them.

    Attributes:
        loss: points of quality lost (percent of perplexity gained), and `TIE` of disagreement; infinite with `reason`.
        reason: why they cannot be used.
    """

    settings: dict[str, Any]
    loss: float
    figures: dict[str, Any] = field(default_factory=dict)
    reason: str = ""


class Tune:
    """Tries settings of one method at one budget.

    Args:
        trials: the dense model.
        recipe: of the method at its budget, with the settings that stand.
        space: of the others.
    """

    def __init__(self, trials: Trials, recipe: Recipe, space: Space):
        self.trials, self.recipe, self.space = trials, recipe, space
        self.dense, self.reference = trials.dense()
        self.metric = next((name for name in METRICS if self.dense.get(name) is not None), "agreement")

    def run(self, count: int) -> Iterator[Tried]:
        """The settings as they are without ranges, and `count` others."""
        yield self.tried({})
        width, seed = len(self.space.bounds), self.recipe.seed
        points = spread(min(SPREAD * width, max(1, count // 2)), width, seed)
        values: list[float] = []
        seen: dict[str, Tried] = {}
        for place in range(count):
            if place == len(points):
                known = [value for value in values if math.isfinite(value)]
                worst = max(known, default=0.0)
                told = numpy.array([value if math.isfinite(value) else worst for value in values])
                points = numpy.concatenate([points, propose(points, told, seed + place)[None]])
            settings = self.space.settings(points[place])
            # Different points may round to the same settings.
            found = seen[str(settings)] = seen.get(str(settings)) or self.tried(settings)
            values.append(found.loss)
            yield found

    def with_settings(self, settings: dict[str, Any]) -> Recipe:
        """The recipe with these."""
        stage = self.recipe.stage
        return replace(self.recipe, stages=(replace(stage, set=stage.set | settings),))

    def tried(self, settings: dict[str, Any]) -> Tried:
        """Measured, or why not."""
        try:
            with self.trials.pruned(self.with_settings(settings)) as trial:
                figures = self.trials.figures(trial, self.reference)
        except UserError as error:
            return Tried(settings, math.inf, reason=str(error))
        lost = drop(self.metric, self.dense, figures)
        if not math.isfinite(lost):
            return Tried(settings, math.inf, figures, f"their {self.metric} is not finite")
        return Tried(settings, lost + TIE * 100 * (1 - figures["agreement"]), figures | {"drop": lost})
