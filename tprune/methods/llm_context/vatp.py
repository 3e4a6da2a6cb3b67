"""VATP: attention is not all; an entry weighs as much as its attention times the size of its value.

H2O's accumulated attention is multiplied with the L1 norm of each value vector. The first tokens soak up
attention but carry tiny values, so they are kept by rule.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, cat

from tprune.core.attending import sum_over_group
from tprune.core.cache import Evict, Replace
from tprune.core.select import worst_between
from tprune.core.stored import Encode
from tprune.errors import UserError
from tprune.methods.base import Paper, param
from tprune.methods.cache import CacheMethod
from tprune.methods.cache_view import LayerView, StepView


@dataclass(frozen=True)
class VATP(CacheMethod):
    """Value-aware heavy hitters on H2O's accumulated attention."""

    paper = Paper(
        title="Attention Score is not All You Need for Token Importance Indicator in KV Cache Reduction: "
        "Value Also Matters",
        venue="EMNLP",
        year=2024,
        arxiv="2406.12335",
        code="guozhiyu/vatp",
        checked="code",
        notes="The variant over H2O. Entries are really evicted, where the authors' simulation masks them; the budget "
        "is one number split by `recent`. Under grouped-query attention a group's attention is added up before it "
        "meets the value's norm.",
    )
    sink: int = param(20, "first tokens that always stay, within the budget", low=0)
    recent: float = param(0.5, "part of the budget for the latest entries", low=0, high=1)

    def check_length(self, length: int, count: int) -> None:
        """Sinks and recent entries must fit into the budget."""
        if self.sink + int(self.recent * count) > count:
            raise UserError(
                f"vatp: {count} of {length} entries, of which {int(self.recent * count)} are for the latest, have no "
                f"room for {self.sink} sinks; raise --keep, or lower --set sink=… or recent=…"
            )

    def start(self, layer: LayerView, count: int) -> Evict | Encode:
        """Sinks, the latest entries, and the rest by attention received times value norm."""
        received = sum_over_group(layer.attention.column_sums(), layer.groups)  # [B, G, T]
        recent = int(self.recent * count)
        layer.state["received"], layer.state["norm"] = received, _norm(layer.value)
        layer.state["recent"], layer.state["first"] = recent, self.sink
        return self.keep_best(layer, received * layer.state["norm"], count, self.sink, recent)

    def step(self, view: StepView) -> Replace:
        """Add the new query's attention; the entry of least worth between sinks and recent ones goes."""
        received = view.state["received"] + sum_over_group(view.attention_rows(), view.groups)  # [B, G, T]
        norm = cat([view.state["norm"][..., :-1], _norm(view.value[:, :, -1:])], -1)
        view.state["received"], view.state["norm"] = received, norm
        first = view.fillers + view.state["first"]
        return Replace(worst_between(received * norm, view.position, first, view.state["recent"]))


def _norm(value: Tensor) -> Tensor:
    """L1 norm of every value vector, float32: [..., d] -> [...]."""
    return value.float().abs().sum(dim=-1)
