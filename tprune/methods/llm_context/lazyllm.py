"""LazyLLM: most of a prompt need not pass through the upper layers to make the next token.

At a few layers the attention of the last token, averaged over heads, says which prompt tokens go on; the
others leave the forward pass, and their keys and values are only in the layers below. Every later token chooses
anew: what it looks for and is not there comes back from where it left, so that no layer computes a token twice.
"""

from __future__ import annotations

from dataclasses import dataclass

from tprune.core.reduction import Reduction
from tprune.core.select import keep_prunable_top
from tprune.methods.base import Paper, param
from tprune.methods.llm_context._steps import Steps


@dataclass(frozen=True)
class LazyLLM(Steps):
    """Progressive pruning of the prompt in prefill, and dynamic pruning of all that went before while decoding."""

    paper = Paper(
        title="LazyLLM: Dynamic Token Pruning for Efficient Long Context LLM Inference",
        venue="arXiv",
        year=2024,
        arxiv="2407.14057",
        checked="port",
        notes="No official code; the port is followed in prefill, the paper while decoding, where the port brings all "
        "tokens back. The tokens of one later call choose together, by the last of them, and all go on. The paper "
        "tunes layers and rates per task; these are a third party's for 32 layers, and --keep raises all rates to one "
        "power. Where layers have a sliding window nothing can come back.",
    )
    layers: tuple[int, ...] = param((10, 20, 29), "layers before which tokens leave, of 32", low=1)
    rates: tuple[float, ...] = param((0.7, 0.4, 0.1), "fraction of the prompt left after each", low=0, high=1)

    revive: bool = param(
        True, "tokens may come back while decoding; without it the pruning of the prompt is final"
    )

    def revives(self):
        """Whether tokens come back."""
        return self.revive

    def recall(self, attention, last):
        """s_i = mean over heads of A[h, last, i]."""
        return attention.rows(last).mean(dim=1).squeeze(1)  # [B, N]

    def reduce(self, site, view, count, memory):
        """Keep the `count` tokens that the last token attends to most, and the last token."""
        index, valid = keep_prunable_top(self.recall(view.attention, view.last), count, view.prunable)
        return Reduction.keep(index, view.hidden.shape[1], valid)
