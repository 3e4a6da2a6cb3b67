"""L2 norms of keys: entries whose keys are short are those that attention goes to.

Nothing but the cache itself is read, so that no attention map is needed, and the fused kernel stays in place.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, cat

from tprune.core.cache import Evict, Replace
from tprune.core.select import worst_between
from tprune.core.stored import Encode
from tprune.errors import BudgetError, UserError
from tprune.methods.base import Paper, param
from tprune.methods.cache import CacheMethod
from tprune.methods.cache_view import LayerView, StepView


@dataclass(frozen=True)
class Knorm(CacheMethod):
    """The entries with the shortest keys stay."""

    paper = Paper(
        title="A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression",
        venue="EMNLP",
        year=2024,
        arxiv="2406.11430",
        code="alessiodevoto/l2compress",
        checked="code",
        notes="The authors' evaluations leave out the first layer, or the first two, by an option that their function "
        "has switched off, as here (skip=0,1); what these keep the others lose, so that the budget is met. As their "
        "example it prunes once, behind the prompt; in language modelling they go on with every token (decode=true).",
    )
    reads = ()

    skip: tuple[int, ...] = param((), "layers that keep all", low=0)
    decode: bool = param(False, "an entry leaves for every generated token too: the one with the longest key")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("interval", "pyramid"):
            if self.skip and getattr(self, name) is not None:
                raise UserError(
                    f"--set skip=… and {name}=…: what layers keep is said twice; give one of them"
                )

    def counts(self, length: int, layers: int, keep: float) -> list[int]:
        """Layers that are skipped keep all, the others what that leaves of the budget."""
        skipped = {layer for layer in self.skip if layer < layers}
        if not skipped or keep == 1:
            return super().counts(length, layers, keep)
        others = layers - len(skipped)
        left = round((keep * layers - len(skipped)) * length / others) if others else 0
        if left < 1:
            least = (len(skipped) + others / length) / layers
            raise BudgetError(
                f"knorm: {len(skipped)} of {layers} layers keep all; ask for --keep {least:.2g} or more, or skip fewer",
                least,
                1.0,
            )
        return [length if layer in skipped else left for layer in range(layers)]

    def start(self, layer: LayerView, count: int) -> Evict | Encode:
        """The `count` entries with the shortest keys."""
        norm = layer.state["norm"] = _norm(layer.key)
        return self.keep_best(layer, norm.amax((1, 2), keepdim=True) - norm, count)

    def step(self, view: StepView) -> Replace:
        """The entry with the longest key leaves, the new one too if it is that."""
        norm = view.state["norm"] = cat([view.state["norm"][..., :-1], _norm(view.key[:, :, -1:])], -1)
        return Replace(worst_between(-norm, view.position, view.fillers, 0))


def _norm(key: Tensor) -> Tensor:
    """L2 norm of every key, float32: [..., d] -> [...]."""
    return key.float().norm(dim=-1)
