"""StreamingLLM: keep the first few tokens, where attention sinks, and a rolling window of the latest.

Positions are those inside the cache, not in the text, so that distances never exceed what the model was
trained on however long the stream runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tprune.core.cache import CacheEdit, Evict
from tprune.errors import UserError
from tprune.methods.base import CacheMethod, Paper, param
from tprune.methods.views import LayerView


@dataclass(frozen=True)
class StreamingLLM(CacheMethod):
    """Sinks and a rolling window."""

    paper = Paper(
        title="Efficient Streaming Language Models with Attention Sinks",
        venue="ICLR",
        year=2024,
        arxiv="2309.17453",
        code="mit-han-lab/streaming-llm",
        checked="code",
        notes="The authors cache keys unrotated and rotate them by their slot; here the sinks are turned towards the "
        "window instead, which gives the same distances. --positions original leaves them where they were.",
    )
    positions = "compact"
    sink: int = param(4, "first tokens that always stay", low=0)

    def check_length(self, length: int, count: int) -> None:
        """The sinks must leave room for a window."""
        if self.sink >= count:
            raise UserError(
                f"streaming-llm: {count} of {length} entries leave no window beside {self.sink} sinks; "
                f"ask for --keep {min(1.0, (self.sink + 1) / length):.3g} or more, or lower --set sink=…"
            )

    def start(self, layer: LayerView, count: int) -> CacheEdit:
        """The sinks and the latest entries."""
        sink = min(self.sink, count)
        layer.state["first"] = sink
        return self._roll(layer, count)

    def step(self, layer: LayerView, count: int) -> CacheEdit:
        """The oldest entry of the window goes."""
        return self._roll(layer, count)

    def _roll(self, layer: LayerView, count: int) -> CacheEdit:
        """All but the entries just behind the sinks."""
        place = torch.arange(count, device=layer.key.device)
        first = torch.as_tensor(layer.fillers + layer.state["first"], device=place.device)
        index = place + (layer.length - count) * (place >= first.reshape(-1, 1, 1))  # [B or 1, 1, count]
        return Evict(index.expand(*layer.key.shape[:2], count))
