"""One block's attention as it ran, and what can be computed from it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tprune.core import attending


@dataclass(eq=False)
class Attention:
    """The queries and keys of one block's attention as it ran, and what can be computed from them.

    The fused kernel stays in place; `rows` computes only the rows that are asked for, beside it.

    Attributes:
        query: [B, H, N, d], as the attention saw them (normalised, rotated).
        key, value: [B, G, N, d]; G divides H (grouped-query attention).
        scale: what the logits are multiplied with.
        bias: additive, broadcastable to [B, H, N, N] (log sizes, padding), or None.
        causal: whether row i sees only keys up to i.
        softcap: bounds the logits (Gemma 2), or None.
        map: float32 [B, H, N, N], the softmaxed attention, where it is there anyway: a method has edited it, or it is
            the single row of a generated token.
        output: [B, H, N, d], what every head read for every token, before the projection; None where it was not seen.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    bias: Tensor | None = None
    causal: bool = False
    softcap: float | None = None
    map: Tensor | None = None
    output: Tensor | None = None

    def rows(self, rows: Tensor | slice | None = None) -> Tensor:
        """Softmaxed attention of the query rows `rows` (all by default): float32 [B, H, R, N].

        `rows` is a slice, or int64 [R] for all samples, or [B, R].
        """
        if self.map is not None:
            return attending.map_rows(self.map, rows)
        return attending.attention_rows(
            self.query,
            self.key,
            self.scale,
            rows=rows,
            bias=self.bias,
            causal=self.causal,
            softcap=self.softcap,
        )

    def visible(self) -> Tensor | None:
        """Which keys the mask shows to each query, bool [B or 1, H or 1, N, N]; None without one."""
        if self.bias is None:
            return None
        return attending.shown(self.bias).expand(*self.bias.shape[:-2], self.query.shape[2], -1)

    def column_sums(self, decay: float = 1.0, counted: Tensor | None = None) -> Tensor:
        """The attention every key received, summed over the queries that see it: float32 [B, H, N].

        The last query counts 1, each one before it `decay` times the next; those that are not `counted`, bool [B, N],
        do not count.
        """
        if self.map is not None:
            paid = self.map if counted is None else self.map.masked_fill(~counted[:, None, :, None], 0)
            return paid.sum(2) if decay == 1 else attending.forgetting(decay, paid.shape[2], paid) @ paid
        return attending.attention_column_sums(
            self.query,
            self.key,
            self.scale,
            bias=self.bias,
            causal=self.causal,
            softcap=self.softcap,
            decay=decay,
            counted=counted,
        )

    def window(self, size: int) -> Tensor:
        """What the last `size` queries paid to each key before them, summed: float32 [B, H, N - size]."""
        return attending.window_attention(self.query, self.key, self.scale, size, softcap=self.softcap)
