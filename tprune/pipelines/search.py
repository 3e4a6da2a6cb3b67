"""The best method and budget under a constraint: each method's budget by bisection, methods by successive halving."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from tprune.errors import UserError
from tprune.evaluate.points import METRICS, STORAGE
from tprune.pipelines.base import Quality
from tprune.pipelines.bisection import OutError, fit_cost, fit_drop
from tprune.pipelines.grid import Choice
from tprune.pipelines.sweep import label
from tprune.pipelines.trials import Trials
from tprune.progress import Progress
from tprune.recipe import Recipe

FLOPS_TOLERANCE, LATENCY_TOLERANCE = 0.01, 0.03
RUNGS = 4
SCATTER = 0.1
"""A distance of the quartiles, as a part of the median, above which a time is taken again in twice the rounds."""


@dataclass(frozen=True)
class Goal:
    """What is asked.

    Attributes:
        kind: "flops" (a fraction of the dense model's), "latency" (milliseconds) or "drop" (points of accuracy or
            agreement, percent of perplexity).
        value: at most so much of it.
    """

    kind: str
    value: float


@dataclass
class Candidate:
    """A method with its settings, and what was found of it so far.

    Attributes:
        left: the budget that meets the goal, as the fraction left (1 - sparsity for weights); None before it is known.
        figures: at that budget, on the latest samples.
        reason: why it is out.
    """

    choice: Choice
    left: float | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    reason: str = ""


class Search:
    """Looks for the best candidate.

    Attributes:
        tried: a record per measurement, in their order.
    """

    def __init__(self, trials: Trials, recipe: Recipe, goal: Goal, rounds: int, progress: Progress):
        self.trials, self.recipe, self.goal, self.rounds = trials, recipe, goal, rounds
        self.progress = progress
        self.weights = trials.base.family == "llm-weights"
        self.limit = recipe.limit or trials.base.default_limit
        self.tried: list[dict[str, Any]] = []
        # FLOPs are counted on one sample: a fraction of the dense model's is the same for any batch.
        self.small = trials.on(replace(recipe, limit=1, batch_size=1))
        self.dense_flops = self.small.flops(self.small.subject)
        self.metric = ""

    def run(self, choices: list[Choice]) -> tuple[Candidate | None, list[Candidate]]:
        """The winner (None where nothing meets the goal) and all candidates."""
        candidates = [Candidate(choice) for choice in choices]
        if self.goal.kind == "latency":
            self.time_dense()
        if self.goal.kind != "drop":
            for one in candidates:
                self.attempt(one, partial(self.meet, one))
        alive = [one for one in candidates if not one.reason]
        for limit, places in self.rungs(len(alive)):
            trials = self.trials.on(replace(self.recipe, limit=limit))
            dense, reference = trials.dense()
            self.metric = next((name for name in METRICS if dense.get(name) is not None), "agreement")
            self.progress.say(f"{len(alive)} of {len(candidates)} candidates on {limit} samples")
            for one in alive:
                self.attempt(one, partial(self.judge, one, trials, dense, reference, limit))
            alive = sorted((one for one in alive if not one.reason), key=self.rank)[:places]
        return (alive[0] if alive else None), candidates

    def attempt(self, candidate: Candidate, work: Callable[[], None]) -> None:
        """Do it, or remember why it cannot be done; one broken method does not end the search."""
        try:
            work()
        except (OutError, UserError) as error:
            candidate.reason = str(error)
        except Exception as error:
            candidate.reason = f"{type(error).__name__}: {error}"
        if candidate.reason:
            self.progress.say(f"  {candidate.choice.method} is out: {candidate.reason}")

    def rungs(self, count: int) -> list[tuple[int, int]]:
        """Samples per rung and how many candidates go on from it: half as many on twice the samples, at last one."""
        number = min(RUNGS, max(1, math.ceil(math.log2(max(count, 1)))))
        found = []
        for rung in range(number):
            limit = max(1, math.ceil(self.limit / 2 ** (number - 1 - rung)))
            places = max(1, math.ceil(count / 2 ** (rung + 1))) if rung < number - 1 else count
            found.append((limit, places))
        return found

    def meet(self, candidate: Candidate) -> None:
        """Find the budget at which the candidate costs what the goal says."""
        if self.goal.kind == "flops":
            cost, target, tolerance = self.flops, self.goal.value, FLOPS_TOLERANCE
        else:
            cost, target, tolerance = self.latency, self.goal.value / self.dense_ms, LATENCY_TOLERANCE
        exact = self.goal.kind == "flops"
        candidate.left, found = fit_cost(lambda left: cost(candidate, left), target, tolerance, exact=exact)
        candidate.figures["target_ratio"] = found

    def time_dense(self) -> None:
        """How long the dense model takes.

        Raises:
            UserError: no longer than the goal.
        """
        self.dense_ms = self.trials.latency_alone(4 * self.rounds)
        if self.dense_ms <= self.goal.value:
            raise UserError(
                f"--target-latency {self.goal.value:g}ms: the dense model takes {self.dense_ms:.1f} ms already"
            )

    def with_budget(self, candidate: Candidate, left: float) -> Recipe:
        """The candidate's recipe at a budget."""
        budget = {"sparsity": round(1 - left, 4)} if self.weights else {"keep": left}
        choice = candidate.choice
        stage = replace(self.recipe.stage, method=choice.method, set=choice.settings, **budget)
        return replace(self.recipe, stages=(stage,))

    def note(self, candidate: Candidate, left: float, **found: Any) -> None:
        """Remember and tell a measurement."""
        recipe = self.with_budget(candidate, left)
        self.tried.append(
            {"method": candidate.choice.method, "set": candidate.choice.settings, "left": left, **found}
        )
        told = ", ".join(
            f"{name} {value:.4g}" for name, value in found.items() if isinstance(value, int | float)
        )
        self.progress.say(f"  {label(recipe)}: {told}")

    def flops(self, candidate: Candidate, left: float) -> float:
        """FLOPs as a fraction of the dense model's."""
        with self.small.pruned(self.with_budget(candidate, left)) as trial:
            found = self.small.flops(trial.subject) / self.dense_flops
        self.note(candidate, left, flops=found)
        return found

    def latency(self, candidate: Candidate, left: float) -> float:
        """Latency as a fraction of the dense model's, median over calls in turn; more of them where they scatter."""
        with self.trials.pruned(self.with_budget(candidate, left)) as trial:
            for rounds in (self.rounds, 2 * self.rounds, 4 * self.rounds):
                times = self.trials.latency(trial, rounds)["pruned"]
                scatter = times["latency_q3_ratio"] - times["latency_q1_ratio"]
                if scatter <= SCATTER * times["latency_ratio"]:
                    break
        told = {
            "latency_ms": times["latency_ms"],
            "ratio_to_dense": times["latency_ratio"],
            "scatter": scatter,
        }
        self.note(candidate, left, **told, rounds=rounds)
        return times["latency_ratio"]

    def verify(self, winner: Candidate) -> dict[str, dict[str, float]]:
        """The winner timed once more beside the dense model, in four times as many rounds."""
        with self.trials.pruned(self.with_budget(winner, winner.left)) as trial:
            return self.trials.latency(trial, 4 * self.rounds)

    def judge(
        self, candidate: Candidate, trials: Trials, dense: dict[str, Any], reference: Quality, limit: int
    ) -> None:
        """Measure the candidate on so many samples; for a drop, find its budget there first."""

        def figures(left: float) -> dict[str, Any]:
            with trials.pruned(self.with_budget(candidate, left)) as trial:
                found = trials.figures(trial, reference)
                report = trials.report(trial, dense, found)
            found["drop"] = drop(self.metric, dense, found)
            found["cost"] = self.cost(report)
            told = {name: found[name] for name in (self.metric, "drop", "cost")}
            self.note(candidate, left, samples=limit, **told)
            seen[left] = found | {"achieved": report["budget"]["achieved"], "samples": limit}
            return found

        seen: dict[float, dict[str, Any]] = {}
        if self.goal.kind == "drop":
            candidate.left = fit_drop(lambda left: figures(left)["drop"], self.goal.value, candidate.left)
        else:
            figures(candidate.left)
        candidate.figures |= seen[candidate.left]

    def cost(self, report: dict[str, Any]) -> float:
        """What is spared, as a fraction of the dense model's: FLOPs where tokens leave, else bytes."""
        dense, pruned = report["dense"], report["pruned"]
        name = STORAGE[self.trials.base.family].figure
        return pruned[name] / dense[name] if name in dense else pruned["flops"] / dense["flops"]

    def rank(self, candidate: Candidate) -> tuple[float, float]:
        """Smaller is better: the quality at equal cost, or the cost at equal quality."""
        drop, cost = candidate.figures["drop"], candidate.figures["cost"]
        return (cost, drop) if self.goal.kind == "drop" else (drop, cost)


def drop(metric: str, dense: dict[str, Any], pruned: dict[str, Any]) -> float:
    """Points of accuracy or agreement lost, or percent of perplexity gained."""
    if pruned[metric] is None or not math.isfinite(pruned[metric]):
        return math.inf
    if metric == "perplexity":
        return 100 * (pruned[metric] / dense[metric] - 1)
    return 100 * (dense[metric] - pruned[metric])
