"""TokenButler foresees, beside the first layer, which keys every head of every later layer will look at.

A predictor of about one percent of the model's size reads what the first layer's attention is given and makes a small
query and key per layer and head. Their products stand for the attention logits: a token then reads only the keys
where these are largest. Nothing is forgotten.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from tprune.core.threshold import largest_of_each
from tprune.errors import UserError
from tprune.methods.base import Paper, param
from tprune.methods.cache import CacheMethod

ROWS = 256
"""Queries that choose at once: what is sorted takes memory."""


@dataclass(frozen=True)
class TokenButler(CacheMethod):
    """In every layer but the first, a query reads the part of the keys before it that the predictor ranks highest."""

    paper = Paper(
        title="TokenButler: Token Importance is Predictable",
        venue="arXiv",
        year=2025,
        arxiv="2503.07518",
        code="abdelfattah-lab/TokenButler",
        checked="code",
        notes="The first tokens count in the budget, the authors add them to it; a generated token reads its part of "
        "all keys, where their code counts its row as the first, and keys are rotated once, where it rotates cached "
        "ones again. A predicted channel belongs to the layer and head that its place names; the authors' buffers are "
        "read in another order. Gradients are not clipped. As with the authors the choice is a mask: no time is saved.",
    )
    kind = "trained"
    learns = "required"
    reads = ()
    takes = ()
    chooses = True
    forgets = False
    built_in = {"sequence": 256, "batch": 2, "epochs": 1.0, "inner": 256}

    sinks: int = param(4, "first tokens that are always read", low=0)
    size: int = param(16, "width of a predicted query or key", low=2)
    inner: int = param(512, "width of the MLPs that predict them", low=1)
    reduce: int = param(8, "how many times narrower the predictor's attention is than the model", low=1)
    dropout: float = param(0.1, "fit: of what the predictor's MLP adds", low=0, high=1)
    sequence: int = param(1024, "fit: tokens of a training sequence", low=2)
    epochs: float = param(1.0, "fit: passes over the training text", low=0)
    batch: int = param(1, "fit: sequences per step", low=1)
    lr: float = param(1e-3, "fit: peak learning rate", low=0)

    def predictor(self, shape):
        """Of a model, without values."""
        from tprune.methods.llm_context._predictor import Predictor

        return Predictor(
            shape.width, shape.depth, shape.heads, self.reduce, self.inner, self.size, shape.base
        )

    def foresee(self, shape, inputs, position, visible, memory):
        """What the queries that came ask for, and what all keys are asked by."""
        given = (inputs, position, visible, memory)
        return torch.func.functional_call(self.predictor(shape), dict(self.state), given)[0]

    def choose(self, shape, layer, foreseen, visible, keep, memory):
        """The ⌈r n⌉ keys of the n that a query may see whose predicted logits are largest; all in the first layer."""
        counted, whole = len(shape.places), int(0 in shape.places)
        part = (keep * counted - whole) / max(counted - whole, 1)
        if part <= 0:
            raise UserError(
                f"tokenbutler: every key is read in the first of {counted} layers; ask for --keep above "
                f"{1 / counted:.2g}"
            )
        if layer == 0:
            return visible
        heads = slice(layer * shape.heads, (layer + 1) * shape.heads)
        asks, is_asked = foreseen[:, heads], memory["is_asked"][:, heads]
        queries, keys = visible.shape[2:]
        chosen = []
        for begin in range(0, queries, ROWS):
            end = min(begin + ROWS, queries)
            before = keys - queries + end  # what comes later is not seen
            logits = asks[:, :, begin:end] @ is_asked[:, :, :before].mT / math.sqrt(self.size)
            read = most_asked(logits, visible[:, :, begin:end, :before], part, self.sinks)
            chosen.append(pad(read, (0, keys - before)))
        return torch.cat(chosen, dim=2)

    def fit(self, shape, keep, seed):
        """The predictor; the budget plays no part."""
        from tprune.methods.llm_context._tokenbutler_fit import Foresight

        return Foresight(self, shape, seed)


def most_asked(logits, visible, part, sinks):
    """Of the n visible keys of every query the first `sinks` and those of the largest logits: ⌈part · n⌉, or the sinks.

    Args:
        logits: [B, H, q, T].
        visible: bool [B or 1, 1, q, T].
        part: above 0.
        sinks: how many.

    Returns:
        bool [B, H, q, T].
    """
    seen = visible.sum(-1, keepdim=True)
    first = visible & (visible.cumsum(-1) <= sinks)
    count = (seen * part - 1e-6).ceil().long().clamp_min(sinks).minimum(seen)
    score = logits.float().masked_fill(~visible, -torch.inf).masked_fill(first, torch.inf)
    return visible & largest_of_each(score, count)
