"""Script keeps image tokens that are relevant to the question and unlike each other, by a determinantal point process.

The kernel is the tokens' similarity, weighed on both sides by their relevance. A graph-structured look at redundancy
stands beside it in the paper, and changes nothing: what both agree on is filled up from the second alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tprune.core import cosine, greedy, select
from tprune.core.budget import PROJECTOR, Stage
from tprune.core.reduction import Reduction
from tprune.methods.base import Paper, param
from tprune.methods.tokens import TokenMethod


@dataclass(frozen=True)
class Script(TokenMethod):
    """Query-conditioned selection by a determinantal point process, for every crop."""

    paper = Paper(
        title="Script: Graph-Structured and Query-Conditioned Semantic Token Pruning for Multimodal Large Language "
        "Models",
        venue="TMLR",
        year=2025,
        arxiv="2512.01949",
        code="01yzzyu/script.github.io",
        checked="code",
        notes="The authors' code leaves earlier picks out of each pick's update; process=dpp is the paper's greedy "
        "MAP. Relevance is the negated inner product of CLIP's embeddings, whose patches and texts are aligned the "
        "wrong way round; vision-language models carry no text tower, so that it is given by --set clip=NAME. "
        "Without, projected tokens are compared with the instruction's embeddings in the decoder's space.",
    )
    reads = ("encoder",)
    positions = "compact"
    native = ("ratio",)
    unit = "crop"

    ratio: float = param(0.1112, "fraction of every crop's tokens that stays: 64 of 576", low=0, high=1)
    process: str = param("code", "how a pick lowers the others' worth", choices=("code", "dpp"))
    clip: str = param("", "the CLIP whose vision tower the model has: a folder, or its name on the hub")
    sign: int = param(-1, "of the relevance", choices=(-1, 1))

    def stages(self, shape, knob):
        """k = round(r · N), at least one."""
        keep = self.ratio if knob is None else knob
        return [Stage(PROJECTOR, max(1, round(keep * shape.tokens)))]

    def reduce(self, site, view, count, memory):
        """L_ij = rel_i cos_ij rel_j; greedily k tokens."""
        relevance = self.relevance(view)
        kernel = relevance.unsqueeze(2) * cosine.among(view.hidden, 1e-12) * relevance.unsqueeze(1)
        widest = int(torch.as_tensor(count).max())
        choose = greedy.determinant if self.process == "dpp" else greedy.remaining_variance
        order = choose(kernel, widest, None if view.whole else view.prunable)
        index, valid = select.keep_first(order, count, view.prunable)
        return Reduction.keep(index, view.hidden.shape[1], valid)

    def relevance(self, view):
        """Of every token to the half of the text that suits the image best, 0 to 1: float32 [B, N]."""
        image, text = self.embeddings(view)
        match = text.hidden.float() @ image.float().transpose(1, 2)  # [B, M, N]
        there = view.prunable.unsqueeze(1)
        suits = (match * there).sum(2) / there.sum(2)
        half = (text.real.sum(1, keepdim=True) // 2).clamp_min(1)
        best = select.best_of(suits, text.real, half.squeeze(1))
        raw = self.sign * (match * best.unsqueeze(2)).sum(1) / best.sum(1, keepdim=True)
        low = raw.masked_fill(~view.prunable, torch.inf).amin(1, keepdim=True)
        high = raw.masked_fill(~view.prunable, -torch.inf).amax(1, keepdim=True)
        return ((raw - low) / (high - low + 1e-6)).clamp(0, 1)

    def embeddings(self, view):
        """Image [B, N, d] and text in one space."""
        if "clip" in view.signals:
            return view.signal("clip")
        return view.hidden, view.signal("text")
