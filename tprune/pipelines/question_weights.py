"""Pruning the decoder of a vision-language model, calibrated on questions about images with their answers."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from tprune.data import questions
from tprune.errors import UserError
from tprune.methods import registry
from tprune.methods.weights import WeightMethod
from tprune.models.feed import Prompts
from tprune.models.subject import Subject
from tprune.pipelines import question_task
from tprune.pipelines.drawn import CALIBRATION as CALIBRATION
from tprune.pipelines.drawn import drawn
from tprune.pipelines.vlm_answers import answered_inputs
from tprune.progress import Progress
from tprune.recipe import Recipe, Stage

Task = question_task.QuestionTask
probe = question_task.probe


def admits(subject: Subject, recipe: Recipe) -> bool:
    """Whether this is a vision-language model with its processor, and the data, if named, is questions about images.

    Text remains what these are calibrated on: methods that look at all blocks together, a model that is read block by
    block, and one whose decoder takes features of images between its blocks (Qwen3-VL).
    """
    model, processor = subject.model, subject.processor
    config = getattr(model, "config", None)
    seen = hasattr(config, "image_token_id") and all(
        hasattr(processor, part) for part in ("tokenizer", "image_processor")
    )
    if not seen or hasattr(model.get_decoder(), "_deepstack_process") or recipe.max_memory is not None:
        return False
    if any(registry.load(stage.method, stage.family).scope != "block" for stage in recipe.stages):
        return False
    return recipe.data is None or (Path(recipe.data) / questions.FILE).is_file()


def check(stage: Stage, method: WeightMethod, recipe: Recipe) -> None:
    """Refuse a length of text.

    Raises:
        UserError: naming the option.
    """
    if recipe.length is not None:
        raise UserError(
            f"--length {recipe.length}: {recipe.model.name} is calibrated on questions about images, which have their "
            "own lengths; leave it out, or give --data TEXT"
        )


def calibration(
    recipe: Recipe, subject: Subject, method: WeightMethod, progress: Progress
) -> tuple[Prompts, Tensor | None]:
    """Scenes of training digits with a question each, or of the folder that `--data` names; no classes.

    Each is a prompt, its image within, with the answer behind it.
    """
    found, chosen = drawn(
        recipe, questions.TrainingQuestions, questions.read, question_task.QUESTIONS, progress
    )
    inputs = []
    for place in chosen:
        image, (prompt, answer) = found.sample(place)
        given, _, _ = answered_inputs(subject, [image], [prompt], [answer])
        inputs.append({name: value.cpu() for name, value in given.items() if isinstance(value, Tensor)})
    return Prompts(inputs, subject.model.config.image_token_id), None
