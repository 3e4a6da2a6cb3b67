"""What a unit is worth: attention rows and columns, similarities, norms, random floors. All in float32."""

from __future__ import annotations

import math

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

    The heads of a group share one product with their key, so that keys are never repeated in memory. With
    `softcap` c (Gemma 2) a logit x becomes c · tanh(x / c). They lie at the start of `room`, float32 [at least
    B · H · R · T], if it is given.
    """
    batch, heads, rows, width = query.shape
    grouped = (query.float() * scale).reshape(batch * key.shape[1], -1, width)
    grouped_key = key.float().flatten(0, 1).transpose(1, 2)
    if room is not None:
        room = room[: batch * heads * rows * key.shape[2]].view(len(grouped), -1, key.shape[2])
    logits = torch.bmm(grouped, grouped_key, out=room).view(batch, heads, rows, key.shape[2])
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


def cosine_normalise(x: Tensor, eps: float = 1e-6) -> Tensor:
    """`x` [..., D] in float32 with unit rows; rows of norm below `eps` stay near zero."""
    x = x.float()
    return x / x.norm(dim=-1, keepdim=True).clamp_min(eps)


def min_max(x: Tensor, there: Tensor | None = None) -> Tensor:
    """`x` [..., N] scaled linearly so that each row runs from 0 to 1; a constant row becomes 0.

    With `there`, bool [..., N], over these entries alone; all others become 0.
    """
    if there is None:
        low, high = x.aminmax(dim=-1, keepdim=True)
    else:
        low = x.masked_fill(~there, torch.inf).amin(-1, keepdim=True)
        high = x.masked_fill(~there, -torch.inf).amax(-1, keepdim=True)
    scaled = (x - low) / (high - low).clamp_min(torch.finfo(x.dtype).tiny)
    return scaled if there is None else torch.where(there, scaled, 0.0)


def quantile_scaled(x: Tensor, there: Tensor, low: float = 0.05, high: float = 0.95) -> Tensor:
    """`x` [..., N] scaled linearly so that these quantiles of each row become 0 and 1, and cut off there.

    Over the entries that are `there`, bool [..., N], alone; all others become 0.
    """
    known = x.float().masked_fill(~there, torch.nan)
    below, above = (known.nanquantile(part, dim=-1, keepdim=True) for part in (low, high))
    scaled = ((x - below) / (above - below).clamp_min(torch.finfo(torch.float32).tiny)).clamp(0, 1)
    return torch.where(there, scaled, 0.0)


def page_rank(attention: Tensor, start: Tensor, steps: int, present: Tensor | None = None) -> Tensor:
    """Weighted page rank: `steps` times, every token hands its worth to the tokens it attends to.

    Args:
        attention: row-stochastic [..., N, N].
        start: [..., N]; its sum over present tokens is preserved.
        steps: how many votes.
        present: [..., N], 0 for tokens that are gone: rows are renormalised over the others, as if the map had
            been computed without them.
    """
    # One product per vote: scaling the votes of a row does what renormalising the row would.
    graph, worth, given = attention.flatten(0, -3), start.reshape(-1, 1, start.shape[-1]), None
    if present is not None:
        there = present.expand(start.shape).reshape(worth.shape)
        given = there / (graph @ there.mT).mT.clamp_min(1e-12)
    for _ in range(steps):
        worth = torch.bmm(worth if given is None else worth * given, graph)
    return (worth if given is None else worth * there).view(start.shape)


def map_rows(attention: Tensor, rows: Tensor | slice | None = None) -> Tensor:
    """Rows of a map [B, H, N, T] that is already there, as `attention_rows` gives them: [B, H, R, T]."""
    if rows is None:
        return attention
    if isinstance(rows, slice) or rows.dim() == 1:
        return attention[:, :, rows]
    return attention.gather(2, rows[:, None, :, None].expand(-1, attention.shape[1], -1, attention.shape[3]))


def cls_times_value_norm(row: Tensor, value: Tensor) -> Tensor:
    """The class token's attention row [B, H, N], summed over heads, times the norm of all heads' values: [B, N].

    `value` is [B, H, N, d] (PPT, eq. 5; ATS).
    """
    return row.sum(1) * value.float().square().sum((1, 3)).sqrt()


def cls_times_head_norm(row: Tensor, output: Tensor) -> Tensor:
    """The class token's attention row [B, H, N], its heads weighed for every token by how much they read there: [B, N].

    A head's weight is the norm of its `output` [B, H, N, d] at the token, over the sum of all heads' (EET's code).
    """
    norm = output.float().norm(dim=-1)
    return (row * norm).sum(1) / (norm.sum(1) + 1e-8)


def redundancy(similarity: Tensor, present: Tensor, threshold: float, gamma: float) -> tuple[Tensor, Tensor]:
    """How redundant tokens are beside others (SAINT): their score [B, R], and how many are like them, int64 [B, R].

    With c others of similarity at least `threshold`, m on average, the score is c · exp(gamma · (m - threshold));
    without any it is the mean similarity.

    Args:
        similarity: [B, R, C], of each token with the others.
        present: bool [B, C], which of the others are there.
        threshold, gamma: see above.
    """
    present = present.unsqueeze(1)
    alike = (similarity >= threshold) & present
    count = alike.sum(2)
    mean = (similarity * alike).sum(2) / count.clamp_min(1)
    score = count * torch.exp(gamma * (mean - threshold))
    alone = (similarity * present).sum(2) / present.sum(2).clamp_min(1)
    return torch.where(count > 0, score, alone), count


def transform_weights(features: Tensor, outputs: Tensor, temperature: float) -> Tensor:
    """How each token is dealt out over some of them: a softmax over the outputs of cosine similarity, [B, K, N].

    Columns sum to 1, so that whatever is dealt out (sizes) is conserved.

    Args:
        features: [B, N, D].
        outputs: int64 [B, K], the tokens that receive.
        temperature: what similarities are divided by.
    """
    unit = cosine_normalise(features)
    receiving = unit.gather(1, outputs.unsqueeze(2).expand(-1, -1, unit.shape[2]))
    return (receiving @ unit.transpose(1, 2) / temperature).softmax(dim=1)


def mean_rows(attention: Tensor, real: Tensor) -> Tensor:
    """The mean over heads and over the rows that are `real` [B, R], of attention [B, H, R, N]: [B, N]."""
    weight = real.to(attention.dtype) / real.sum(1, keepdim=True).clamp_min(1)
    return (attention.mean(1) * weight.unsqueeze(2)).sum(1)


def transition(entering: Tensor, leaving: Tensor, real: Tensor) -> Tensor:
    """How much a sublayer changes each token (TransPrune, token transition variation): [B, N].

    The ratio of norms after and before, times exp(1 - cosine) as a share of the sum over the row's real tokens.

    Args:
        entering, leaving: [B, N, D], a sublayer's input and output.
        real: bool [B, N].
    """
    entering, leaving = entering.float(), leaving.float()
    before, after = entering.norm(dim=-1), leaving.norm(dim=-1)
    # Not torch's own cosine, which takes both norms again.
    cosine = (entering * leaving).sum(-1) / (before.clamp_min(1e-8) * after.clamp_min(1e-8))
    turn = (1 - cosine).exp().masked_fill(~real, 0)
    ratio = after / before.clamp_min(1e-12)
    return (ratio * turn / turn.sum(1, keepdim=True)).masked_fill(~real, 0)


def uniform(shape: tuple[int, ...], seeds: Tensor) -> Tensor:
    """Uniform noise float32 [B, *shape], row b drawn from `seeds[b]` alone, on the CPU."""
    rows = [torch.rand(shape, generator=torch.Generator().manual_seed(int(seed))) for seed in seeds.tolist()]
    return torch.stack(rows)


def gaussian(shape: tuple[int, ...], seeds: Tensor) -> Tensor:
    """Normal noise float32 [B, *shape], row b drawn from `seeds[b]` alone, on the CPU."""
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(int(seed))) for seed in seeds.tolist()]
    return torch.stack(rows)


def patch_entropy(pixels: Tensor) -> Tensor:
    """Bits of the histogram of every patch's grey levels, 256 of them: [..., P, channels, n] of 0 to 1 -> [..., P].

    Levels are rounded, so is the mean of the channels' (VFlowOpt's code).
    """
    grey = (pixels * 255).round().mean(-2).round().long()  # [..., P, n]
    counts = torch.zeros(*grey.shape[:-1], 256, device=pixels.device)
    share = counts.scatter_add(-1, grey, torch.ones_like(grey, dtype=counts.dtype)) / grey.shape[-1]
    return -torch.special.xlogy(share, share).sum(-1) / math.log(2)
