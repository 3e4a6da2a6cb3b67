"""LazyLLM: most of a prompt need not pass through the upper layers to make the next token.

At a few layers the attention of the last token, averaged over heads, says which prompt tokens go on; the
others leave the forward pass, and their keys and values are only in the layers below.
"""

from __future__ import annotations

from dataclasses import dataclass

from tprune.core.reduction import Reduction
from tprune.core.select import keep_prunable_top
from tprune.methods.base import Paper, param
from tprune.methods.llm_context._steps import Steps


@dataclass(frozen=True)
class LazyLLM(Steps):
    """Progressive pruning of the prompt, in prefill."""

    paper = Paper(
        title="LazyLLM: Dynamic Token Pruning for Efficient Long Context LLM Inference",
        venue="arXiv",
        year=2024,
        arxiv="2407.14057",
        checked="port",
        notes="Prefill only: tokens that left are not revived while decoding, so decoding is static progressive "
        "pruning, not the paper's dynamic one. The paper tunes layers and rates per task; these are a third party's "
        "for 32 layers, and --keep raises all rates to one power.",
    )
    layers: tuple[int, ...] = param((10, 20, 29), "layers before which tokens leave, of 32", low=1)
    rates: tuple[float, ...] = param((0.7, 0.4, 0.1), "fraction of the prompt left after each", low=0, high=1)

    def reduce(self, site, view, count, memory):
        """Keep the `count` tokens that the last token attends to most, and the last token."""
        paid = view.attention.rows(view.last).mean(dim=1).squeeze(1)  # [B, N]
        index, valid = keep_prunable_top(paid, count, view.prunable)
        return Reduction.keep(index, view.hidden.shape[1], valid)
