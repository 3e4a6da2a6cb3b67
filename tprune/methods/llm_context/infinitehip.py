"""InfiniteHiP: every few tokens it looks up anew which of millions of keys are read, and the keys may lie on the host.

The first and the latest tokens are always read. Of all others a few stages of ever smaller chunks find the best, at a
cost that hardly grows with their number; nothing is forgotten.
"""

from __future__ import annotations

from dataclasses import dataclass

from tprune.core.budget import scale_layer
from tprune.core.cache import Evict
from tprune.core.hierarchical import Hosted
from tprune.core.stored import Encode, Stored
from tprune.errors import UserError
from tprune.methods.base import Paper, param
from tprune.methods.cache import CacheMethod
from tprune.methods.cache_view import LayerView


@dataclass(frozen=True)
class InfiniteHiP(CacheMethod):
    """Sinks and a window, and per query head what three stages of chunks find, of a cache in the host's memory."""

    paper = Paper(
        title="InfiniteHiP: Extending Language Model Context Up to 3 Million Tokens on a Single GPU",
        venue="arXiv",
        year=2025,
        arxiv="2502.08910",
        code="DeepAuto-AI/hip-attention",
        checked="paper",
        notes="Decoding: a prompt is answered densely, as by the authors' code below 8,192 tokens. The budget is keys "
        "read; what sinks and window leave of it is chosen. Theirs for long contexts are 256 and 1,024 beside 2,048 "
        "chosen keys, too many for short ones. Stages search again every 32, 16 and 8 tokens, as theirs; until all "
        "do, what leaves the window is read too. Chosen keys are held on the device, once for every query head, and "
        "no others that were often used; no positions beyond those a model was trained for.",
    )
    reads = ()
    takes = ()
    encodes = True
    forgets = False
    sinks: int = param(4, "first keys that are always read", low=1)
    window: int = param(16, "latest keys that are always read", low=1)
    sizes: tuple[int, ...] = param((256, 32, 8), "chunks of each stage; each divides the one before", low=1)
    stages: tuple[int, ...] = param(
        (16, 4), "how many times the keys chosen in the end go on from each stage but the last", low=1
    )
    refresh: tuple[int, ...] = param(
        (32, 16, 8), "tokens after which each stage searches again, and those behind it", low=1
    )
    generous: tuple[int, ...] = param(
        (0, 1, 2, 3, 31), "layers, of 32, that choose twice as many keys", low=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.stages) != len(self.sizes) - 1:
            raise UserError(
                f"infinitehip: {len(self.sizes)} sizes and {len(self.stages)} stages; give one more size"
            )
        if len(self.refresh) != len(self.sizes):
            raise UserError(
                f"infinitehip: {len(self.sizes)} sizes and refresh={self.refresh}; give one number for each size"
            )
        if any(large % small for large, small in zip(self.sizes, self.sizes[1:], strict=False)):
            raise UserError(
                f"infinitehip: sizes {self.sizes} do not divide one another; give such as 256,32,8"
            )

    def check_length(self, length: int, count: int) -> None:
        """There must be room for a chunk beside sinks and window."""
        if count < self.sinks + self.window + self.sizes[-1]:
            raise UserError(
                f"infinitehip: {count} of {length} keys have no room for a chunk of {self.sizes[-1]} beside "
                f"{self.sinks} sinks and a window of {self.window}; raise --keep, or lower --set sinks=… or window=…"
            )

    def counts(self, length: int, layers: int, keep: float) -> list[int]:
        """Keys that each layer reads: generous ones choose twice as many, where there are so many."""
        if self.pyramid is not None or keep == 1:
            return super().counts(length, layers, keep)
        wide = {scale_layer(layer, 32, layers) for layer in self.generous}
        fixed, others = self.sinks + self.window, layers - len(wide)
        large = min(fixed + 2 * layers * (keep * length - fixed) / (layers + len(wide)), length - 1)
        small = (keep * length * layers - len(wide) * large) / max(others, 1)
        return [round(large if layer in wide else small) for layer in range(layers)]

    def start(self, layer: LayerView, count: int) -> Evict | Encode:
        """All but the window goes to the host."""
        if count == layer.length:
            return Evict.nothing(*layer.key.shape[:3], layer.key.device)
        size, spare = self.sizes[-1], count - self.window - self.sinks
        chosen = spare // size * size
        kept = (*(times * chosen for times in self.stages), chosen)
        old = layer.length - self.window
        first = self.sinks + spare - chosen  # what is left of a chunk is read at the beginning
        hosted = Hosted.of(
            layer.key[:, :, :old], layer.value[:, :, :old], first, self.sizes, kept, self.refresh
        )
        return Encode(Stored((hosted,)), self.window)
