"""SnapKV: the last tokens of a prompt already look where the answer will look.

The attention of a window of last queries, pooled over neighbouring keys so that what surrounds an
important token survives with it, says which entries of the prompt each head keeps.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.nn.functional import pad

from tprune.core.attending import mean_over_group, pool_neighbours
from tprune.core.cache import Evict
from tprune.core.stored import Encode
from tprune.errors import UserError
from tprune.methods.base import Paper, param
from tprune.methods.cache import CacheMethod
from tprune.methods.cache_view import LayerView


@dataclass(frozen=True)
class SnapKV(CacheMethod):
    """Votes of the observation window; nothing leaves while decoding."""

    paper = Paper(
        title="SnapKV: LLM Knows What You are Looking for Before Generation",
        venue="NeurIPS",
        year=2024,
        arxiv="2404.14469",
        code="FasterDecoding/SnapKV",
        checked="code",
        notes="The authors choose per query head; under grouped-query attention the pooled votes of a group are "
        "averaged, so that the cache really shrinks. Defaults are the code's; LongBench was run with kernel=7, "
        "pooling=max. A budget is a fraction of the prompt, where the paper fixes a capacity.",
    )
    window: int = param(32, "last queries of the prompt that vote, and stay", low=1)
    kernel: int = param(5, "width of the pooling over neighbouring keys", choices=(1, 3, 5, 7, 9, 11, 13))
    pooling: str = param("avg", "how votes are pooled", choices=("avg", "max"))

    def check_length(self, length: int, count: int) -> None:
        """The window must be shorter than the budget, of which it is a part."""
        if self.window >= count:
            raise UserError(
                f"snapkv: {count} of {length} entries leave no room beside its window of {self.window} queries; "
                f"ask for --keep {min(1.0, (self.window + 1) / length):.3g} or more, "
                f"or a smaller window with --set window={max(1, count // 2)}"
            )

    def start(self, layer: LayerView, count: int) -> Evict | Encode:
        """The window, and the keys before it with the most votes."""
        if layer.length <= self.window:
            return Evict.nothing(*layer.key.shape[:3], layer.key.device)
        votes = layer.attention.window(self.window)  # [B, H, T - window]
        votes = mean_over_group(pool_neighbours(votes, self.kernel, self.pooling), layer.groups)
        return self.keep_best(layer, pad(votes, (0, self.window)), count, 0, self.window)
