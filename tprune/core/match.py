"""Which tokens resemble which."""

from __future__ import annotations

import numpy as np
import torch
from scipy.cluster import hierarchy
from torch import Tensor

from tprune.core import cosine
from tprune.core.reduction import gather_tokens
from tprune.core.score import cosine_normalise
from tprune.core.select import places, with_prefix


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
    if length < 2:
        place = torch.arange(length, device=metric.device).expand(batch, -1)
        return place, place[:, :0], place[:, :0]
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
    index = with_prefix(torch.cat([2 * stays[:, evens:], 2 * kept_odds + 1], dim=1), prefix)
    first_odd_slot = prefix + stays.shape[1] - evens
    into = first_odd_slot - odds + partner.gather(1, flows)
    return index, 2 * flows, into


def farthest_first(
    features: Tensor, count: int, allowed: Tensor | None = None, seeds: Tensor | None = None
) -> Tensor:
    """Max-min diversity by cosine distance, greedily (DivPrune, eq. 2-4): int64 [B, count], in the order chosen.

    The first token is the one farthest from its nearest neighbour; then always the one farthest from all chosen.
    One matrix product, and a running minimum instead of a look at all chosen rows. Ties go to the lower index; a
    longer choice begins with the shorter one.

    Args:
        features: [B, N, D].
        count: how many, at most the number of allowed tokens of a row.
        allowed: bool [B, N], what may be chosen; None for all.
        seeds: bool [B, N], what is chosen already and not again; None for nothing.
    """
    similarity = cosine.among(features, eps=1e-6)
    similarity.diagonal(dim1=1, dim2=2).fill_(-2)
    if allowed is not None:
        similarity.masked_fill_(~allowed.unsqueeze(1), -2)
    batch, rows = len(features), torch.arange(len(features), device=features.device)
    # How close each token is to the nearest chosen one; at first, to its nearest neighbour.
    closeness = similarity.amax(dim=2)
    taken = torch.zeros_like(closeness) if allowed is None else torch.where(allowed, 0.0, torch.inf)
    begun = torch.zeros(batch, 1, dtype=torch.bool, device=features.device)
    if seeds is not None:
        begun = seeds.any(1, keepdim=True)
        closeness = torch.where(begun, similarity.masked_fill(~seeds.unsqueeze(2), -2).amax(1), closeness)
        taken = taken.masked_fill(seeds, torch.inf)
    order = torch.empty(batch, count, dtype=torch.int64, device=features.device)
    for place in range(count):
        pick = torch.add(closeness, taken).argmin(dim=1)
        order[:, place] = pick
        taken[rows, pick] = torch.inf
        chosen = similarity[rows, pick]
        if place == 0:
            closeness = closeness.masked_fill(~begun, -2)
        closeness = torch.maximum(closeness, chosen)
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


def nearest(features: Tensor, source: Tensor, target: Tensor, barred: int = 0) -> tuple[Tensor, Tensor]:
    """The target most similar to every source, by cosine.

    Args:
        features: [B, N, D].
        source, target: int64 [B, R] and [B, K], tokens of `features`.
        barred: how many leading targets (prefix tokens) nothing goes to; fewer than K.

    Returns:
        similarity [B, R], float32, and the place of the target in `target`, int64 [B, R].
    """
    features, target = features.float(), target[:, barred:]
    inverse = features.norm(dim=-1).clamp_min(1e-6).reciprocal()  # [B, N]
    # Sources are few: a product with all tokens is cheaper than unit rows of them, or than collecting the targets.
    similarity = (gather_tokens(features, source) @ features.transpose(1, 2)) * inverse.unsqueeze(1)
    best, place = similarity.gather(2, target.unsqueeze(1).expand(-1, source.shape[1], -1)).max(dim=2)
    return best * inverse.gather(1, source), place + barred


def density_peaks(features: Tensor, count: int, neighbours: int) -> tuple[Tensor, Tensor, Tensor]:
    """Clusters around density peaks (DPC-kNN): `count` centres, everything else to the nearest of them.

    With squared distances divided by the width D, a token's density is exp(-mean over its `neighbours` nearest,
    itself apart), its separation the distance to the nearest denser token (the largest of its distances for the densest
    of all), and the centres are the tokens with the largest product of both. Of equally dense tokens the lower
    index counts as denser.

    Args:
        features: [B, N, D].
        count: how many centres, 1 to N.
        neighbours: k, cut to N - 1.

    Returns:
        centre [B, count] and other [B, N - count], both ascending, and the place of each other token's centre in
        `centre`, int64 [B, N - count].
    """
    length, distance = features.shape[1], _distances(features)
    place = torch.arange(length, device=features.device)
    apart = distance.masked_fill(place == place.unsqueeze(1), torch.inf)
    density = _density(apart, max(1, min(neighbours, length - 1)))
    denser = (density.unsqueeze(1) > density.unsqueeze(2)) | (
        (density.unsqueeze(1) == density.unsqueeze(2)) & (place < place.unsqueeze(1))
    )
    order = _by_peak(distance, density, denser, distance.amax(2, keepdim=True))
    centre, other = order[:, :count].sort(dim=1).values, order[:, count:].sort(dim=1).values
    to_centre = gather_tokens(distance, other).gather(2, centre.unsqueeze(1).expand(-1, length - count, -1))
    nearest_centre = to_centre.argmin(2) if length > count else other
    return centre, other, nearest_centre


def ranked_peaks(features: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`density_peaks` as SparseVLM has it, on few tokens: clusters in the order of their centres' rank.

    A token's density is over its `count` nearest, itself among them; what has no denser token is as far from one as the
    farthest two tokens are apart. The authors' noise against equal densities is left out.

    Args:
        features: [B, N, D].
        count: how many clusters, 1 to N.

    Returns:
        centre [B, count], by density times separation, descending; and every token's cluster, int64 [B, N].
    """
    # Few tokens: exact distances cost little, and do not depend on the rest of a batch.
    distance = _distances(features, "donot_use_mm_for_euclid_dist")
    density = _density(distance, count)
    denser = density.unsqueeze(1) > density.unsqueeze(2)
    centre = _by_peak(distance, density, denser, distance.amax((1, 2), keepdim=True))[:, :count]
    cluster = gather_tokens(distance, centre).argmin(1)
    own = torch.arange(count, device=centre.device).expand_as(centre)
    return centre, cluster.scatter(1, centre, own)


def _density(distance: Tensor, neighbours: int) -> Tensor:
    """exp(-mean of the squares) of every token's `neighbours` smallest distances [B, N, N]: [B, N]."""
    return distance.topk(neighbours, dim=2, largest=False).values.square().mean(2).neg().exp()


def _by_peak(distance: Tensor, density: Tensor, denser: Tensor, alone: Tensor) -> Tensor:
    """Tokens by density times separation, descending: int64 [B, N].

    A token's separation is its `distance` [B, N, N] to the nearest of those `denser` (bool [B, N, N]), `alone` where
    there is none.
    """
    separation = torch.where(denser, distance, alone).amin(2)
    return (density * separation).argsort(dim=1, descending=True, stable=True)


def _distances(features: Tensor, mode: str = "use_mm_for_euclid_dist_if_necessary") -> Tensor:
    """Euclidean distances over the root of the width, float32 [B, N, N]."""
    return torch.cdist(features.float(), features.float(), compute_mode=mode) / features.shape[2] ** 0.5


def recycle(
    features: Tensor, score: Tensor, prunable: Tensor, kept: int, recycled: int, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The best prunable tokens stay, the next best are clustered, and their means follow behind (SparseVLM).

    Args:
        features: [B, N, D], what is clustered.
        score: [B, N].
        prunable: bool [B, N], the same number in every row.
        kept: how many of them stay.
        recycled: how many of those that leave are clustered.
        groups: how many clusters.

    Returns:
        index [B, N - prunable + kept + groups]: all that stay in their order, and one token per cluster behind the
        last place of a prunable one; source [B, recycled] and into [B, recycled], as `Reduction.average` takes them.
    """
    length, device = prunable.shape[1], prunable.device
    place = torch.arange(length, device=device)
    ranked = score.masked_fill(~prunable, -torch.inf).argsort(dim=1, descending=True, stable=True)
    pool = ranked[:, kept : kept + recycled]
    centre, cluster = ranked_peaks(gather_tokens(features, pool), groups)
    stays = (~prunable).scatter(1, ranked[:, :kept], True)
    index, _ = places(stays)
    # Where the clusters go: behind everything that stays up to the last prunable place.
    seam = (stays & (place <= (place * prunable).amax(1, keepdim=True))).sum(1, keepdim=True)
    slot = torch.arange(index.shape[1], device=device).expand_as(index)
    slot = slot + groups * (slot >= seam)
    merged = seam + torch.arange(groups, device=device)
    index = torch.cat([index, pool.gather(1, centre)], 1)
    index = torch.empty_like(index).scatter(1, torch.cat([slot, merged], 1), index)
    into = merged.gather(1, cluster)
    return index, pool, into.scatter(1, centre, -1)


LINKAGES = ("single", "complete", "average")


def agglomerate(distance: Tensor, count: int, linkage: str) -> tuple[Tensor, Tensor, Tensor]:
    """Hierarchical clustering: the two nearest clusters merge until `count` are left (ATC, section 3).

    Two clusters are as far apart as their nearest members ("single"), their farthest ("complete"), or all pairs of
    members on average ("average"). Inherently sequential, so each row goes through scipy's compiled nearest-neighbour
    chain on the host (for 16 x 196 tokens several times faster than batched tensor operations, one merge at a time).

    Args:
        distance: [B, N, N], symmetric; the diagonal is not read.
        count: how many clusters, 1 to N.
        linkage: one of `LINKAGES`.

    Returns:
        index [B, count]: the first token of every cluster, ascending.
        source [B, N - count]: all other tokens, ascending.
        into [B, N - count]: the places in `index` of their clusters.
    """
    batch, length = distance.shape[:2]
    # Tokens are the clusters 0 .. N - 1, the m-th merge makes cluster N + m; each is known by its first token.
    first = np.tile(np.arange(length), (batch, 1))
    known = np.concatenate([first, np.zeros_like(first)], axis=1)
    if count < length:
        upper = np.triu_indices(length, k=1)
        rows = distance.double().cpu().numpy()[:, *upper]
        trees = np.stack([hierarchy.linkage(row, linkage)[: length - count] for row in rows])
        sample = np.arange(batch)
        for merge, pair in enumerate(trees[:, :, :2].astype(np.int64).transpose(1, 2, 0)):
            both = known[sample, pair]
            known[:, length + merge] = both.min(0)
            first[sample, both.max(0)] = both.min(0)
    root = torch.from_numpy(first).to(distance.device)
    for _ in range(length.bit_length()):
        root = root.gather(1, root)
    leads = root == torch.arange(length, device=root.device)
    order = leads.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    source = order[:, count:]
    return order[:, :count], source, (leads.cumsum(1) - 1).gather(1, root.gather(1, source))
