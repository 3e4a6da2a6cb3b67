"""What a vision-language model is good for, in any family: answers to questions about images."""

from __future__ import annotations

import zlib
from collections import defaultdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tprune.data import questions
from tprune.errors import UserError
from tprune.models.prompts import noise_prompts
from tprune.models.subject import Subject
from tprune.pipelines.base import Quality, Workload
from tprune.pipelines.vlm_answers import LONGEST_ANSWER, plain, question_inputs, told
from tprune.progress import Progress
from tprune.recipe import Recipe

QUESTIONS = 500
"""How many are asked where the recipe does not say."""


class QuestionTask:
    """Questions as a recipe names them.

    Args:
        recipe: names the data, the limit and the batch size.
        subject: the model, with its processor.
        progress: where to say what goes on.

    Raises:
        UserError: a model without a processor, or no such questions.
    """

    def __init__(self, recipe: Recipe, subject: Subject, progress: Progress):
        self.recipe, self.progress = recipe, progress
        if subject.processor is None:
            raise UserError(
                f"{subject.source.name} has no processor; copy processor_config.json and the tokenizer from the "
                "model's origin"
            )
        self.questions = questions.read(recipe.data, recipe.limit or QUESTIONS)

    @property
    def protocol(self) -> dict[str, Any]:
        """Which questions."""
        return self.questions.protocol

    @torch.no_grad()
    def evaluate(self, subject: Subject) -> Quality:
        """The fraction of answers given word for word, over all questions and for each kind."""
        items, size = self.questions.items, self.recipe.batch_size
        tokenizer = subject.processor.tokenizer
        longest = max(len(tokenizer(item.answer, add_special_tokens=False)["input_ids"]) for item in items)
        said: list[str] = []
        for start in self.progress.track(range(0, len(items), size), "evaluating"):
            places = range(start, min(start + size, len(items)))
            said += self.answers(subject, places, min(longest, LONGEST_ANSWER))
        right = [plain(given) == plain(item.answer) for given, item in zip(said, items, strict=True)]
        kinds = defaultdict(list)
        for item, good in zip(items, right, strict=True):
            kinds[item.kind].append(good)
        metrics: dict[str, Any] = {"accuracy": sum(right) / len(right)}
        if set(kinds) != {None}:
            metrics["accuracy_by_kind"] = {
                kind or "other": sum(good) / len(good) for kind, good in sorted(kinds.items(), key=str)
            }
        predictions = torch.tensor([zlib.crc32(plain(given).encode()) for given in said])
        return Quality(metrics, predictions, chance=self.questions.chance())

    def answers(self, subject: Subject, places: range, longest: int) -> list[str]:
        """What the model says to some of the questions, greedily, at most `longest` tokens."""
        return told(subject, self.inputs(subject, places), longest)

    def inputs(self, subject: Subject, places: range) -> dict[str, Tensor]:
        """What the model is called with to be asked some of the questions."""
        asked = [self.questions.items[place].prompt for place in places]
        return question_inputs(subject, [self.questions.open(place) for place in places], asked)

    def workload(self, subject: Subject) -> Workload:
        """The prefill of one batch of prompts with a noise image each."""
        batch = self.recipe.batch_size
        inputs = noise_prompts(subject.model, batch, self.recipe.seed)
        return Workload(partial(prefill, subject, inputs), batch, "prompts")


def prefill(subject: Subject, inputs: dict[str, Any]) -> Tensor:
    """Logits of the token behind each prompt [B, V]; the caches are filled as for generation."""
    return subject.model(**inputs, use_cache=True, logits_to_keep=1).logits[:, -1]


def probe(subject: Subject, seed: int) -> dict[str, Tensor]:
    """Two prompts with a noise image each, and the logits behind them."""
    inputs = noise_prompts(subject.model, 2, seed)
    with torch.no_grad():
        output = prefill(subject, inputs).float().cpu()
    return {"input": inputs["input_ids"].cpu(), "pixels": inputs["pixel_values"].cpu(), "output": output}
