"""Expected attention: queries to come are drawn like those that were, so what they will look at can be computed.

Before they are rotated, the queries of a head are taken to be normal. Turned to the positions behind the prompt, their
mean and covariance give the expectation of exp(q · k) for every key, without an attention map.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import pad

from tprune.core.cache import Evict
from tprune.core.stored import Encode
from tprune.errors import UserError
from tprune.methods.base import Paper, param
from tprune.methods.cache import CacheMethod
from tprune.methods.cache_view import LayerView


@dataclass(frozen=True)
class ExpectedAttention(CacheMethod):
    """Sinks, and the entries of the largest expected attention times length of the value; none leaves in decoding."""

    paper = Paper(
        title="Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution",
        venue="arXiv",
        year=2025,
        arxiv="2510.00636",
        code="NVIDIA/kvpress",
        checked="code",
        notes="Queries are the rotated ones, turned back, where the authors project them again. A bound on logits "
        "(softcap) is left out, as there. Their best figures are with budgets per head: --set per_head=0.2.",
    )
    reads = ("turning",)
    takes = ("per_head",)

    sink: int = param(4, "first tokens that always stay; their queries do not count", low=0)
    future: int = param(512, "positions behind the prompt over which the rotation is averaged", low=1)
    covariance: bool = param(True, "whether the queries' covariance counts, beside their mean")
    values: bool = param(True, "whether the values' lengths count")
    epsilon: float = param(0.0, "added to the expected attention before these count", low=0)

    def check_length(self, length: int, count: int) -> None:
        """The sinks must leave room."""
        if self.sink >= count:
            raise UserError(
                f"expected-attention: {count} of {length} entries leave nothing beside {self.sink} sinks; ask for "
                f"--keep {min(1.0, (self.sink + 1) / length):.3g} or more, or lower --set sink=…"
            )

    def start(self, layer: LayerView, count: int) -> Evict | Encode:
        """The entries that later tokens should attend to."""
        if count == layer.length:
            return Evict.nothing(*layer.key.shape[:3], layer.key.device)
        paid = self.expected(layer, layer.key[:, :, self.sink :].float()) + self.epsilon
        if self.values:
            paid = paid * layer.value[:, :, self.sink :].float().norm(dim=3)
        return self.keep_best(layer, pad(paid, (self.sink, 0)), count, self.sink)

    def expected(self, layer: LayerView, key: Tensor) -> Tensor:
        """Softmax of the log-expectation of exp(q · k), mean over a group's query heads: float32 [B, G, T - sink].

        Args:
            key: float32 [B, G, T - sink, d].
        """
        query = layer.attention.query
        position = layer.position[:, :1].expand(query.shape[:3])
        query = layer.turning.turn(query.float(), -position)[:, :, self.sink :]
        mean = query.mean(2, keepdim=True)  # [B, H, 1, d]
        turn = layer.turning.mean(layer.length, self.future, query.shape[3], query.device)
        scale, groups = layer.attention.scale, (layer.groups, -1)
        key = key.unsqueeze(2)  # [B, G, 1, T - sink, d]
        logits = (key @ (mean @ turn).unflatten(1, groups).mT).squeeze(4) * scale  # [B, G, r, T - sink]
        if self.covariance:
            centred = (query - mean) @ turn
            spread = (centred.mT @ centred / centred.shape[2]).unflatten(1, groups)
            logits += ((key @ spread) * key).sum(4) * (scale**2 / 2)
        return logits.softmax(3).mean(2)
