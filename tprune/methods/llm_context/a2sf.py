"""A2SF: accumulated attention, of which old queries are forgotten.

Under a causal mask an early token has been seen by more queries than a late one, and plain sums favour it. A
forgetting factor weighs each query by how recent it is, so that every token is judged by the same queries.
"""

from __future__ import annotations

from dataclasses import dataclass

from tprune.core.attending import sum_over_group
from tprune.core.cache import Evict, Replace
from tprune.core.select import worst_between
from tprune.core.stored import Encode
from tprune.errors import UserError
from tprune.methods.base import Paper, param
from tprune.methods.cache import CacheMethod
from tprune.methods.cache_view import LayerView, StepView


@dataclass(frozen=True)
class A2SF(CacheMethod):
    """Heavy hitters with a forgetting factor, beside a few recent entries."""

    paper = Paper(
        title="A2SF: Accumulative Attention Scoring with Forgetting Factor for Token Pruning in Transformer Decoder",
        venue="arXiv",
        year=2024,
        arxiv="2407.20485",
        code="Dirac-Notation/A2SF",
        checked="code",
        notes="As the released code, which prunes once after the prompt; decode=true lets an entry leave for every "
        "generated token, as in the paper. The paper searches the factor per task; the code's example has 0.95.",
    )
    forgetting: float = param(
        0.95, "what a query counts of the next one; 1 is H2O's plain sum", low=0, high=1
    )
    recent: int = param(16, "latest entries that always stay, within the budget", low=0)
    decode: bool = param(False, "an entry leaves for every generated token too")

    def check_length(self, length: int, count: int) -> None:
        """The recent entries must fit into the budget."""
        if self.recent > count:
            raise UserError(
                f"a2sf: {count} of {length} entries are fewer than the {self.recent} latest that shall stay; "
                "raise --keep, or lower --set recent=…"
            )

    def start(self, layer: LayerView, count: int) -> Evict | Encode:
        """The latest entries, and the rest by the attention they received, old queries forgotten."""
        received = sum_over_group(layer.attention.column_sums(self.forgetting), layer.groups)  # [B, G, T]
        layer.state["received"] = received
        return self.keep_best(layer, received, count, 0, min(self.recent, count))

    def step(self, view: StepView) -> Replace:
        """Forget a part of what was, add the new query's attention; the entry that received least goes."""
        new = sum_over_group(view.attention_rows(), view.groups)  # [B, G, T]
        received = view.state["received"] = self.forgetting * view.state["received"] + new
        return Replace(worst_between(received, view.position, view.fillers, self.recent))
