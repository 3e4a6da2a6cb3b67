"""Pruning by scores that are trained with the weights (`methods.trained`), on text or passages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tprune.core.mask import count_true
from tprune.core.weights import WeightEdit
from tprune.data import passages, text
from tprune.errors import BudgetError, UserError
from tprune.methods.fit import Plan
from tprune.methods.trained import TrainedMethod
from tprune.models import masks, text_encoder
from tprune.models.blocks import Decoder
from tprune.models.calibrate import rows_at_once
from tprune.models.gradients import asking_for
from tprune.models.matrix import Matrix
from tprune.models.scored import Scores, scored
from tprune.models.subject import Subject
from tprune.pipelines.fit import processes
from tprune.pipelines.fit_loop import Batches, Loop
from tprune.pipelines.recover import TRAINED, NextToken

if TYPE_CHECKING:
    from tprune.pipelines.llm_weights import LlmWeights


class Masking:
    """What the loop asks of a method that masks.

    Attributes:
        method: decides what is masked.
        scores: of the model that is trained.
        sparsity: at the end, or None.
        done: how much of the training is over.
        generator: set by the loop; nothing is drawn.
    """

    generator: torch.Generator

    def __init__(self, method: TrainedMethod, scores: Scores, sparsity: float | None):
        self.method, self.scores, self.sparsity = method, scores, sparsity
        self.settle(0.0)

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Scores with their own learning rate, weights, and what no weight decay touches."""
        scores = [part.score for part in self.scores.parts.values()]
        own = set(scores)
        rest = [one for one in model.parameters() if one.requires_grad and one not in own]
        return [
            {"params": scores, "lr": self.method.score_lr, "weight_decay": 0.0},
            {"params": [one for one in rest if one.dim() > 1]},
            {"params": [one for one in rest if one.dim() < 2], "weight_decay": 0.0},
        ]

    def settle(self, done: float) -> None:
        """Before the first step and after every one: mask what the scores now say."""
        self.done = done
        with torch.no_grad():
            self.scores.mask(self.method.removed(self.scores.values(), done, self.sparsity))

    def penalty(self) -> dict[str, Tensor]:
        """What the scores add to the loss, by name."""
        found = self.method.penalty(self.scores.values(), self.done)
        return {} if found is None else {"penalty": found}


class Penalized(NextToken):
    """A language model's loss, and what its scores add to it."""

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The losses of sequences [b, L] by name."""
        return super().forward(inputs, labels) | self.fit.penalty()


class Classified(nn.Module):
    """The same of a text encoder that tells texts apart, as the loop trains it."""

    def __init__(self, subject: Subject, fit: Masking, length: int | None):
        super().__init__()
        self.model, self.fit = subject.model, fit
        self.encode = partial(text_encoder.encode, subject, length=length)

    def forward(self, inputs: Sequence[str], labels: Tensor) -> dict[str, Tensor]:
        """The losses of texts, and of their classes int64 [b], by name."""
        logits = text_encoder.answers(self.model, self.encode(inputs))
        found = nn.functional.cross_entropy(logits, labels.to(logits.device))
        return {"classes": found} | self.fit.penalty()


@dataclass(frozen=True, eq=False)
class Lessons:
    """What a model is trained on.

    Attributes:
        data: what a step draws from.
        unit: what it consists of.
        learner: the model with its loss, for what is fitted in it.
        at_once: how many go through the model together; None for all of a step.
        batches: the steps, as `Batches` with the number per step, the seed and the share.
    """

    data: Any
    unit: str
    learner: Callable[[Masking], nn.Module]
    at_once: int | None
    batches: Callable[[int, int, tuple[int, int]], Batches]


def lessons(driver: LlmWeights, subject: Subject) -> Lessons:
    """Text for a language model, passages with classes for an encoder, as `--fit` names them.

    Raises:
        UserError: an encoder without a classifier for the labels that there are.
    """
    source, recipe = driver.stage.fit, driver.recipe
    if text_encoder.is_encoder(subject.model.config):
        names = text_encoder.classes(subject.model)
        told = passages.training(source, names)
        if not told.fits(len(names)):
            raise UserError(
                f"--fit {source}: {driver.method.id} learns from classes; give a FILE with text and label, and a model "
                "with a classifier of such labels, such as minilm-topics"
            )
        return Lessons(
            told,
            "passages",
            lambda fit: Classified(subject, fit, recipe.length),
            None,
            lambda *given: Batches(told, None, *given, collate=_texts),
        )
    data = text.training(source, driver.tokenizer(subject), driver.length)
    return Lessons(
        data,
        "sequences",
        lambda fit: Penalized(subject.model, fit),
        rows_at_once(recipe.batch_size, driver.length, subject.device),
        lambda *given: Batches(data, None, *given),
    )


def _texts(samples: Sequence[tuple[str, int]]) -> tuple[list[str], Tensor]:
    """The texts of a step, and their classes int64 [b]."""
    return [text for text, _ in samples], torch.tensor([label for _, label in samples])


def learn(
    driver: LlmWeights, subject: Subject, decoder: Decoder, sparsity: float | None, work: Path | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Train and mask a decoder in place on what `--fit` names.

    Args:
        driver: its stage's method is a `TrainedMethod`.
        subject, decoder: the model.
        sparsity: of all matrices, or None.
        work: a folder for the checkpoint, or None.

    Returns:
        The record of all edits with every parameter that was trained, and the facts for the report.

    Raises:
        BudgetError: `sparsity` rounds to no weight.
    """
    method, recipe, model = driver.method, driver.recipe, subject.model
    course = lessons(driver, subject)
    matrices = [matrix for index in range(len(decoder.blocks)) for matrix in decoder.matrices(index)]
    trained = trainable(model)
    plan = Plan(
        method.epochs,
        method.batch,
        method.lr,
        warmup=method.warmup,
        weight_decay=method.weight_decay,
        linear=True,
        clip=method.clip,
        at_once=course.at_once,
    )
    file = None if work is None else work / f"stage-{recipe.stages.index(driver.stage)}-scores.safetensors"
    accelerator = processes(model, plan.batch)
    share = accelerator.process_index, accelerator.num_processes
    with torch.enable_grad(), asking_for(model, trained.values()), scored(model, matrices) as scores:
        learner = course.learner(Masking(method, scores, sparsity))
        loop = Loop(learner, plan, len(course.data), file, driver.progress, course.unit)
        loop.run(course.batches(plan.batch, recipe.seed, share), accelerator, recipe.seed)
        gone = scores.masks()
    if sparsity and not any(count_true(mask) for mask in gone):
        raise BudgetError(f"--sparsity {sparsity:g} rounds to no weight at all in this model; ask for more")
    edits = masks.record(_edited(matrices, gone))
    kept = {matrix.parameter_name for matrix in matrices}
    edits |= {TRAINED + name: one.data.cpu() for name, one in trained.items() if name not in kept}
    facts = {"data": course.data.protocol, **loop.figures(), "seconds": round(loop.seconds, 1)}
    return edits, facts


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters of a model but its embeddings, by name."""
    embedded = {part.weight for part in model.modules() if isinstance(part, nn.Embedding)}
    return {name: one for name, one in model.named_parameters() if one not in embedded}


def _edited(matrices: list[Matrix], gone: list[Tensor]) -> Iterator[tuple[Matrix, WeightEdit]]:
    """Every matrix without what is masked in it, and the edit that says so."""
    for matrix, mask in zip(matrices, gone, strict=True):
        edit = WeightEdit(mask, matrix.read().masked_fill_(mask, 0.0))
        masks.apply(matrix, edit)
        yield matrix, edit
