"""TOVA: a decoder whose cache is bounded is a recurrent network; its state holds what the latest token looks at.

Whenever the cache is full the entry leaves that the latest query pays least attention to, by the mean over heads: no
entry is safe for being first or recent.
"""

from __future__ import annotations

from dataclasses import dataclass

from tprune.core.cache import Evict, Replace
from tprune.core.select import worst_between
from tprune.core.stored import Encode
from tprune.methods.base import Paper
from tprune.methods.cache import CacheMethod
from tprune.methods.cache_view import LayerView, StepView


@dataclass(frozen=True)
class TOVA(CacheMethod):
    """The entries that the latest token attends to most, the same ones for all heads of a layer."""

    paper = Paper(
        title="Transformers are Multi-State RNNs",
        venue="EMNLP",
        year=2024,
        arxiv="2401.06104",
        code="schwartz-lab-NLP/TOVA",
        checked="code",
        notes="A budget is a fraction of the prompt, where the authors fix the size of the cache.",
    )
    takes = ("interval",)

    def start(self, layer: LayerView, count: int) -> Evict | Encode:
        """The `count` entries that the prompt's last token attends to most; it may be without its own."""
        queries = layer.attention.query.shape[2]
        paid = layer.attention.rows(slice(queries - 1, queries)).mean(1)  # [B, 1, T]
        return self.keep_best(layer, paid.expand(-1, layer.groups, -1), count)

    def step(self, view: StepView) -> Replace:
        """The entry leaves that the new token attends to least."""
        paid = view.attention_rows().mean(1, keepdim=True)
        return Replace(worst_between(paid.expand(-1, view.groups, -1), view.position, view.fillers, 0))
