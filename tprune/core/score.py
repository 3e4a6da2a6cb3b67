"""What a unit is worth: attention rows and columns, similarities, norms, random floors. All in float32."""

from __future__ import annotations

import torch
from torch import Tensor


def repeat_groups(x: Tensor, heads: int) -> Tensor:
    """Grouped keys or values [B, G, N, d] for every query head [B, heads, N, d] (a view where G = heads)."""
    groups = x.shape[1]
    if groups == heads:
        return x
    return x.unsqueeze(2).expand(-1, -1, heads // groups, -1, -1).flatten(1, 2)


def mean_over_group(x: Tensor, groups: int) -> Tensor:
    """Scores per query head [B, H, ...] averaged over the H/groups heads that share a key-value head."""
    return x if x.shape[1] == groups else x.unflatten(1, (groups, -1)).mean(2)


def sum_over_group(x: Tensor, groups: int) -> Tensor:
    """Scores per query head [B, H, ...] summed over the H/groups heads that share a key-value head."""
    return x if x.shape[1] == groups else x.unflatten(1, (groups, -1)).sum(2)


def _logits(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Scaled logits, float32 [B, H, R, T], of `query` [B, H, R, d] over grouped `key` [B, G, T, d].

    The heads of a group share one product with their key, so that keys are never repeated in memory.
    """
    batch, heads, rows, width = query.shape
    grouped = (query.float() * scale).reshape(batch, key.shape[1], -1, width)
    return (grouped @ key.float().transpose(-1, -2)).view(batch, heads, rows, key.shape[2])


def _mask_future(logits: Tensor, row: Tensor) -> Tensor:
    """Hide the keys behind each query: `row` is int64 [R] or [B, R], the query's place among the keys."""
    place = torch.arange(logits.shape[-1], device=logits.device)
    hidden = place > row.unsqueeze(-1)
    return logits.masked_fill_(hidden if row.dim() == 1 else hidden.unsqueeze(1), -torch.inf)


def attention_rows(
    query: Tensor,
    key: Tensor,
    scale: float,
    *,
    rows: Tensor | slice | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """Rows of softmax(scale · q kᵀ + bias), float32 [B, H, R, T]; costs R·T, not N·T.

    Args:
        query: [B, H, N, d], the last N of the T tokens.
        key: [B, G, T, d], G divides H.
        scale: what the logits are multiplied with.
        rows: which queries: a slice, int64 [R] for all samples, or [B, R]; all by default.
        bias: additive, float or bool (True: visible), broadcastable to [B, H, N, T].
        causal: row i sees keys up to T - N + i.
    """
    length, keys = query.shape[2], key.shape[2]
    if rows is None:
        rows = slice(None)
    if isinstance(rows, slice):
        rows = torch.arange(length, device=query.device)[rows]
    if rows.dim() == 1:
        chosen = query[:, :, rows] if len(rows) < length else query
    else:
        chosen = query.gather(2, rows[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
    logits = _logits(chosen, key, scale)
    if bias is not None:
        if bias.shape[-2] != 1:
            if rows.dim() == 1:
                bias = bias[..., rows, :]
            else:
                bias = bias.expand(rows.shape[0], -1, -1, -1).gather(
                    2, rows[:, None, :, None].expand(-1, bias.shape[1], -1, keys)
                )
        logits = logits.masked_fill_(~bias, -torch.inf) if bias.dtype == torch.bool else logits.add_(bias)
    if causal:
        logits = _mask_future(logits, rows + (keys - length))
    return logits.softmax(dim=-1)


def attention_column_sums(
    query: Tensor,
    key: Tensor,
    scale: float,
    *,
    bias: Tensor | None = None,
    causal: bool = False,
    tile: int = 128,
) -> Tensor:
    """The attention every key receives, summed over queries: float32 [B, H, T], memory linear in T.

    The softmax is exact: queries are tiled, keys are not. Under a causal mask a tile only touches the keys
    it can see, which halves the work. Rows that see nothing (padding) contribute nothing.
    """
    batch, heads, length = query.shape[:3]
    keys = key.shape[2]
    sums = torch.zeros(batch, heads, keys, device=query.device)
    for first in range(0, length, tile):
        last = min(first + tile, length)
        seen = keys - length + last if causal else keys
        part = None
        if bias is not None:
            part = bias[..., :seen] if bias.shape[-2] == 1 else bias[..., first:last, :seen]
        rows = attention_rows(query[:, :, first:last], key[:, :, :seen], scale, bias=part, causal=causal)
        sums[..., :seen] += rows.nan_to_num_().sum(2)
    return sums


def cosine_normalise(x: Tensor, eps: float = 1e-6) -> Tensor:
    """`x` [..., D] in float32 with unit rows; rows of norm below `eps` stay near zero."""
    x = x.float()
    return x / x.norm(dim=-1, keepdim=True).clamp_min(eps)


def page_rank(attention: Tensor, start: Tensor, steps: int, present: Tensor | None = None) -> Tensor:
    """Weighted page rank: `steps` times, every token hands its worth to the tokens it attends to.

    Args:
        attention: row-stochastic [..., N, N].
        start: [..., N]; its sum over present tokens is preserved.
        steps: how many votes.
        present: [..., N], 0 for tokens that are gone: rows are renormalised over the others, as if the map had
            been computed without them.
    """
    worth = start.unsqueeze(-2)
    if present is None:
        for _ in range(steps):
            worth = worth @ attention
        return worth.squeeze(-2)
    present = present.unsqueeze(-2)
    visible = (attention * present).sum(-1).unsqueeze(-2).clamp_min(1e-12)
    for _ in range(steps):
        worth = (worth * present / visible) @ attention * present
    return worth.squeeze(-2)


def uniform(shape: tuple[int, ...], seeds: Tensor) -> Tensor:
    """Uniform noise float32 [B, *shape], row b drawn from `seeds[b]` alone, on the CPU."""
    rows = [torch.rand(shape, generator=torch.Generator().manual_seed(int(seed))) for seed in seeds.tolist()]
    return torch.stack(rows)
