"""What a text encoder is good for, in any family: classes of passages, or where their embeddings lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tprune.data import passages
from tprune.models import text_encoder
from tprune.models.subject import Subject
from tprune.pipelines.base import Quality, Workload
from tprune.progress import Progress
from tprune.recipe import Recipe


class TextTask:
    """Passages as a recipe names them, for a text encoder with or without a head.

    Args:
        recipe: names the data, the limit, the length and the batch size.
        subject: the encoder.
        progress: where to say what goes on.

    Attributes:
        passages: what is read.
        labels: int64 [S], or None where they do not fit the model.
    """

    def __init__(self, recipe: Recipe, subject: Subject, progress: Progress):
        self.recipe, self.progress = recipe, progress
        self.names = text_encoder.classes(subject.model)
        self.passages = passages.read(recipe.data, recipe.limit, self.names)
        fits = self.passages.fits(len(self.names))
        self.labels = torch.tensor(self.passages.labels) if fits else None
        if not fits:
            self.progress.say(
                "no labels that fit this model: only agreement with the dense model is measured"
            )

    @property
    def protocol(self) -> dict[str, Any]:
        """Which passages, and their length."""
        return self.passages.protocol | {"length": self.recipe.length}

    def batch(self, subject: Subject, texts: Sequence[str]) -> dict[str, Tensor]:
        """Texts as the model wants them."""
        return text_encoder.encode(subject, texts, self.recipe.length)

    @torch.no_grad()
    def evaluate(self, subject: Subject) -> Quality:
        """Accuracy of a classifier; of an encoder the embeddings, whose cosines with the dense model's count."""
        size, items = self.recipe.batch_size, self.passages.items
        starts = range(0, len(items), size)
        found = torch.cat(
            [
                text_encoder.answers(subject.model, self.batch(subject, items[start : start + size])).cpu()
                for start in self.progress.track(starts, "evaluating")
            ]
        )
        if not self.names:
            return Quality({}, found)
        predicted = found.argmax(-1)
        if self.labels is None:
            return Quality({}, predicted)
        accuracy = (predicted == self.labels).double().mean().item()
        return Quality({"accuracy": accuracy}, predicted, chance=1 / len(self.names))

    def workload(self, subject: Subject) -> Workload:
        """The first batch of passages."""
        texts = self.passages.items[: self.recipe.batch_size]
        inputs = self.batch(subject, texts)
        return Workload(lambda: text_encoder.answers(subject.model, inputs), len(texts), "texts")


def probe(subject: Subject, seed: int) -> dict[str, Tensor]:
    """Three rows of random tokens, one of them shorter, and the model's answers."""
    inputs = text_encoder.noise(subject.model, 3, 16, seed)
    with torch.no_grad():
        output = text_encoder.answers(subject.model, inputs)
    return {"input": inputs["input_ids"].cpu(), "output": output.cpu()}
