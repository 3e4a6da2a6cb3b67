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
