"""Pruning a decoder that embeds texts: what it is calibrated on and measured by."""

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
from tprune.models.subject import Subject
from tprune.models.text_encoder import is_encoder, noise
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
    """Whether a stage looks at the embeddings of a decoder."""
    config = getattr(subject.model, "config", None)
    return hasattr(subject.model, "get_decoder") and not is_encoder(config) and _embedder(recipe) is not None


def check(stage: Stage, method: WeightMethod, recipe: Recipe) -> None:
    """Refuse training that foretells tokens, and what reads a model block by block.

    Raises:
        UserError: naming the option or the method.
    """
    if stage.recover is not None:
        raise UserError(
            f"--recover {stage.recover}: it trains a model to foretell tokens, and {_embedder(recipe).id} prunes one "
            "that embeds texts; leave it out"
        )
    if recipe.max_memory is not None:
        raise UserError(f"--max-memory {recipe.max_memory}: the whole model embeds texts; leave it out")


def calibration(
    recipe: Recipe, subject: Subject, method: WeightMethod, progress: Progress
) -> tuple[embeddings.Texts, Tensor | None]:
    """Triples drawn from the seed: all queries, then all positives, then all negatives; no classes."""
    found = triples.read(recipe.data, "calibration")
    order = torch.randperm(len(found.items), generator=torch.Generator().manual_seed(recipe.seed))
    return encoded(recipe, subject, found, order[: recipe.calibration or CALIBRATION].tolist()), None


def encoded(recipe: Recipe, subject: Subject, found: triples.Triples, places: list[int]) -> embeddings.Texts:
    """Some triples as the model wants them: queries, positives, negatives."""
    texts = [found.items[place][part] for part in range(3) for place in places]
    instructions = [found.instructions[place] for place in places] + [""] * (2 * len(places))
    return embeddings.encode(subject, texts, instructions, recipe.length or LENGTH)


class Task:
    """Triples that calibration did not see.

    Attributes:
        texts: as `encoded` gives them.
        protocol: which, for the report.
    """

    def __init__(self, recipe: Recipe, subject: Subject, progress: Progress):
        self.recipe, self.progress, self.method = recipe, progress, _embedder(recipe)
        found = triples.read(recipe.data, "evaluation")
        count = min(len(found.items), recipe.limit or MEASURED)
        self.texts = encoded(recipe, subject, found, list(range(count)))
        self.protocol: dict[str, Any] = found.protocol | {"samples": count, "length": recipe.length or LENGTH}

    def evaluate(self, subject: Subject) -> Quality:
        """The share of queries whose positive is nearest of all positives and negatives; all embeddings."""
        decoder, size = find_decoder(subject.model), self.recipe.batch_size
        starts = range(0, len(self.texts), size)
        found = torch.cat(
            [
                embeddings.embed(decoder, self.texts[start : start + size], self.method.pool)
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
        return Workload(lambda: embeddings.embed(decoder, batch, self.method.pool), len(batch), "texts")


def probe(subject: Subject, seed: int) -> dict[str, Tensor]:
    """Two rows of random tokens, and what leaves the last norm at the last two of each."""
    ids = noise(subject.model, 2, 16, seed)["input_ids"]
    with torch.no_grad():
        hidden = find_decoder(subject.model).core(input_ids=ids, use_cache=False).last_hidden_state
    return {"input": ids.cpu(), "output": hidden[:, -2:].float().cpu()}


def _embedder(recipe: Recipe) -> WeightMethod | None:
    """The first method among the stages that looks at embeddings."""
    methods = (registry.build(stage.method, stage.family, stage.set) for stage in recipe.stages)
    return next((method for method in methods if "contrast" in getattr(method, "stats", ())), None)
