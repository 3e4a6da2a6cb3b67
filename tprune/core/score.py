"""What a unit is worth: similarities, norms, what maps of attention say, random floors. All in float32."""

from __future__ import annotations

import math

import torch
from torch import Tensor


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
