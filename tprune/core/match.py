"""Which tokens resemble which."""

from __future__ import annotations

import torch
from torch import Tensor

from tprune.core.score import cosine_normalise


def bipartite_merge(metric: Tensor, count: int, prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    """Bipartite soft matching (ToMe, eq. 1-3): the `count` most similar pairs, and the order they leave.

    Tokens at even places look for their most similar token at an odd place. The first `prefix` tokens neither flow
    nor receive.

    Args:
        metric: [B, N, d], what is compared by cosine.
        count: how many tokens flow, at most (N - prefix) // 2.
        prefix: protected leading tokens.

    Returns:
        index [B, N - count]: prefix, then even tokens that stay, then odd ones. The even ones are in ascending
        order where there is a prefix, in descending order of similarity where there is none (as the authors have it).
        source [B, count]: the tokens that flow, most similar first.
        into [B, count]: the slots of `index` they flow to.
    """
    batch, length = metric.shape[:2]
    metric = cosine_normalise(metric)
    similarity = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)
    evens, odds = (prefix + 1) // 2, prefix // 2
    similarity[:, :evens] = -torch.inf
    similarity[:, :, :odds] = -torch.inf
    best, partner = similarity.max(dim=2)
    order = best.argsort(dim=1, descending=True, stable=True)
    flows, stays = order[:, :count], order[:, count:]
    if prefix:
        stays = stays.sort(dim=1).values
    kept_odds = torch.arange(odds, length // 2, device=metric.device).expand(batch, -1)
    head = torch.arange(prefix, device=metric.device).expand(batch, -1)
    index = torch.cat([head, 2 * stays[:, evens:], 2 * kept_odds + 1], dim=1)
    first_odd_slot = prefix + stays.shape[1] - evens
    into = first_odd_slot - odds + partner.gather(1, flows)
    return index, 2 * flows, into


def farthest_first(features: Tensor, count: int, allowed: Tensor | None = None) -> Tensor:
    """Max-min diversity by cosine distance, greedily (DivPrune, eq. 2-4): int64 [B, count], in the order chosen.

    The first token is the one farthest from its nearest neighbour; then always the one farthest from all chosen.
    One matrix product, and a running minimum instead of a look at all chosen rows. Ties go to the lower index; a
    longer choice begins with the shorter one.

    Args:
        features: [B, N, D].
        count: how many, at most the number of allowed tokens of a row.
        allowed: bool [B, N], what may be chosen; None for all.
    """
    unit = cosine_normalise(features)
    similarity = unit @ unit.transpose(1, 2)  # [B, N, N]
    similarity.diagonal(dim1=1, dim2=2).fill_(-2)
    if allowed is not None:
        similarity.masked_fill_(~allowed.unsqueeze(1), -2)
    batch, rows = len(features), torch.arange(len(features), device=features.device)
    # How close each token is to the nearest chosen one; at first, to its nearest neighbour.
    closeness = similarity.amax(dim=2)
    taken = torch.zeros_like(closeness) if allowed is None else torch.where(allowed, 0.0, torch.inf)
    order = torch.empty(batch, count, dtype=torch.int64, device=features.device)
    for place in range(count):
        pick = torch.add(closeness, taken).argmin(dim=1)
        order[:, place] = pick
        taken[rows, pick] = torch.inf
        chosen = similarity[rows, pick]
        closeness = chosen if place == 0 else torch.maximum(closeness, chosen)
    return order


def least_similar(features: Tensor, pivots: Tensor, quota: Tensor, pool: Tensor) -> Tensor:
    """Every pivot in turn takes the tokens least like it (DART, step 3): bool [B, N], what was taken.

    Args:
        features: [B, N, D], compared by cosine.
        pivots: int64 [B, P], the tokens that choose, in their order; they need not be in the pool.
        quota: int64 [B, P], how many each takes.
        pool: bool [B, N], what may be taken; nothing is taken twice.
    """
    features = features.float()
    index = pivots.unsqueeze(-1).expand(-1, -1, features.shape[-1])
    inverse = features.norm(dim=-1).clamp_min(1e-8).reciprocal()  # [B, N]
    similarity = (features.gather(1, index) @ features.transpose(1, 2)) * inverse.unsqueeze(1)
    taken = torch.zeros_like(pool)
    place = torch.arange(pool.shape[1], device=pool.device)
    for row, wanted in zip(similarity.unbind(1), quota.unbind(1), strict=True):
        order = row.masked_fill(~pool | taken, torch.inf).argsort(dim=1, stable=True)
        taken = taken | torch.zeros_like(pool).scatter(1, order, place < wanted.unsqueeze(1)) & pool
    return taken
