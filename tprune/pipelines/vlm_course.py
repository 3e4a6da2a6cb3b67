"""Vision-language models and questions with answers, as a fit wants them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tprune.core.budget import Stage
from tprune.data.questions import BoxedQuestions, Questions, TrainingQuestions
from tprune.errors import UserError
from tprune.methods.fit import Fit
from tprune.methods.tokens import TokenMethod
from tprune.models import vlm as adapter
from tprune.models.decoder_fit import DecoderFitDriver, EnoughError, Learning
from tprune.models.projector import Projector
from tprune.models.subject import Subject
from tprune.pipelines.course import Course
from tprune.pipelines.fit_loop import Batches
from tprune.pipelines.vlm_answers import answered_inputs

if TYPE_CHECKING:
    from tprune.pipelines.vlm import VlmPipeline

ANSWERS = "answers"
"""Among the inputs of a step: which of the tokens are answers, bool [B, N]."""
BOXES = "boxes"
"""And where they are read, float32 [B, n, 4], fractions of the image, NaN for none: for a method with these labels."""


@dataclass(eq=False)
class Training:
    """A fit at work: what happens inside the decoder, and before it."""

    driver: DecoderFitDriver
    projector: Projector

    @property
    def memory(self) -> dict[str, Any]:
        """Of the last forward."""
        return self.driver.memory

    def away(self) -> AbstractContextManager[None]:
        """The model without the method, for a while."""
        return self.driver.away()

    def remove(self) -> None:
        """Take all hooks out again."""
        self.driver.remove()
        self.projector.remove()


class VlmCourse(Course):
    """Learns to give the answers: a prompt, the answer, the end.

    Args:
        pipeline: of the method.
        subject: the model with its processor.
        parts: its anatomy.
        data: questions.
    """

    labelled = True

    def __init__(
        self,
        pipeline: VlmPipeline,
        subject: Subject,
        parts: adapter.Anatomy,
        data: Questions | TrainingQuestions | BoxedQuestions,
    ):
        if getattr(subject.processor, "tokenizer", None) is None:
            raise UserError(
                f"{pipeline.method.id} is fitted to answers, which takes a processor with a tokenizer: copy "
                "processor_config.json and the tokenizer from the model's origin, or give tokenizer=PROCESSOR"
            )
        self.pipeline, self.subject, self.parts, self.data = pipeline, subject, parts, data
        self.model = subject.model
        self.shape = pipeline.nominal(parts)
        self.running: DecoderFitDriver | None = None

    def tuned(self, tunes: str) -> list[nn.Parameter]:
        """As everywhere; "language" is all but the vision tower."""
        tower = {id(parameter) for parameter in self.parts.tower.parameters()}
        if tunes == "language":
            return [parameter for parameter in self.model.parameters() if id(parameter) not in tower]
        return super().tuned(tunes)

    def lessons(self, size: int, seed: int, share: tuple[int, int] = (0, 1)) -> Batches:
        """Questions with their answers."""
        return Batches(self.data, None, size, seed, share, self.collated)

    def samples(self, size: int, seed: int) -> Batches:
        """The same: answers are no image tokens."""
        return self.lessons(size, seed)

    def collated(self, samples: Sequence[tuple[Any, tuple]]) -> tuple[dict[str, Tensor], Tensor]:
        """What the model is called with, `ANSWERS` beside it, and the answers' tokens int64 [n], row by row."""
        images, texts = [image for image, _ in samples], [text for _, text in samples]
        asked, answers = ([text[part] for text in texts] for part in (0, 1))
        inputs, ids, real = answered_inputs(self.subject, images, asked, answers)
        inputs[ANSWERS] = functional.pad(real, (inputs["input_ids"].shape[1] - real.shape[1], 0))
        if len(texts[0]) == 3:
            boxes = [torch.tensor(found, dtype=torch.float32) for *_, found in texts]
            padded = nn.utils.rnn.pad_sequence(boxes, batch_first=True, padding_value=torch.nan)
            inputs[BOXES] = padded.to(self.device)
        return inputs, ids[real]

    def outputs(self, inputs: dict[str, Tensor]) -> Tensor | None:
        """Logits of every answer's tokens, [n, V], row by row; None where a fit had seen enough before the decoder."""
        given = {name: value for name, value in inputs.items() if name not in (ANSWERS, BOXES)}
        answers = inputs[ANSWERS]
        longest = int(answers.sum(1).max())
        if self.running is not None:
            self.running.answers = answers
        try:
            logits = self.model(**given, use_cache=False, logits_to_keep=longest + 1).logits
        except EnoughError:
            return None
        return logits[:, :-1][answers[:, -longest:]].float()

    def driver(self, method: TokenMethod, fit: Fit, seed: int) -> Training:
        """`fit` before and inside the decoder."""

        def stages(tokens: int) -> list[Stage]:
            return [Stage(site, tokens) for site in fit.sites]

        learning = Learning(method, fit)
        found = self.pipeline.drivers(self.subject, self.parts, learning, stages, DecoderFitDriver)
        self.running = found[0]
        return Training(*found)

    def measured(self, method: TokenMethod, batches: Sequence[dict[str, Tensor]], seed: int) -> float:
        """Over prompts with their answers."""
        with self.pipeline.put(self.subject, self.parts, method) as handle:
            for inputs in batches:
                self.outputs(inputs)
            return handle.achieved().value
