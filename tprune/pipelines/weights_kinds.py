"""Kinds of model that `tprune llm-weights` calibrates and measures by something else than text that they foretell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from tprune.methods.weights import WeightMethod
from tprune.models.embeddings import TripleSets
from tprune.models.feed import Feed
from tprune.models.subject import Subject
from tprune.pipelines import embedder_weights, encoder_weights, image_weights, question_weights
from tprune.pipelines.base import Quality, Workload
from tprune.progress import Progress
from tprune.recipe import Recipe, Stage

Samples = Tensor | Feed | TripleSets
"""What calibrates: sequences of tokens int64 [N, L], other samples, or triples of a domain and general ones."""


class Task(Protocol):
    """What such a model is measured by."""

    protocol: dict[str, Any]
    """Which data, for the report."""

    def evaluate(self, subject: Subject) -> Quality:
        """Quality on it."""

    def workload(self, subject: Subject) -> Workload:
        """The call whose cost is measured."""


class Kind(Protocol):
    """A module of this package about one kind."""

    CALIBRATION: int
    """How many samples calibration takes where the recipe does not say."""
    Task: Callable[[Recipe, Subject, Progress], Task]
    """What measures it; reads the data."""

    def admits(self, subject: Subject, recipe: Recipe) -> bool:
        """Whether this is a model of the kind, with the data that it takes."""

    def check(self, stage: Stage, method: WeightMethod, recipe: Recipe) -> None:
        """Refuse what does not go with it."""

    def calibration(
        self, recipe: Recipe, subject: Subject, method: WeightMethod, progress: Progress
    ) -> tuple[Samples, Tensor | None]:
        """The samples, and their classes int64 [N], or None where there are none that fit the model."""

    def probe(self, subject: Subject, seed: int) -> dict[str, Tensor]:
        """A small input and the model's output."""


KINDS: tuple[Kind, ...] = (image_weights, embedder_weights, encoder_weights, question_weights)


def kind_of(subject: Subject, recipe: Recipe) -> Kind | None:
    """The kind of a model; None for one that is measured by text that it foretells."""
    return next((kind for kind in KINDS if kind.admits(subject, recipe)), None)
