"""The search for a pruning metric: what an expression is worth is the perplexity of the model that it prunes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from tprune.core.evolve import Evolution
from tprune.core.expression import Expression
from tprune.data import text
from tprune.errors import UserError
from tprune.methods import registry
from tprune.models.gradients import gradient_norms
from tprune.models.pair_stream import stream_of
from tprune.pipelines.journal import Journal
from tprune.pipelines.run import check_device, pipeline
from tprune.pipelines.stream import BlockPruner
from tprune.progress import Progress
from tprune.recipe import Recipe

WINDOWS = 8
"""Windows of the calibration text that perplexity is measured on."""


class Tried:
    """What was measured so far, a line each in a file; without a file it is only remembered."""

    def __init__(self, file: Path | None, recipe: Recipe):
        """Read what an interrupted search left.

        Raises:
            UserError: the file is of another search.
        """
        self.file, self.found = file, {}
        head = {"search": recipe.key()}
        if file is None:
            return
        if not file.exists():
            file.write_text(json.dumps(head) + "\n", encoding="utf-8")
            return
        stored = file.read_text(encoding="utf-8")
        lines = [_read(line) for line in stored.splitlines()]
        if not lines or lines[0] != head:
            raise UserError(f"{file} is of another search; remove it, or give another --out")
        self.found = {line["metric"]: line["perplexity"] for line in lines[1:] if line is not None}
        if not stored.endswith("\n"):
            # The last line was cut off; what comes next gets one of its own.
            with file.open("a", encoding="utf-8") as stream:
                stream.write("\n")

    def write(self, metric: str, perplexity: float | None) -> None:
        """Keep one; None is one that cannot be used."""
        self.found[metric] = perplexity
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps({"metric": metric, "perplexity": perplexity}) + "\n")


def _read(line: str) -> dict[str, Any] | None:
    """A line; None where it was cut off."""
    try:
        return json.loads(line)
    except ValueError:
        return None


class MetricSearch:
    """A dense model that metrics are tried on.

    Attributes:
        recipe: of `pruner-zero`, with the budget and the data.
        dense, published: perplexities on the windows, unpruned and by the published metric.
    """

    def __init__(self, recipe: Recipe, tried: Tried, progress: Progress):
        """Load the model, measure it, and gather its gradients.

        Raises:
            UserError: the model, the data or the budget does not fit.
        """
        check_device(recipe)
        self.recipe, self.tried, self.progress = recipe, tried, progress
        self.driver = pipeline(recipe, recipe.stage, Progress(quiet=True))
        self.driver.check()
        with progress.step("loading the model"):
            self.subject = self.driver.load()
        self.driver.prepare(self.subject)
        if self.driver.kind is not None:
            raise UserError(
                f"search-metric compares perplexities, and {recipe.model.name} is not measured by any; give a "
                "decoder of text, such as smollm2-135m"
            )
        self.decoder = self.driver.decoder(self.subject.model)
        self.tokens = self.driver.calibration_tokens(self.subject, self.decoder)
        source = text.read(recipe.data, "calibration")
        tokenizer = self.driver.tokenizer(self.subject)
        limit = recipe.limit or WINDOWS
        self.driver.windows = text.windows(source, tokenizer, self.driver.length, limit)
        norms = gradient_norms(self.decoder, progress.track(self.tokens, "gradients"))
        self.gradients = {"gradient": norms}
        self.matrices = [
            matrix for index in range(len(self.decoder.blocks)) for matrix in self.decoder.matrices(index)
        ]
        self.weights = {matrix.parameter: matrix.parameter.data.clone() for matrix in self.matrices}
        self.dense = self.perplexity()
        self.published = self.fitness(self.driver.method.expression())

    def run(self, evolution: Evolution, evaluations: int) -> Iterator[tuple[str, float]]:
        """Every metric that is tried and its perplexity, infinite where it cannot be used."""
        random = Random(self.recipe.seed)
        for expression, found in evolution.run(self.fitness, evaluations, random):
            yield str(expression), found

    def fitness(self, expression: Expression) -> float:
        """The perplexity of the model pruned by a metric; infinite where it is not finite, or the metric is not."""
        metric = str(expression)
        if metric not in self.tried.found:
            found = self.measure(metric)
            self.tried.write(metric, found if math.isfinite(found) else None)
        known = self.tried.found[metric]
        return math.inf if known is None else known

    def measure(self, metric: str) -> float:
        """Prune a copy of the weights by `metric`, and put them back."""
        method = registry.build("pruner-zero", "llm-weights", self.recipe.stage.set | {"metric": metric})
        reads = "norm" in method.stats
        try:
            stream = stream_of(self.decoder, self.tokens, self.recipe.batch_size) if reads else None
            pruner = BlockPruner(
                self.decoder,
                method,
                self.driver.budget(),
                self.recipe.seed,
                stream,
                Progress(quiet=True),
                None,
                self.gradients,
            )
            pruner.run(Journal(None, ""))
            return self.perplexity()
        except UserError:
            return math.inf
        finally:
            for parameter, weight in self.weights.items():
                parameter.data.copy_(weight)

    def perplexity(self) -> float:
        """Of the model as it stands, on the windows."""
        return self.driver.evaluate(self.subject).metrics["perplexity"]

    def winner(self, metric: str) -> Recipe:
        """The recipe that prunes by `metric`."""
        stage = replace(self.recipe.stage, set=self.recipe.stage.set | {"metric": metric})
        return replace(self.recipe, stages=(stage,), limit=None)
