"""Mustafar: every cached vector loses its smallest elements, and no token is lost.

Unstructured sparsity keeps more of a cache than removing tokens or channels, and pays once the zeros are not stored:
a bitmap says where the elements are, and attention is computed from that form. The latest entries stay dense.
"""

from __future__ import annotations

from dataclasses import dataclass

from tprune.core.cache import Evict
from tprune.core.sparse import Sparse, bitmap_bytes
from tprune.core.stored import Encode, Stored
from tprune.errors import UserError
from tprune.methods.base import Paper, param
from tprune.methods.cache import CacheMethod
from tprune.methods.cache_view import LayerView


@dataclass(frozen=True)
class Mustafar(CacheMethod):
    """Per-token magnitude in keys and values; an entry is pruned when it leaves the window of the latest."""

    paper = Paper(
        title="Mustafar: Promoting Unstructured Sparsity for KV Cache Pruning in LLM Inference",
        venue="NeurIPS",
        year=2025,
        arxiv="2505.22913",
        code="dhjoo98/mustafar",
        checked="code",
        notes="The main variant, magnitude per token in keys and values. The budget is bytes, the bitmap and the dense "
        "window included, and says how many elements stay; the authors give a sparsity, and keep one element more "
        "than it says, and ties.",
    )
    reads = ()
    takes = ()
    encodes = True
    residual: int = param(32, "latest entries that stay dense", low=1)

    def check_length(self, length: int, count: int) -> None:
        """The window is dense, and must fit into the budget."""
        if count <= self.residual:
            raise UserError(
                f"mustafar: {count} of {length} entries are the memory of no more than its window of {self.residual}; "
                "raise --keep, or lower --set residual=…"
            )

    def start(self, layer: LayerView, count: int) -> Evict | Encode:
        """All before the window keep as many of their largest elements as `count` entries have room for."""
        if count == layer.length:
            return Evict.nothing(*layer.key.shape[:3], layer.key.device)
        old = layer.length - self.residual
        part = Sparse.of(layer.key[:, :, :old], layer.value[:, :, :old], self.elements(layer, count))
        return Encode(Stored((part,)), self.residual)

    def elements(self, layer: LayerView, count: int) -> tuple[int, int]:
        """How many elements of each key and value have room in the memory of `count` entries."""
        widths = layer.key.shape[3], layer.value.shape[3]
        size = layer.key.element_size()
        room = (count - self.residual) / (layer.length - self.residual) * sum(widths) * size
        both = round((room - sum(map(bitmap_bytes, widths))) / size)
        if both < 2:
            raise UserError(
                f"mustafar: {count} of {layer.length} entries have no room for {layer.length} bitmaps, an element each "
                f"and a dense window of {self.residual}; raise --keep, or lower --set residual=…"
            )
        return min(-(-both // 2), widths[0]), min(both // 2, widths[1])
