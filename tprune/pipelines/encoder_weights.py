"""Pruning the weights of a text encoder: which of the family's options go with one, and what it is calibrated on."""

from __future__ import annotations

import torch
from torch import Tensor

from tprune.data import passages
from tprune.errors import UserError
from tprune.methods.weights import WeightMethod
from tprune.models import text_encoder
from tprune.models.gradients import MEASURED
from tprune.models.subject import Subject
from tprune.pipelines import text_task
from tprune.progress import Progress
from tprune.recipe import Recipe, Stage

LENGTH = 32
"""Tokens of a calibration sequence."""
CALIBRATION = 128
"""How many of them."""

Task = text_task.TextTask
probe = text_task.probe


def admits(subject: Subject, recipe: Recipe) -> bool:
    """Whether this is a text encoder."""
    config = getattr(subject.model, "config", None)
    return config is not None and text_encoder.is_encoder(config)


def check(stage: Stage, method: WeightMethod, recipe: Recipe) -> None:
    """Refuse what needs a language model's loss.

    Raises:
        UserError: naming the option or the method.
    """
    if (method.measures and method.runs_on != ("encoder",)) or method.scope == "whole":
        raise UserError(
            f"{stage.method} measures how well a language model foretells text, and {recipe.model.name} is an "
            "encoder; choose kcm, or another method that does not search"
        )
    if stage.recover is not None:
        raise UserError(f"--recover {stage.recover}: {recipe.model.name} is an encoder; leave it out")


def calibration(
    recipe: Recipe, subject: Subject, method: WeightMethod, progress: Progress
) -> tuple[Tensor, Tensor | None]:
    """Passages that fill a sequence, cut to its length, so that none has padding; drawn from the seed.

    Returns:
        int64 [N, L], and their classes, int64 [N], or None where there are none that fit the model.

    Raises:
        UserError: no passage is long enough, or the method reads gradients and there are no classes.
    """
    names, length = text_encoder.classes(subject.model), recipe.length or LENGTH
    found = passages.read(recipe.data, None, names, "train")
    if not found.fits(len(names)) and set(method.stats) & set(MEASURED):
        raise UserError(
            f"{method.id} reads gradients of a classifier's loss: --data FILE with text and label, and a model with a "
            "classifier of such labels, such as minilm-topics"
        )
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(recipe.seed)).tolist()
    chosen: dict[int, Tensor] = {}
    longest = 0
    for place in order:
        row = text_encoder.encode(subject, [found.items[place]], length)["input_ids"][0].cpu()
        longest = max(longest, len(row))
        if len(row) == length:
            chosen[place] = row
        if len(chosen) == (recipe.calibration or CALIBRATION):
            break
    if not chosen:
        raise UserError(f"--length {length}: the longest passage has {longest} tokens; give at most that")
    classes = torch.tensor(found.labels)[list(chosen)] if found.fits(len(names)) else None
    return torch.stack(list(chosen.values())), classes
