"""Pruning a model that embeds texts: what it is calibrated on and measured by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tprune.data import triples
from tprune.errors import UserError
from tprune.methods import registry
from tprune.methods.weights import WeightMethod
from tprune.models import embeddings
from tprune.models.blocks import find_decoder
from tprune.models.gradients import TRIPLES
from tprune.models.subject import Subject
from tprune.models.text_encoder import is_encoder, longest, noise
from tprune.pipelines.base import Quality, Workload
from tprune.progress import Progress
from tprune.recipe import Recipe, Stage

LENGTH = 512
"""Tokens of a text, at most."""
CALIBRATION = 64
"""How many triples."""
MEASURED = 64
"""How many are measured where the recipe does not say."""


def admits(subject: Subject, recipe: Recipe) -> bool:
    """Whether a stage looks at the embeddings of texts, and the model is one whose it can."""
    method = _embedder(recipe)
    if method is None or not hasattr(subject.model, "get_decoder"):
        return False
    return not is_encoder(subject.model.config) or "encoder" in method.runs_on


def check(stage: Stage, method: WeightMethod, recipe: Recipe) -> None:
    """Refuse what compares foretold tokens, training that does, and what reads a model block by block.

    Raises:
        UserError: naming the option or the method.
    """
    if method.measures or method.teacher:
        raise UserError(
            f"{stage.method} compares what a model answers to sequences of one length, and {_embedder(recipe).id} is "
            "calibrated on texts of many; run it before, with a recipe of its own"
        )
    if stage.recover is not None:
        raise UserError(
            f"--recover {stage.recover}: it trains a model to foretell tokens, and {_embedder(recipe).id} prunes one "
            "that embeds texts; leave it out"
        )
    if recipe.max_memory is not None:
        raise UserError(f"--max-memory {recipe.max_memory}: the whole model embeds texts; leave it out")


def calibration(
    recipe: Recipe, subject: Subject, method: WeightMethod, progress: Progress
) -> tuple[embeddings.Texts | embeddings.TripleSets, Tensor | None]:
    """Triples drawn from the seed: all queries, then all positives, then all negatives; no classes.

    For a method that compares a domain with general text: those of both, in batches.
    """
    if TRIPLES not in method.stats:
        return drawn(recipe, subject, triples.read(recipe.data, "calibration")), None
    general = None if method.general == "built-in" else method.general
    if recipe.data is None and general is None:
        found = triples.built_in(domain=True), triples.built_in(domain=False)
    else:
        found = (
            triples.read(recipe.data, "calibration"),
            triples.read(general, "calibration", "--set general"),
        )
    pool = embeddings.pool_of(subject.model, method)
    sets = (
        embeddings.Contrast(drawn(recipe, subject, one), pool, method.loss, method.batch) for one in found
    )
    return embeddings.TripleSets(*sets), None


def drawn(recipe: Recipe, subject: Subject, found: triples.Triples) -> embeddings.Texts:
    """As many triples as calibration takes, by the seed."""
    order = torch.randperm(len(found.items), generator=torch.Generator().manual_seed(recipe.seed))
    return encoded(recipe, subject, found, order[: recipe.calibration or CALIBRATION].tolist())


def encoded(recipe: Recipe, subject: Subject, found: triples.Triples, places: list[int]) -> embeddings.Texts:
    """Some triples as the model wants them: queries, positives, negatives."""
    texts = [found.items[place][part] for part in range(3) for place in places]
    instructions = [found.instructions[place] for place in places] + [""] * (2 * len(places))
    made = embeddings.encode(subject, texts, instructions, _length(recipe, subject))
    if is_encoder(subject.model.config):
        made.begin = [0] * len(made)  # the class token counts
    return made


def _length(recipe: Recipe, subject: Subject) -> int:
    """Tokens of a text, at most.

    Raises:
        UserError: more than the model has positions for.
    """
    config = subject.model.config
    most = longest(subject) if is_encoder(config) else getattr(config, "max_position_embeddings", None)
    if most is not None and (recipe.length or 0) > most:
        raise UserError(f"--length {recipe.length}: this model has {most} positions; give at most that")
    return recipe.length or min(LENGTH, most or LENGTH)


class Task:
    """Triples that calibration did not see.

    Attributes:
        texts: as `encoded` gives them.
        protocol: which, for the report.
    """

    def __init__(self, recipe: Recipe, subject: Subject, progress: Progress):
        self.recipe, self.progress = recipe, progress
        self.pool = embeddings.pool_of(subject.model, _embedder(recipe))
        found = triples.read(recipe.data, "evaluation")
        count = min(len(found.items), recipe.limit or MEASURED)
        self.texts = encoded(recipe, subject, found, list(range(count)))
        self.protocol: dict[str, Any] = found.protocol | {
            "samples": count,
            "length": _length(recipe, subject),
        }

    def evaluate(self, subject: Subject) -> Quality:
        """The share of queries whose positive is nearest of all positives and negatives; all embeddings."""
        decoder, size = find_decoder(subject.model), self.recipe.batch_size
        starts = range(0, len(self.texts), size)
        found = torch.cat(
            [
                embeddings.embed(decoder, self.texts[start : start + size], self.pool)
                for start in self.progress.track(starts, "evaluating")
            ]
        )
        queries, *others = normalize(found, dim=1).chunk(3)
        nearest = (queries @ torch.cat(others).T).argmax(1)
        accuracy = (nearest == torch.arange(len(queries))).double().mean().item()
        return Quality({"accuracy": accuracy}, found, chance=1 / (2 * len(queries)))

    def workload(self, subject: Subject) -> Workload:
        """One batch of queries."""
        batch, decoder = self.texts[: self.recipe.batch_size], find_decoder(subject.model)
        return Workload(lambda: embeddings.embed(decoder, batch, self.pool), len(batch), "texts")


def probe(subject: Subject, seed: int) -> dict[str, Tensor]:
    """Two rows of random tokens, and what leaves the last norm at the last two of each."""
    ids = noise(subject.model, 2, 16, seed)["input_ids"]
    with torch.no_grad():
        hidden = find_decoder(subject.model).core(input_ids=ids, use_cache=False).last_hidden_state
    return {"input": ids.cpu(), "output": hidden[:, -2:].float().cpu()}


def _embedder(recipe: Recipe) -> WeightMethod | None:
    """The first method among the stages that looks at embeddings."""
    methods = (registry.build(stage.method, stage.family, stage.set) for stage in recipe.stages)
    return next(
        (method for method in methods if {"contrast", TRIPLES} & {*getattr(method, "stats", ())}), None
    )
