"""The driver of `tprune llm-context` where tokens leave inside a text encoder: BERT-type classifiers and embedders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tprune.data import passages
from tprune.errors import UserError
from tprune.methods.fit import Fit
from tprune.methods.tokens import Shape, TokenMethod
from tprune.models import text_encoder
from tprune.models.anatomy import Anatomy
from tprune.models.subject import Subject
from tprune.models.text_driver import TextDriver, TextFitDriver, anatomy
from tprune.pipelines.base import Achieved, Handle, Pipeline, Quality, Sample, Workload
from tprune.pipelines.course import Course
from tprune.pipelines.fit_loop import Batches
from tprune.pipelines.learned import untuned
from tprune.pipelines.text_task import TextTask, probe
from tprune.pipelines.tokens import solve
from tprune.pipelines.vit import VitHandle


class EncoderHandle(VitHandle):
    """A token method at work inside a text encoder."""

    kept: float | None = None

    @contextmanager
    def counting(self) -> Iterator[None]:
        """What is reported of tokens is what happens inside."""
        self.driver.reset()
        yield
        self.counted, self.kept = self.driver.entering, self.driver.kept

    def achieved(self) -> Achieved:
        """The mean fraction of tokens, behind the class token, that entered a sublayer."""
        kept = self.driver.kept if self.kept is None else self.kept
        return Achieved(kept, {"tokens_entering_mean": sum(self.entering) / len(self.entering)})


class EncoderPipeline(Pipeline):
    """Load, measure and prune a text encoder."""

    family = "llm-context"
    handle: EncoderHandle | None = None
    fitted: dict[str, Any] | None = None
    lessons: passages.Passages | None = None

    def check(self) -> None:
        """A fit is asked for where there is one to make, and no positions are but the tokens' own."""
        self.method.check_fit(self.stage.fit)
        if self.stage.positions not in (None, "original"):
            raise UserError(
                f"--positions {self.stage.positions}: a text encoder's tokens keep their positions; leave it out"
            )

    def prepare(self, subject: Subject) -> None:
        """Read the passages; refuse a model that is no text encoder before anything is measured."""
        shape = anatomy(subject.model).shape
        self.method.check(shape)
        self.check_budget()
        self.task = TextTask(self.recipe, subject, self.progress)
        if self.stage.fit is not None and self.method.state is None:
            self.lessons = self.read_lessons(subject)
            self.progress.say(f"{len(self.lessons):,} texts to learn from")
        self.say_unfitted()

    def read_lessons(self, subject: Subject) -> passages.Passages:
        """What `--fit` names.

        Raises:
            UserError: no such texts, or a model without a classifier.
        """
        names = text_encoder.classes(subject.model)
        if not names:
            raise UserError(
                f"--fit {self.stage.fit}: {subject.source.name} has no classifier to fit {self.method.id} to; give one "
                "such as minilm-topics"
            )
        return passages.training(self.stage.fit, names)

    def evaluate(self, subject: Subject) -> Quality:
        """Accuracy, or where embeddings lie."""
        with self.counting():
            return self.task.evaluate(subject)

    def workload(self, subject: Subject) -> Workload:
        """One batch of passages."""
        return self.task.workload(subject)

    def apply(
        self, subject: Subject, work: Path | None, state: dict[str, Tensor] | None = None
    ) -> EncoderHandle:
        """Put the method in place."""
        parts = anatomy(subject.model)
        if state or (state is not None and self.stage.fit is not None):
            self.method = self.method.bind(untuned(subject, state))
        self.check()
        if self.method.state is None and self.stage.fit is not None:
            self.method, self.fitted = self.fit(subject, parts, work)
        elif self.stage.keep == 1:
            self.method = self.method.loosened(1.0, parts.shape)
        self.check_budget()
        driver = TextDriver(parts, self.method, stages(self.method, parts.shape), self.recipe.seed)
        self.handle = EncoderHandle(driver, self.fitted)
        return self.handle

    def check_budget(self) -> None:
        """Refuse a budget that nothing meets: no fit, and nothing learned before."""
        keep, learned = self.stage.keep, self.stage.fit is not None or self.method.state is not None
        if keep not in (None, 1) and not learned:
            raise UserError(
                f"--keep {keep:g}: {self.method.id} learns how many tokens stay: add --fit DATA (--fit built-in), or "
                f"give --set {self.method.native[0]} instead"
            )

    def fit(self, subject: Subject, parts: Anatomy, work: Path | None) -> tuple[TokenMethod, dict[str, Any]]:
        """The method with what it learned from `--fit`, and the facts of the fit."""
        from tprune.pipelines.fit import Fitting

        lessons = self.lessons or self.read_lessons(subject)
        course = TextCourse(subject, parts, lessons, self.recipe.length)
        return Fitting(self.method, self.stage.keep, self.recipe.seed, course, work, self.progress).run()

    def probe(self, subject: Subject) -> dict[str, Tensor]:
        """Rows of random tokens, and the model's answers."""
        return probe(subject, self.recipe.seed)

    def describe_data(self) -> dict[str, Any]:
        """Which passages."""
        return self.task.passages.protocol

    def pictures(self, subject: Subject, handle: Handle, sample: Sample) -> list[Any]:
        """Encoders are not drawn."""
        raise UserError("there are no pictures of text encoders; of a decoder such as smollm2-135m there are")

    def bench(self, subject: Subject, rounds: int) -> dict[str, Any]:
        """Dense and pruned batches in turn."""
        task = TextTask(self.recipe, subject, self.progress)
        texts = task.passages.items[: self.recipe.batch_size]
        inputs = task.batch(subject, texts)
        found = self.beside_dense(subject, lambda one: text_encoder.answers(one.model, inputs), rounds)
        return found | {"items": len(texts), "unit": "texts"}


class TextCourse(Course):
    """Learns from passages and their classes.

    Args:
        subject: the classifier.
        parts: its anatomy.
        data: training passages.
        length: tokens at most; None for what the model has positions for.
    """

    unit = "texts"

    def __init__(self, subject: Subject, parts: Anatomy, data: passages.Passages, length: int | None):
        self.subject, self.model, self.parts = subject, subject.model, parts
        self.data, self.length, self.shape = data, length, parts.shape
        self.labelled = data.fits(parts.shape.classes)

    def lessons(self, size: int, seed: int, share: tuple[int, int] = (0, 1)) -> Batches:
        """Texts with their classes."""
        return Batches(self.data, None, size, seed, share, self.collated)

    def samples(self, size: int, seed: int) -> Batches:
        """The same."""
        return self.lessons(size, seed)

    def collated(self, samples: Sequence[tuple[str, int]]) -> tuple[dict[str, Tensor], Tensor]:
        """Texts as the model wants them, and their classes int64 [b]."""
        texts, labels = zip(*samples, strict=True)
        return text_encoder.encode(self.subject, texts, self.length), torch.tensor(labels)

    def outputs(self, inputs: dict[str, Tensor]) -> Tensor:
        """Logits, [B, C], without dropout, which would draw from the global generator."""
        self.model.eval()
        return text_encoder.answers(self.model, inputs)

    def driver(self, method: TokenMethod, fit: Fit, seed: int) -> TextFitDriver:
        """`fit` inside the encoder."""
        return TextFitDriver(self.parts, method, fit, seed)

    def measured(self, method: TokenMethod, batches: Sequence[dict[str, Tensor]], seed: int) -> float:
        """Over batches of texts."""
        driver = TextDriver(self.parts, method, stages(method, self.shape), seed)
        try:
            for inputs in batches:
                self.outputs(inputs)
            return driver.kept
        finally:
            driver.remove()


def stages(method: TokenMethod, shape: Shape) -> tuple:
    """Where tokens may leave; how many do, the method decides."""
    return solve(method, shape, None)


PIPELINE = EncoderPipeline
