"""SparseVLM lets the words that matter to the image rate its tokens, and recycles the best of what leaves.

Behind three layers image tokens are ranked by the attention that rater words pay them; of the pruned ones the top
third is clustered and comes back as a few means. SparseVLM+ (v2) weighs attention against its decay with distance,
listens to half of the heads, and recycles nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tprune.core import match, score, select
from tprune.core.budget import exponent, staircase
from tprune.core.join import join
from tprune.core.reduction import Reduction, gather_tokens
from tprune.methods.base import Paper, param
from tprune.methods.tokens import TokenMethod

KEPT = {
    "v1": {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)},
    "v2": {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)},
}
"""Image tokens kept of 576 behind each layer, without the recycled ones, by the mean number leaving a layer."""


@dataclass(frozen=True)
class SparseVLM(TokenMethod):
    """Behind layers 2, 6 and 15 keep the image tokens that the raters among the text attend to most."""

    paper = Paper(
        title="SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference",
        venue="ICML",
        year=2025,
        arxiv="2410.04417",
        code="Gumpest/SparseVLMs",
        checked="code",
        notes="The authors' tables, as their code since March 2025, scaled to other numbers of tokens; the rank of the "
        "attention matrix, which the paper takes counts from, is not offered. --keep raises the fractions to one "
        "power. The noise against equal densities is left out of the clustering. v2 listens to 14 heads, or to half "
        "where there are fewer than 28. 192 tokens leaving a layer (the papers' count) are 206.5 entering one.",
    )
    reads = ("attention", "embeddings", "before")
    native = ("retain",)

    layers: tuple[int, ...] = param(
        (2, 6, 15), "image tokens leave behind these layers, of 32", low=0, length=3
    )
    retain: int = param(
        192,
        "mean image tokens leaving a layer, of 576: which of the authors' tables",
        choices=(192, 128, 96, 64),
    )
    version: str = param("v1", "v1: SparseVLM with recycling, v2: SparseVLM+", choices=("v1", "v2"))
    recycle: float = param(0.3, "v1: fraction of the pruned tokens that is clustered", low=0, high=1)
    heads: int = param(14, "v2: how many heads rate", low=1)

    @property
    def positions(self) -> str:
        """v1 renumbers what is left, v2 does not."""
        return "compact" if self.version == "v1" else "original"

    def stages(self, shape, knob):
        """The table's counts, and in v1 the clusters that come back."""
        alive, counts = shape.tokens, []
        for kept in KEPT[self.version][self.retain]:
            most = alive - 1 if knob is None else alive
            fraction = kept / 576 if knob is None else (kept / 576) ** exponent(knob)
            kept = max(0, min(round(fraction * shape.tokens), most))
            alive = kept + self.clusters(alive - kept)
            counts.append(max(alive, 1))
        return staircase([layer + 1 for layer in self.layers], counts, 32, shape.depth)

    def recycled(self, pruned: int) -> int:
        """How many of the pruned tokens are clustered."""
        return min(pruned, int(pruned * self.recycle) + 1)

    def clusters(self, pruned: int) -> int:
        """Into how many."""
        if self.version == "v2" or pruned == 0 or self.recycle == 0:
            return 0
        return self.recycled(pruned) // 10 + 1

    def reduce(self, site, view, count, memory):
        """p_j = mean over the raters i of A[i, j]; the best stay, the next best are recycled."""
        raters = memory["raters"] if "raters" in memory else self.raters(view)  # [B, N]
        relevance = self.relevance(view, *select.places(raters))
        if self.version == "v2" or self.recycle == 0:
            index, valid = select.keep_prunable_top(relevance, count, view.prunable)
            reduction = Reduction.keep(index, view.hidden.shape[1], valid)
        else:
            reduction = self.recycling(view, relevance, count)
        memory["raters"] = reduction.gather(raters)
        return reduction

    def raters(self, view):
        """The words whose mean share of the image tokens' softmax over the text is above the mean: bool [B, N]."""
        embeddings = view.signal("embeddings").float()
        image, seen = select.places(view.prunable)
        text, said = select.places(view.text)
        logits = gather_tokens(embeddings, image) @ gather_tokens(embeddings, text).transpose(1, 2)
        share = logits.masked_fill(~said.unsqueeze(1), -torch.inf).softmax(2).nan_to_num()
        share = (share * seen.unsqueeze(2)).sum(1) / seen.sum(1, keepdim=True).clamp_min(1)
        mean = share.sum(1, keepdim=True) / said.sum(1, keepdim=True).clamp_min(1)
        return select.mark(text, (share > mean) & said, view.prunable.shape[1])

    def relevance(self, view, raters, real):
        """What the raters [B, R] pay to every token, [B, N]; v2 first corrects attention and chooses heads."""
        attention = view.attention.rows(raters)  # [B, H, R, N]
        if self.version == "v2":
            ones = view.signal("rotated_ones").float()
            decay = gather_tokens(ones, raters) @ ones.transpose(1, 2) / ones.shape[2] ** 0.5
            attention = attention / decay.unsqueeze(1)
            mass = (attention * (real.unsqueeze(2) & view.prunable.unsqueeze(1)).unsqueeze(1)).sum((2, 3))
            few = attention.shape[1] < 2 * self.heads
            heads = select.top(mass, max(1, attention.shape[1] // 2) if few else self.heads)
            attention = gather_tokens(attention, heads)
        return score.mean_rows(attention, real)

    def recycling(self, view, relevance, count):
        """The reduction of v1, for the rows of each number of image tokens by themselves."""
        alive = view.prunable.sum(1).tolist()
        left = torch.as_tensor(count).expand(len(alive)).tolist()
        parts = []
        for number, total in sorted(set(zip(alive, left, strict=True))):
            rows = [row for row, pair in enumerate(zip(alive, left, strict=True)) if pair == (number, total)]
            parts.append((rows, self.alike(view, relevance, rows, number, total)))
        return join(parts, len(alive))

    def alike(self, view, relevance, rows, number, total):
        """The reduction of rows with `number` image tokens, of which `total` slots are left."""
        hidden, length = view.hidden[rows], view.hidden.shape[1]
        if total >= number:
            return Reduction.identity(len(rows), length, hidden.device)
        pruned = number - total
        while pruned - self.clusters(pruned) < number - total:
            pruned += 1
        index, source, into = match.recycle(
            hidden,
            relevance[rows],
            view.prunable[rows],
            number - pruned,
            self.recycled(pruned),
            self.clusters(pruned),
        )
        return Reduction.average(index, length, source, into)
