"""Think Clearly: a reasoning trace is full of passages that its end does not need, and they distract.

From time to time the model is told to stop thinking. What the token that ends the thinking looks at is what the trace
contributes; passages that contribute least leave first, and in them the tokens that do. Then the instruction is
forgotten and the reasoning goes on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tprune.core.cache import Evict
from tprune.core.ranks import rank
from tprune.core.select import top
from tprune.methods.base import Paper, param
from tprune.methods.cache import CacheMethod, Probe
from tprune.methods.cache_view import LayerView


@dataclass(frozen=True)
class ThinkClearly(CacheMethod):
    """Passages by the mean attention of the end of thinking, tokens within them by their own; per layer."""

    paper = Paper(
        title="Think Clearly: Improving Reasoning via Redundant Token Pruning",
        venue="EMNLP Findings",
        year=2025,
        arxiv="2507.08806",
        checked="abstract",
        notes="A reconstruction from the paper's summary, without official code. The instruction, the step of 200 and "
        "the words are the paper's, the latest entries that stay are ours. The budget is a part of all tokens so far, "
        "in each layer by itself. What stands before <think> never leaves; where a model has no such token, the whole "
        "prompt is taken for the trace.",
    )
    reads = ()
    takes = ()
    every: int = param(200, "tokens between two prunings", low=1)
    recent: int = param(16, "latest entries that stay whatever is asked", low=0)
    instruction: str = param(
        "Time is up. Given the time I've spent and the approaches I've tried, I should stop thinking and now write "
        "summarization in one sentence.</think>",
        "what the model is told for a moment; its last token is the one that looks",
    )
    opening: str = param("<think>", "the token before which nothing leaves")
    words: tuple[str, ...] = param(
        (
            "Wait",
            "Alternatively",
            "Therefore",
            "So",
            "Thus",
            "Hence",
            "However",
            "But",
            "Let",
            "First",
            "Next",
            "Finally",
        ),
        "what a passage begins with, beside a new line",
    )

    def probe(self):
        """The instruction to stop, and where passages begin."""
        return Probe(self.instruction, self.every, self.words, ("\n", "\n\n"), self.opening)

    def start(self, layer: LayerView, count: int) -> Evict:
        """Fill up with passages, the best first; of the one that does not fit whole its best tokens."""
        score, length = layer.probed.mean(1), layer.length  # [B, T]
        passage = layer.passage + 1  # 0: before the trace
        sums = score.new_zeros(len(score), int(passage.max()) + 1)
        sizes = sums.scatter_add(1, passage, torch.ones_like(score))
        mean = sums.scatter_add(1, passage, score) / sizes.clamp_min(1)
        turn = rank(mean).gather(1, passage) * length + rank(score)
        latest = passage == passage[:, -1:]
        latest[:, max(length - self.recent, 0) :] = True
        turn = torch.where(latest, turn - turn.amax() - 1, turn)
        turn = torch.where(passage == 0, -torch.inf, turn.double())
        count = min(max(count, int(sizes[:, 0].max())), length)
        return Evict(top(-turn, count).unsqueeze(1).expand(-1, layer.groups, -1))
