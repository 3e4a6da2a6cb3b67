"""H2O: a few tokens, the heavy hitters, receive most of the attention of all queries.

Each head keeps the entries with the largest attention received so far beside the most recent ones; every
generated token adds its own attention and pushes one entry out, so that the cache never grows.
"""

from __future__ import annotations

from dataclasses import dataclass

from tprune.core.attending import sum_over_group
from tprune.core.cache import Evict, Replace
from tprune.core.select import worst_between
from tprune.core.stored import Encode
from tprune.methods.base import Paper, param
from tprune.methods.cache import CacheMethod
from tprune.methods.cache_view import LayerView, StepView


@dataclass(frozen=True)
class H2O(CacheMethod):
    """Accumulated attention and a recent window, in equal parts."""

    paper = Paper(
        title="H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",
        venue="NeurIPS",
        year=2023,
        arxiv="2306.14048",
        code="FMInference/H2O",
        checked="code",
        notes="Entries are really evicted, where the authors' simulation masks them and hides each token for one step "
        "as it leaves the recent window. The budget is one number split by `recent`, not two separately rounded "
        "ones. Under grouped-query attention the heads of a group add up.",
    )
    recent: float = param(
        0.5, "part of the budget for the latest entries; the rest is for heavy hitters", low=0, high=1
    )

    def start(self, layer: LayerView, count: int) -> Evict | Encode:
        """The latest entries, and the rest by the attention they received from the whole prompt."""
        received = sum_over_group(layer.attention.column_sums(), layer.groups)  # [B, G, T]
        recent = int(self.recent * count)
        layer.state["received"], layer.state["recent"] = received, recent
        return self.keep_best(layer, received, count, 0, recent)

    def step(self, view: StepView) -> Replace:
        """Add the new query's attention; the entry that received least, and is not recent, goes."""
        received = view.state["received"] + sum_over_group(view.attention_rows(), view.groups)  # [B, G, T]
        view.state["received"] = received
        return Replace(worst_between(received, view.position, view.fillers, view.state["recent"]))
