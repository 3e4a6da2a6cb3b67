"""Zero-TPrune against its formulas, spelled out token by token (there is no public code)."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tprune.core.budget import Site
from tprune.methods import registry
from tprune.methods.attention import Attention
from tprune.methods.token_view import TokenView


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rank(attention, alive, votes):
    """Weighted page rank of one image over the tokens in `alive` (0 is the class token), per head, then RMS."""
    per_head = []
    for head in attention:
        graph = head[alive][:, alive]
        graph = graph / graph.sum(1, keepdim=True)
        start = torch.ones(len(alive))
        start[0] = math.sqrt(len(head))
        worth = start / start.sum()
        for _ in range(votes):
            worth = torch.stack([(graph[:, j] * worth).sum() for j in range(len(alive))])
        per_head.append(worth[1:])
    spread = [(w / w.mean()).var(unbiased=False).item() for w in per_head]
    kept = [w for w, v in zip(per_head, spread, strict=True) if 0.01 <= v <= 0.7] or per_head
    return sum(w**2 for w in kept).div(len(kept)).sqrt()


def expected_tokens(query, key, count, duplicates, votes):
    """The patches that I'-S-I keeps of one image."""
    attention = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)
    length = attention.shape[-1]
    first = rank(attention, list(range(length)), 1)
    order = [1 + i for i in sorted(range(length - 1), key=lambda i: -first[i].item())]
    half = len(order) - len(order) // 2
    important, others = order[:half], order[half:]
    feature = torch.nn.functional.normalize(key.transpose(0, 1).flatten(1), dim=-1)
    nearest = {t: max((feature[t] @ feature[u]).item() for u in important) for t in others}
    dropped = sorted(others, key=lambda t: -nearest[t])[:duplicates]
    alive = [t for t in range(length) if t not in dropped]
    last = rank(attention, alive, votes)
    best = sorted(range(len(alive) - 1), key=lambda i: -last[i].item())[:count]
    return sorted(alive[1 + i] for i in best), dropped, others


@given(st.integers(0, 200), st.sampled_from([3, 6, 9]), st.integers(4, 14))
def test_it_keeps_what_the_formulas_keep(seed, layer, count):
    method = registry.build("zero-tprune", "vit")
    query, key = 2 * drawn(seed, 2, 3, 17, 8), drawn(seed + 1, 2, 3, 17, 8)
    view = TokenView(
        hidden=drawn(seed, 2, 17, 4),
        prunable=torch.ones(2, 17, dtype=torch.bool),
        prefix=1,
        depth=12,
        attention=Attention(query, key, key, 8**-0.5),
    )
    index = method.reduce(Site(layer), view, count, {}).index
    duplicates = method.duplicates(layer / 12, 16, count)
    votes = {3: 30, 6: 5, 9: 1}[layer]
    for sample in range(2):
        kept, dropped, others = expected_tokens(query[sample], key[sample], count, duplicates, votes)
        assert index[sample].tolist() == [0, *kept]
        assert set(dropped) <= set(others)


@pytest.mark.parametrize("layer", [1, 11])
def test_where_the_importance_stage_keeps_all_only_similar_tokens_leave(layer):
    method = registry.build("zero-tprune", "vit")
    assert method.duplicates(layer / 12, 100, 90) == 10
    assert method.duplicates(layer / 12, 100, 20) == 50


def test_heads_are_all_used_where_the_filter_would_leave_none():
    method = registry.build("zero-tprune", "vit", {"variance": "5,6"})
    attention = drawn(0, 1, 2, 6, 6).softmax(-1)
    worth = method.importance(attention, torch.ones(1, 6), 1, 3)
    assert torch.isfinite(worth).all()
    assert (worth > 0).all()
