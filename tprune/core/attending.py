"""Attention of queries over grouped keys without its whole map: logits, rows, column sums, and what heads share."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def mean_over_group(x: Tensor, groups: int) -> Tensor:
    """Scores per query head [B, H, ...] averaged over the H/groups heads that share a key-value head."""
    return x if x.shape[1] == groups else x.unflatten(1, (groups, -1)).mean(2)


def sum_over_group(x: Tensor, groups: int) -> Tensor:
    """Scores per query head [B, H, ...] summed over the H/groups heads that share a key-value head."""
    return x if x.shape[1] == groups else x.unflatten(1, (groups, -1)).sum(2)


def _logits(
    query: Tensor, key: Tensor, scale: float, softcap: float | None = None, room: Tensor | None = None
) -> Tensor:
    """Scaled logits, float32 [B, H, R, T], of `query` [B, H, R, d] over grouped `key` [B, G, T, d].

    The heads of a group share one product with their key, so that keys are never repeated in memory. They lie at the
    start of `room`, float32 [at least B · H · R · T], if it is given.
    """
    batch, heads, rows, width = query.shape
    grouped = (query.float() * scale).reshape(batch * key.shape[1], -1, width)
    grouped_key = key.float().flatten(0, 1).transpose(1, 2)
    if room is not None:
        room = room[: batch * heads * rows * key.shape[2]].view(len(grouped), -1, key.shape[2])
    logits = torch.bmm(grouped, grouped_key, out=room).view(batch, heads, rows, key.shape[2])
    return capped(logits, softcap)


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """`logits`, which are lost, within `softcap` c: x becomes c · tanh(x / c) (Gemma 2)."""
    if softcap is None:
        return logits
    bent = logits.div_(softcap).tanh_()
    # A gradient needs the tanh as it is.
    return bent * softcap if bent.requires_grad else bent.mul_(softcap)


def attention_logits(
    query: Tensor, key: Tensor, scale: float, bias: Tensor | None = None, softcap: float | None = None
) -> Tensor:
    """What a softmax over keys would be taken of, float32 [B, H, R, T]; arguments as for `attention_rows`."""
    logits = _logits(query, key, scale, softcap)
    if bias is None:
        return logits
    return logits.masked_fill_(~bias, -torch.inf) if bias.dtype == torch.bool else logits.add_(bias)


def _mask_future(logits: Tensor, row: Tensor) -> Tensor:
    """Hide the keys behind each query: `row` is int64 [R] or [B, R], the query's place among the keys."""
    place = torch.arange(logits.shape[-1], device=logits.device)
    hidden = place > row.unsqueeze(-1)
    return logits.masked_fill_(hidden if row.dim() == 1 else hidden.unsqueeze(1), -torch.inf)


def _softmax(logits: Tensor) -> Tensor:
    """Over the last dimension; on a CPU in their own memory, since new pages cost more than the softmax."""
    own = logits.device.type == "cpu" and not logits.requires_grad
    return torch.softmax(logits, dim=-1, out=logits if own else None)


def attention_rows(
    query: Tensor,
    key: Tensor,
    scale: float,
    *,
    rows: Tensor | slice | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    softcap: float | None = None,
) -> Tensor:
    """Rows of softmax(scale · q kᵀ + bias), float32 [B, H, R, T]; costs R·T, not N·T.

    Args:
        query: [B, H, N, d], the last N of the T tokens.
        key: [B, G, T, d], G divides H.
        scale: what the logits are multiplied with.
        rows: which queries: a slice, int64 [R] for all samples, or [B, R]; all by default.
        bias: additive, float or bool (True: visible), broadcastable to [B, H, N, T].
        causal: row i sees keys up to T - N + i.
        softcap: bounds the logits (Gemma 2).
    """
    length, keys = query.shape[2], key.shape[2]
    chosen = query
    if isinstance(rows, slice):
        rows = torch.arange(length, device=query.device)[rows]
    if rows is None:
        if causal:
            rows = torch.arange(length, device=query.device)
    elif rows.dim() == 1:
        chosen = query[:, :, rows] if len(rows) < length else query
    else:
        chosen = query.gather(2, rows[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
    if bias is not None and bias.shape[-2] != 1 and rows is not None:
        if rows.dim() == 1:
            bias = bias[..., rows, :]
        else:
            bias = bias.expand(rows.shape[0], -1, -1, -1).gather(
                2, rows[:, None, :, None].expand(-1, bias.shape[1], -1, keys)
            )
    logits = attention_logits(chosen, key, scale, bias, softcap)
    if causal:
        logits = _mask_future(logits, rows + (keys - length))
    return _softmax(logits)


def attend(attention: Tensor, value: Tensor) -> Tensor:
    """What attention [B, H, R, T] reads of grouped values [B, G, T, d]: [B, H, R, d], in the dtype of `value`."""
    batch, heads, rows, keys = attention.shape
    grouped = attention.to(value.dtype).reshape(batch * value.shape[1], -1, keys).bmm(value.flatten(0, 1))
    return grouped.view(batch, heads, rows, -1)


def attention_column_sums(
    query: Tensor,
    key: Tensor,
    scale: float,
    *,
    bias: Tensor | None = None,
    causal: bool = False,
    softcap: float | None = None,
    decay: float = 1.0,
    counted: Tensor | None = None,
    tile: int | None = None,
) -> Tensor:
    """The attention every key receives, summed over queries: float32 [B, H, T], memory linear in T.

    The softmax is exact: queries are tiled, keys are not. Under a causal mask a tile only touches the keys
    it can see, which halves the work. Rows that see nothing (padding) contribute nothing; one of NaN makes the sums of
    its head NaN.

    Args:
        query, key, scale, bias, causal, softcap: as for `attention_rows`.
        decay: the last query counts 1, each one before it `decay` times the next (A2SF, the forgetting factor).
        counted: bool [B, N], the queries that count; all by default.
        tile: query rows at a time; by default tiles of one size, of at least 16 rows, at most 200 rows and 16 MB on a
            CPU (8 MB where causal), or 128 MB elsewhere.
    """
    batch, heads, length = query.shape[:3]
    keys = key.shape[2]
    if tile is None:
        cpu = query.device.type == "cpu"
        elements = 1 << ((21 if causal else 22) if cpu else 25)
        most = min(max(elements // (batch * heads * keys), 16), 200 if cpu else length, length)
        tile = -(-length // -(-length // most))
    key = key.float()
    future = torch.ones(tile, tile, dtype=torch.bool, device=query.device).triu(1)
    weight = forgetting(decay, length, query)
    sums = torch.zeros(batch, heads, keys, device=query.device)
    learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (query, key, bias))
    # One room for all tiles: fresh pages would cost a tile a third of its time.
    room = None if learns else torch.empty(batch * heads * tile * keys, device=query.device)
    # Where all queries see the same keys, a sample's rows are all blind or none is.
    alike = not learns and counted is None and (bias is None or (bias.shape[-2] == 1 and not causal))
    for first in range(0, length, tile):
        last = min(first + tile, length)
        rows, seen = last - first, keys - length + last if causal else keys
        logits = _logits(query[:, :, first:last], key[:, :, :seen], scale, softcap, room)
        part = None if bias is None else bias[..., :seen]
        if part is not None:
            part = part if part.shape[-2] == 1 else part[..., first:last, :]
            logits = logits.masked_fill_(~part, -torch.inf) if part.dtype == torch.bool else logits.add_(part)
        if causal:
            logits[..., seen - rows :].masked_fill_(future[:rows, :rows], -torch.inf)
        silent = None
        if not alike:
            asked = None if counted is None else counted[:, first:last]
            silent = _silent(part, asked, future[:rows, :rows] if causal else None)
        if silent is None:
            received = _softmax(logits)
        elif learns:
            # The gradient of a row of -inf would be NaN, even where nothing is made of it.
            received = _softmax(logits.masked_fill(silent, 0)).masked_fill(silent, 0)
        else:
            received = _softmax(logits).masked_fill_(silent, 0)
        sums[..., :seen] += received.sum(2) if decay == 1 else weight[first:last] @ received
    return sums if bias is None or not alike else sums.masked_fill(_silent(bias).squeeze(-1), 0)


def forgetting(decay: float, rows: int, like: Tensor) -> Tensor:
    """What each of `rows` queries counts, float32 [rows]: the last 1, each one before it `decay` times the next."""
    return decay ** torch.arange(rows - 1, -1, -1, device=like.device, dtype=torch.float32)


def shown(bias: Tensor) -> Tensor:
    """Which keys a mask shows, bool like `bias`: it says so, or adds what does not hide (a NaN hides nothing)."""
    return bias if bias.dtype == torch.bool else ~(bias <= torch.finfo(bias.dtype).min)


def _silent(
    bias: Tensor | None, counted: Tensor | None = None, future: Tensor | None = None
) -> Tensor | None:
    """Which queries contribute nothing, bool [B or 1, H or 1, R or 1, 1]: they see no key, or do not count.

    Masks tell, not what their softmax became: other NaNs go on to the sums. None where neither says anything.

    Args:
        bias: [..., R or 1, T], bool (True: visible) or additive: -inf hides, as does the least number of its dtype.
        counted: bool [B, R].
        future: bool [R, R], what is hidden besides of the last R keys.
    """
    idle = None if counted is None else ~counted[:, None, :, None]
    if bias is None:
        return idle
    visible = shown(bias)
    if future is not None:
        rows = len(future)
        visible = visible.expand(*visible.shape[:-2], rows, -1).clone()
        visible[..., -rows:] &= ~future
    blind = ~visible.any(-1, keepdim=True)
    return blind if idle is None else blind | idle


def window_attention(
    query: Tensor, key: Tensor, scale: float, window: int, *, softcap: float | None = None
) -> Tensor:
    """The attention that the last `window` queries pay to the keys before them: float32 [B, H, T - window].

    Softmax over all keys, causal inside the window, summed over its queries; the window's own columns are
    then left out. `query` [B, H, N, d] ends where `key` [B, G, T, d] ends.
    """
    logits = _logits(query[:, :, -window:], key, scale, softcap)
    rows = logits.shape[2]
    # Only the window's own columns hide anything.
    logits[..., -rows:].masked_fill_(
        torch.ones(rows, rows, dtype=torch.bool, device=key.device).triu(1), -torch.inf
    )
    return _softmax(logits).sum(2)[..., : key.shape[2] - window]


def pool_neighbours(scores: Tensor, kernel: int, kind: str) -> Tensor:
    """Every score [..., T] replaced by the mean ("avg", zeros beyond the ends) or maximum ("max") around it.

    `kernel` is odd; 1 changes nothing.
    """
    flat = scores.reshape(1, -1, scores.shape[-1])
    pool = {"avg": functional.avg_pool1d, "max": functional.max_pool1d}[kind]
    return pool(flat, kernel, stride=1, padding=kernel // 2).view(scores.shape)


def map_rows(attention: Tensor, rows: Tensor | slice | None = None) -> Tensor:
    """Rows of a map [B, H, N, T] that is already there, as `attention_rows` gives them: [B, H, R, T]."""
    if rows is None:
        return attention
    if isinstance(rows, slice) or rows.dim() == 1:
        return attention[:, :, rows]
    return attention.gather(2, rows[:, None, :, None].expand(-1, attention.shape[1], -1, attention.shape[3]))
