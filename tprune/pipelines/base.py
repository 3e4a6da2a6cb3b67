"""What every family's driver does: load, measure, edit, save."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from tprune.errors import UserError
from tprune.methods.base import Method
from tprune.models import load as loaders
from tprune.models.source import Source, resolve
from tprune.models.subject import Subject, twin
from tprune.progress import Progress
from tprune.recipe import Recipe, Stage

if TYPE_CHECKING:
    from tprune.evaluate.pictures import Picture


@dataclass(eq=False)
class Quality:
    """How good a model's answers are.

    Attributes:
        metrics: `accuracy`, `perplexity` … as they apply, and what they split into.
        predictions: int64 [...], what agreement with the dense model is counted over; or embeddings, float [S, D],
            whose cosines with the dense model's are averaged.
        chance: accuracy of guessing, to warn about a dense model that does no better.
    """

    metrics: dict[str, Any]
    predictions: Tensor
    chance: float | None = None


@dataclass(eq=False)
class Workload:
    """What is timed: one call, and how many items (images, tokens) it works on."""

    run: Callable[[], Any]
    items: int
    unit: str


@dataclass(eq=False)
class Achieved:
    """The budget in the terms of `--keep` and `--sparsity`, and what else is told about it.

    Attributes:
        value: kept fraction (tokens, caches) or removed fraction (weights).
        details: further figures, such as the mean of tokens that leave a layer.
    """

    value: float
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """What a picture shows a method at work on.

    Attributes:
        place: of the evaluation data, counted from 0.
        image: a file instead.
        prompt: text instead, or the question about `image`.
    """

    place: int = 0
    image: str | None = None
    prompt: str | None = None

    @property
    def name(self) -> str:
        """For titles and files."""
        if self.image is not None:
            return Path(self.image).stem
        return f"sample-{self.place}" if self.prompt is None else "prompt"


class Handle(ABC):
    """An edit of a model: what it amounts to, what must be stored, how to undo it."""

    kind: str = "wrapped"
    """The artifact it makes: plain, masked or wrapped."""
    fitted: dict[str, Any] | None = None
    """What was fitted, on what, in how many steps and seconds."""
    recovered: dict[str, Any] | None = None
    """How what was left was trained afterwards, and the quality before."""
    whole: dict[str, Any] = {}
    """Quality of the unpruned model that only the handle could measure, by heads that the method has learned."""

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    @abstractmethod
    def remove(self) -> None:
        """Restore the model exactly; edits in place cannot, and raise UserError."""

    @abstractmethod
    def achieved(self) -> Achieved:
        """The budget as it came out, measured where it can be."""

    @abstractmethod
    def per_layer(self) -> list[dict[str, Any]]:
        """A row per layer: what was kept there."""

    def counting(self) -> AbstractContextManager[None]:
        """Where what is kept depends on the data, what is reported of it is what happens inside."""
        return nullcontext()

    def tensors(self, by_reference: bool) -> dict[str, Tensor]:
        """What `tprune.safetensors` holds: masks, thresholds, learned tensors.

        With `by_reference` the base weights are not stored, so this must hold all that changed.
        """
        return {}


class Pipeline(ABC):
    """The driver of one family, for one stage of a recipe."""

    family: ClassVar[str]
    default_limit: ClassVar[int]
    max_minutes: float | None = None
    """How long a search may take before it stops, to be gone on with; None for no limit."""
    known_losses: dict[bytes, float] | None = None
    """What searches in the same dense model measure, where there are several of them; None where there is one."""
    handle: Handle | None = None
    """What is at work, where the family keeps it."""

    def __init__(self, recipe: Recipe, stage: Stage, method: Method, progress: Progress):
        self.recipe, self.stage, self.method, self.progress = recipe, stage, method, progress

    def counting(self) -> AbstractContextManager[None]:
        """As `Handle.counting`, of the one at work."""
        return nullcontext() if self.handle is None else self.handle.counting()

    def source(self) -> Source:
        """Where the model comes from."""
        return resolve(self.recipe.model, self.family)

    def check(self) -> None:  # noqa: B027  (most families have nothing to add)
        """Refuse, before anything is loaded, a budget that the method cannot take."""

    def load(self) -> Subject:
        """The dense model, as the recipe names it."""
        asked = self.recipe
        return loaders.load(
            self.source(), self.family, device=asked.device, dtype=asked.dtype, seed=asked.seed
        )

    @abstractmethod
    def prepare(self, subject: Subject) -> None:
        """Read the evaluation and calibration data, once; refuse what does not fit the model."""

    def plan(self, subject: Subject) -> None:  # noqa: B027  (most families plan when they prune)
        """Refuse, before the dense model is measured, a budget that the prepared data has no room for."""

    def say_unfitted(self) -> None:
        """Tell that a method which could be fitted to the model runs as it is."""
        if self.stage.fit is None and self.method.state is None and self.method.learns == "optional":
            self.progress.say(f"{self.method.id} runs unfitted; --fit DATA fits it to this model")

    @abstractmethod
    def evaluate(self, subject: Subject) -> Quality:
        """Quality on the evaluation data."""

    @property
    def acting(self) -> Method:
        """The method as it runs at the stage's budget."""
        return self.method

    @abstractmethod
    def workload(self, subject: Subject) -> Workload:
        """The call whose cost is measured, the same for dense and pruned."""

    @abstractmethod
    def apply(self, subject: Subject, work: Path | None, state: dict[str, Tensor] | None = None) -> Handle:
        """Prune.

        Args:
            subject: edited in place or hooked.
            work: a folder for finished parts of a long run, kept over an interruption; None without `--out`.
            state: the tensors of an artifact that is loaded again (on the dense model by reference, on the
                pruned one otherwise: applying them twice changes nothing); nothing is calibrated then.
        """

    def recover(self, subject: Subject, handle: Handle, work: Path | None) -> dict[str, Any]:
        """Train what pruning left, as the stage's `recover` says; the facts for the report. `work` as in `apply`."""
        raise NotImplementedError

    @abstractmethod
    def probe(self, subject: Subject) -> dict[str, Tensor]:
        """A small input, drawn from the seed, and the model's output on it: {"input": …, "output": …}."""

    @abstractmethod
    def describe_data(self) -> dict[str, Any]:
        """The protocol of the evaluation: data, split, samples, hash."""

    def pictures(self, subject: Subject, handle: Handle, sample: Sample) -> list[Picture]:
        """Draw what the method does to one sample; the figures that `handle` reports stay as they are.

        Args:
            subject: with the method in place.
            handle: of the method.
            sample: what to show it; weights have none.

        Raises:
            UserError: the family is not drawn, there is no such sample, or it is of the wrong kind.
        """
        raise UserError(f"there are no pictures of {self.family} yet")

    def beside_dense(self, subject: Subject, call: Callable[[Subject], Any], rounds: int) -> dict[str, Any]:
        """FLOPs, seconds and peak memory of `call` on the dense and the pruned model, taken in turn."""
        from tprune.evaluate.cost import flops, interleaved, peak_memory

        dense = self.unpruned(subject)
        handle = self.apply(subject, None)
        runs = {"dense": lambda: call(dense), "pruned": lambda: call(subject)}
        counted = {name: flops(run) for name, run in runs.items()}
        times = interleaved(runs, subject.device, rounds)
        memory = {name: peak_memory(run, subject.device) for name, run in runs.items()}
        times |= self.scoring(subject, handle, rounds, runs["pruned"])
        handle.remove()
        return {"times": times, "flops": counted, "memory": memory}

    def unpruning(self, handle: Handle) -> AbstractContextManager[Any] | None:
        """While it is open the pruned model does all that pruning is compared with; None where the dense one does."""
        return None

    def unpruned(self, subject: Subject) -> Subject:
        """A second subject with the same tensors, which does all that pruning is compared with."""
        return replace(subject, model=twin(subject.model))

    def scoring(
        self, subject: Subject, handle: Handle, rounds: int, call: Callable[[], Any]
    ) -> dict[str, list[float]]:
        """Seconds of the method's own part of `call`, where it can be told apart: {"scoring": …} or {}."""
        return {}
