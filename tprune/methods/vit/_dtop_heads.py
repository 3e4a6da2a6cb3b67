"""The heads that dtop asks at its exits and at the end: what every token shows, by masks of classes or one by one."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import nn
from torch.nn import functional


class Attention(nn.Module):
    """Attention of `asking` [B, Q, C] to `told` [B, n, C], which also gives what it was softmaxed from."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, asking, told, real=None):
        """What was read [B, Q, C], and the logits, the mean over heads [B, Q, n]; `real` [B, n] hides fillers."""

        def split(x):
            return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        query, key, value = split(self.q(asking)), split(self.k(told)), split(self.v(told))
        logits = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
        shown = logits
        if real is not None:
            shown = logits.masked_fill(~real[:, None, None, :], torch.finfo(logits.dtype).min)
        read = (shown.softmax(-1) @ value).transpose(1, 2).flatten(2)
        return self.proj(read), logits.mean(1)


class Layer(nn.Module):
    """Queries see each other, then the tokens, then an MLP; normalised after each."""

    def __init__(self, width, heads):
        super().__init__()
        self.own, self.cross = Attention(width, heads), Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, queries, tokens, real):
        """Queries [B, Q, C] and the logits of their attention to the tokens [B, Q, n]."""
        queries = self.norm1(queries + self.own(queries, queries)[0])
        read, logits = self.cross(queries, tokens, real)
        queries = self.norm2(queries + read)
        return self.norm3(queries + self.mlp(queries)), logits


class MaskHead(nn.Module):
    """Attention to mask (SegViT's ATM): a query per class, whose attention is its mask.

    Args:
        width: of the tokens.
        names: classes.
        channels, heads, layers: of the decoder.
    """

    def __init__(self, width, names, channels, heads, layers):
        super().__init__()
        self.input, self.norm = nn.Linear(width, channels), nn.LayerNorm(channels)
        self.queries = nn.Parameter(torch.zeros(names, channels))
        self.layers = nn.ModuleList(Layer(channels, heads) for _ in range(layers))
        self.present = nn.Linear(channels, 2)

    def forward(self, tokens, real=None):
        """Of tokens [B, n, D], mask logits [B, n, names], and whether a class is there at all, logits [B, names, 2]."""
        tokens, queries = self.norm(self.input(tokens)), self.queries.expand(len(tokens), -1, -1)
        for layer in self.layers:
            queries, logits = layer(queries, tokens, real)
        return logits.transpose(1, 2), self.present(queries)

    @staticmethod
    def loss(masks, present, name):
        """SegViT's: 20 · focal + dice over the masks of classes that are there, and cross-entropy of which are.

        `name` int64 [B, n] is what every token shows.
        """
        target = functional.one_hot(name, masks.shape[-1]).to(masks.dtype)
        there = target.any(1)  # [B, names]
        count = there.sum()
        likely = masks.sigmoid()
        crossed = functional.binary_cross_entropy_with_logits(masks, target, reduction="none")
        missed = (likely * (1 - target) + (1 - likely) * target) ** 2
        focal = (crossed * missed * (0.75 - 0.5 * target)).mean(1)
        dice = 1 - (2 * (likely * target).sum(1) + 1) / (likely.sum(1) + target.sum(1) + 1)
        rare = torch.tensor([1.0, 0.1], device=masks.device)
        which = functional.cross_entropy(present.transpose(1, 2), (~there).long(), rare)
        return which + ((20 * focal + dice) * there).sum() / count


class LinearHead(nn.Sequential):
    """A linear classifier of normalised tokens, each by itself."""

    def __init__(self, width, names):
        super().__init__(nn.LayerNorm(width, eps=1e-6), nn.Linear(width, names))

    def forward(self, tokens, real=None):
        """Of tokens [B, n, D], logits [B, n, names], and nothing else."""
        return super().forward(tokens), None

    @staticmethod
    def loss(logits, present, name):
        """Cross-entropy with what every token shows, int64 [B, n]."""
        return functional.cross_entropy(logits.flatten(0, 1), name.flatten())


def make(kind, width, names, channels, heads, layers):
    """A head of the kind "masks" or "linear"."""
    return LinearHead(width, names) if kind == "linear" else MaskHead(width, names, channels, heads, layers)


def likelihood(masks, present):
    """How much every token shows each class, [B, n, names]: softmax, or mask times presence."""
    if present is None:
        return masks.softmax(-1)
    return masks.sigmoid() * present.softmax(-1)[..., 0].unsqueeze(1)


def of(state, heads):
    """The head of these tensors, as a module without values of its own."""
    if "input.weight" not in state:
        names, width = state["1.weight"].shape
        return _skeleton("linear", width, names, 0, 0, 0)
    channels, width = state["input.weight"].shape
    layers = sum(name.endswith("own.q.weight") for name in state)
    return _skeleton("masks", width, len(state["queries"]), channels, heads, layers)


@lru_cache(maxsize=8)
def _skeleton(*shape):
    with torch.device("meta"):
        return make(*shape).eval()
