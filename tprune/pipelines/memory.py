"""What `--max-memory` leaves for calibration: how many sequences at a time, and whether activations go to disk."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tprune.errors import UserError
from tprune.evaluate.perplexity import score_batch
from tprune.methods.weights import WeightMethod
from tprune.models.blocks import Decoder
from tprune.models.calibrate import Stream
from tprune.models.embeddings import TripleSets
from tprune.models.gradients import POWERS
from tprune.models.memory import give_back
from tprune.models.pair_stream import stream_of
from tprune.models.subject import pages_of
from tprune.pipelines.weights_kinds import Samples
from tprune.progress import Progress
from tprune.recipe import Recipe, size

COPIES = 8
"""Float32 tensors of a matrix's size that pruning it may need at a time: itself, scores, their order, masks."""
FLOAT = 4
PER_LOGIT = 3 * FLOAT
"""Bytes that scoring takes for each logit: itself, in float32, and its logarithm of a probability."""


@dataclass(frozen=True)
class Room:
    """How calibration keeps within its share.

    Attributes:
        rows: sequences that go through a block together.
        spill: whether the activations between two blocks are in a file.
    """

    rows: int
    spill: bool


def check(recipe: Recipe, method: WeightMethod) -> None:
    """Refuse what needs the whole model at once.

    Raises:
        UserError: with the mend.
    """
    said = f"--max-memory {recipe.max_memory}"
    size(recipe.max_memory)
    if method.scope != "block" or method.wraps or set(method.stats) & POWERS.keys():
        raise UserError(
            f"{said}: {method.id} looks at the whole model at once; block by block go those that need only a layer "
            "and its inputs, such as wanda, sparsegpt or alps"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"{said}: blocks are read by one process; start one, or leave it out")
    if len(recipe.stages) > 1 or recipe.stage.recover is not None:
        raise UserError(
            f"{said}: further stages and --recover need the whole model; run them on the output folder"
        )


def calibration(
    decoder: Decoder,
    method: WeightMethod,
    tokens: Samples,
    recipe: Recipe,
    folder: Path | None,
) -> Stream:
    """Sequences, tokens int64 [N, L] or other samples, before the first block; tokens within `--max-memory`, where
    `folder` takes what does not fit.
    """
    if recipe.max_memory is None:
        tokens = tokens.texts if isinstance(tokens, TripleSets) else tokens
        return stream_of(decoder, tokens, recipe.batch_size)
    found = room(decoder, method, tuple(tokens.shape), recipe.batch_size, recipe.max_memory)
    spill = (folder or Path(tempfile.gettempdir())) if found.spill else None
    return stream_of(decoder, tokens, found.rows, spill)


@torch.no_grad()
def score_paged(stream: Stream, limit: str, progress: Progress) -> tuple[Tensor, Tensor]:
    """As `score_windows`, of the sequences of a stream before the first block, every block read once.

    A head in a file is read for every part of the logits, so they may take half of what `--max-memory` leaves.
    """
    decoder, losses, predictions = stream.decoder, [], []
    at_once = max(1, (size(limit) - pages_of(decoder.model).outside) // (2 * PER_LOGIT))
    for index in progress.track(range(len(decoder.blocks)), "perplexity"):
        stream.advance(index)
    pairs = zip(stream.hidden.split(stream.rows), stream.tokens.split(stream.rows), strict=True)
    for hidden, tokens in pairs:
        with stream.answering(hidden):
            found = score_batch(decoder.model, tokens.to(hidden.device), at_once)
        losses.append(found[0])
        predictions.append(found[1])
        give_back()  # logits
    return torch.cat(losses), torch.cat(predictions)


def room(decoder: Decoder, method: WeightMethod, tokens: tuple[int, int], most: int, limit: str) -> Room:
    """What fits beside what is held outside a model's blocks, its largest block, and what pruning a matrix takes.

    Half of the rest is for what a block computes inside, half for the activations of all sequences.

    Args:
        decoder: paged.
        method: whose statistics count.
        tokens: sequences and tokens per sequence.
        most: sequences together, at most.
        limit: as `--max-memory` has it.

    Raises:
        UserError: not even one sequence fits.
    """
    outside = pages_of(decoder.model).outside
    block = max(sum(tensor.nbytes for tensor in one.parameters()) for one in decoder.blocks)
    shapes = {matrix.name: matrix.shape for matrix in decoder.matrices(len(decoder.blocks) - 1)}
    pruning = COPIES * FLOAT * max(rows * columns for rows, columns in shapes.values())
    if "gram" in method.stats:
        widths = {columns for _, columns in shapes.values()}
        pruning += FLOAT * (sum(width**2 for width in widths) + 2 * max(widths) ** 2)
    sequence = tokens[1] * FLOAT * sum(sum(shape) for shape in shapes.values())
    left = size(limit) - outside - block - pruning
    rows = left // (2 * sequence)
    if rows < 1:
        least = (outside + block + pruning + 2 * sequence) / 2**20
        raise UserError(
            f"--max-memory {limit}: too little for one sequence of {tokens[1]} tokens; give at least {least:.0f}MB "
            f"({outside / 2**20:.0f} MB of it are outside the blocks), or a smaller --length"
        )
    held = (
        tokens[0] * tokens[1] * decoder.config.hidden_size * next(decoder.blocks.parameters()).element_size()
    )
    return Room(min(rows, most), held > left // 2)
