"""LagKV: what comes next in a text says how unusual the keys and values before it were.

The entries are cut into chunks. Each chunk is measured by the range that every channel has in the chunk behind it; an
entry whose channels scatter most on that scale is worth most. No attention is read.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import pad

from tprune.core.cache import Evict
from tprune.core.ranks import rank
from tprune.core.stored import Encode
from tprune.errors import UserError
from tprune.methods.base import Paper, param
from tprune.methods.cache import CacheMethod
from tprune.methods.cache_view import LayerView

FLAT = 1e-6
"""The range of a channel is taken to be no smaller."""


@dataclass(frozen=True)
class LagKV(CacheMethod):
    """Sinks, the last chunk, and of every chunk before it the same number of entries."""

    paper = Paper(
        title="LagKV: Lag-Relative Information of the KV Cache Tells Which Tokens Are Important",
        venue="arXiv",
        year=2025,
        arxiv="2504.04704",
        code="AI-Lab-China-Merchants-Bank/LagKV",
        checked="code",
        notes="The authors give what is kept of each chunk, here the budget says it, sinks and last chunk within; the "
        "first chunks have one entry more where it does not divide. Their code's chunks have 1,024 tokens, kvpress's "
        "128; where the budget has no room for the last one they are shorter. Theirs also compress what is generated "
        "as soon as it fills two chunks; here it stays.",
    )
    reads = ()
    takes = ()

    sink: int = param(16, "first tokens that always stay", low=0)
    lag: int = param(128, "tokens of a chunk, at most", low=1)
    value: float = param(1.0, "weight of the values' score beside that of the keys", low=0)

    def check_length(self, length: int, count: int) -> None:
        """There must be room for sinks and a last chunk."""
        if count < self.sink + 2:
            raise UserError(
                f"lagkv: {count} of {length} entries have no room for a chunk beside {self.sink} sinks; ask for "
                f"--keep {min(1.0, (self.sink + 2) / length):.3g} or more, or lower --set sink=…"
            )

    def start(self, layer: LayerView, count: int) -> Evict | Encode:
        """The entries that scatter most in each chunk."""
        if count == layer.length:
            return Evict.nothing(*layer.key.shape[:3], layer.key.device)
        lag = self.chunk(layer.length, count)
        last = self.behind(layer.length, lag)
        score = sum(
            weight * scatter(states[:, :, self.sink : layer.length - last + lag], lag)
            for states, weight in ((layer.key, 1.0), (layer.value, self.value))
        )
        place = pad(-rank(score).flatten(2), (self.sink, last))  # 0 for the best of every chunk
        return self.keep_best(layer, place, count, self.sink, last)

    def behind(self, length: int, lag: int) -> int:
        """Entries of the last chunk, and those after it that make no whole one."""
        return lag + (length - self.sink) % lag

    def chunk(self, length: int, count: int) -> int:
        """The length of chunks that the budget has room for."""
        fits = length - self.sink >= 2 * self.lag and self.sink + self.behind(length, self.lag) <= count
        return self.lag if fits else min(self.lag, (count - self.sink) // 2)


def scatter(states: Tensor, lag: int) -> Tensor:
    """How unusual entries are beside the chunk behind their own, float32 [B, G, C - 1, lag]; those of a chunk sum to 1.

    Args:
        states: keys or values [B, G, C · lag, d].
    """
    chunks = states.float().unflatten(2, (-1, lag))
    least, most = chunks[:, :, 1:].aminmax(dim=3, keepdim=True)
    relative = (chunks[:, :, :-1] - least) / (most - least).clamp_min(FLAT)
    return relative.std(dim=4).softmax(dim=3)
