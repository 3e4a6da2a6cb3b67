"""StreamingLLM: keep the first few tokens, where attention sinks, and a rolling window of the latest.

Positions are those inside the cache, not in the text, so that distances never exceed what the model was
trained on however long the stream runs.
"""

from __future__ import annotations

from dataclasses import dataclass

from tprune.core.cache import Evict, Replace
from tprune.core.select import worst_between
from tprune.core.stored import Encode
from tprune.errors import UserError
from tprune.methods.base import Paper, param
from tprune.methods.cache import CacheMethod
from tprune.methods.cache_view import LayerView, StepView


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
    reads = ()
    sink: int = param(4, "first tokens that always stay", low=0)

    def check_length(self, length: int, count: int) -> None:
        """The sinks must leave room for a window."""
        if self.sink >= count:
            raise UserError(
                f"streaming-llm: {count} of {length} entries leave no window beside {self.sink} sinks; "
                f"ask for --keep {min(1.0, (self.sink + 1) / length):.3g} or more, or lower --set sink=…"
            )

    def start(self, layer: LayerView, count: int) -> Evict | Encode:
        """The sinks and the latest entries."""
        sink = layer.state["first"] = min(self.sink, count)
        return self.keep_best(layer, layer.position.float(), count, sink, count - sink)

    def step(self, view: StepView) -> Replace:
        """The oldest entry of the window goes."""
        age = view.position.double()
        return Replace(worst_between(age, view.position, view.fillers + view.state["first"], 0))
