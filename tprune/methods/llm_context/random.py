"""Random eviction: every key-value head keeps entries of the prompt drawn at random.

The floor that every other method has to beat. Without the first tokens, which soak up attention, a model
collapses whatever else is kept; protecting them and the latest ones makes the fairer baseline.
"""

from __future__ import annotations

from dataclasses import dataclass

from tprune.core.cache import Evict
from tprune.core.score import uniform
from tprune.core.stored import Encode
from tprune.errors import UserError
from tprune.methods.base import Paper, param
from tprune.methods.cache import CacheMethod
from tprune.methods.cache_view import LayerView


@dataclass(frozen=True)
class Random(CacheMethod):
    """Uniform choice per layer and key-value head, seeded per sample."""

    paper = Paper(
        title="Random eviction (baseline)",
        venue="baseline",
        year=2024,
        checked="paper",
        notes="Draws in float32 on the CPU, so that every device and precision keeps the same entries.",
    )
    kind = "baseline"
    reads = ("seeds",)

    sink: int = param(0, "first tokens that always stay", low=0)
    recent: int = param(0, "latest tokens of the prompt that always stay", low=0)
    share_heads: bool = param(False, "keep the same tokens in all heads and layers")

    def check_length(self, length: int, count: int) -> None:
        """The protected ends must fit into the budget."""
        if self.sink + self.recent > count:
            raise UserError(
                f"random: {count} of {length} entries are fewer than the {self.sink} first and {self.recent} latest "
                "that shall stay; raise --keep, or lower --set sink=… and recent=…"
            )

    def start(self, layer: LayerView, count: int) -> Evict | Encode:
        """The entries with the largest draws, and the protected ends."""
        if self.share_heads:
            draw = uniform((1, layer.length), layer.seeds).expand(-1, layer.groups, -1)
        else:
            draw = uniform((layer.groups, layer.length), layer.seeds + layer.layer)
        return self.keep_best(layer, draw.to(layer.key.device), count, self.sink, self.recent)
