"""BAT and MSTM against what they say, spelled out token by token."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cosine_similarity

from tprune.core import match
from tprune.core.budget import Site
from tprune.methods import registry
from tprune.methods.attention import Attention
from tprune.methods.token_view import TokenView


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def view_of(seed, prefix=1, tokens=16):
    """Two images with random tokens, queries and keys, and what their class tokens attend to: [2, N]."""
    length = prefix + tokens
    query, key = 2 * drawn(seed, 2, 3, length, 8), drawn(seed + 1, 2, 3, length, 8)
    view = TokenView(
        hidden=drawn(seed + 2, 2, length, 4),
        prunable=torch.arange(length).ge(prefix).expand(2, length),
        prefix=prefix,
        depth=12,
        attention=Attention(query, key, key, 8**-0.5),
    )
    return view, (query[:, :, :1] @ key.transpose(2, 3) * 8**-0.5).softmax(-1).mean(1)[:, 0]


def mean_of(group, x, weight):
    """The mean of the tokens of a group, weighted."""
    return sum(weight[i] * x[i] for i in group) / sum(weight[i] for i in group)


@given(st.integers(0, 200), st.integers(1, 15), st.integers(1, 3))
def test_mstm_merges_every_other_token_into_its_most_similar_crucial_one(seed, count, prefix):
    view, attention = view_of(seed, prefix)
    reduction = registry.build("mstm", "vit").reduce(Site(3, True), view, count, {})
    merged = reduction.apply(view.hidden)
    for x, worth, got in zip(view.hidden, attention, merged, strict=True):
        ranked = sorted(range(prefix, len(x)), key=lambda i: -worth[i].item())
        crucial = sorted(ranked[:count])
        groups = {i: [i] for i in [*range(prefix), *crucial]}
        for i in ranked[count:]:
            groups[max(crucial, key=lambda j: cosine_similarity(x[i], x[j], dim=0).item())].append(i)
        expected = torch.stack([mean_of(group, x, worth) for group in groups.values()])
        assert torch.allclose(got, expected, atol=1e-5)


def clusters_of(points, count, neighbours):
    """Density peaks of one image: the members of every cluster, by index."""
    n, width = len(points), points.shape[1]
    distance = [[math.dist(a.tolist(), b.tolist()) / math.sqrt(width) for b in points] for a in points]
    density = []
    for i in range(n):
        near = sorted(distance[i][j] for j in range(n) if j != i)[:neighbours]
        density.append(math.exp(-sum(d * d for d in near) / len(near)))
    apart = []
    for i in range(n):
        denser = [distance[i][j] for j in range(n) if density[j] > density[i]]
        apart.append(min(denser) if denser else max(distance[i]))
    centres = sorted(sorted(range(n), key=lambda i: -density[i] * apart[i])[:count])
    groups = {centre: [centre] for centre in centres}
    for i in set(range(n)) - set(centres):
        groups[min(centres, key=lambda c: distance[i][c])].append(i)
    return groups


@given(st.integers(0, 200), st.integers(4, 15))
def test_bat_pairs_attentive_tokens_and_clusters_the_others(seed, count):
    method = registry.build("bat", "vit", {"clusters": 0.3, "pairs": 0.2, "neighbours": 3})
    view, attention = view_of(seed)
    merged = method.reduce(Site(3, True), view, count, {}).apply(view.hidden)
    clusters, attentive, pairs = method.parts(16, count)
    assert clusters + attentive - pairs == count
    for x, worth, got in zip(view.hidden, attention, merged, strict=True):
        ranked = sorted(range(1, 17), key=lambda i: -worth[i].item())
        strong, weak = sorted(ranked[:attentive]), sorted(ranked[attentive:])
        best = {}
        for i in strong[::2]:
            likeness = {j: cosine_similarity(x[i], x[j], dim=0).item() for j in strong[1::2]}
            if likeness:
                best[i] = max(likeness.items(), key=lambda item: item[1])
        joining = sorted(best, key=lambda i: -best[i][1])[:pairs]
        groups = [[i] for i in strong if i not in joining]
        for i in joining:
            next(group for group in groups if best[i][0] == group[0]).append(i)
        found = clusters_of(x[weak], clusters, 3).values() if len(weak) > 1 else [[0]]
        groups += [[weak[i] for i in members] for members in found]
        expected = [x[0], *(mean_of(group, x, worth) for group in groups)]
        assert len(expected) == len(got)
        # The order of the tokens is not part of the paper: compare as sets.
        distance = torch.cdist(torch.stack(expected), got)
        assert distance.amin(0).max() < 1e-4
        assert distance.amin(1).max() < 1e-4


def test_two_tight_groups_have_a_centre_each():
    points = torch.cat([0.01 * drawn(0, 1, 6, 4), 5 + 0.01 * drawn(1, 1, 4, 4)], dim=1)
    centre, other, place = match.density_peaks(points, 2, 3)
    assert centre[0, 0] < 6 <= centre[0, 1]
    assert torch.equal(place[0] == 1, other[0] >= 6)


def test_equal_points_cluster_without_ties_deciding_differently():
    points = torch.zeros(2, 5, 3)
    centre, other, place = match.density_peaks(points, 2, 5)
    assert torch.equal(centre[0], centre[1])
    assert place.shape == other.shape == (2, 3)
