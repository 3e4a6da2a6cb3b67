"""Methods known by their descriptions alone, against plain loops over what the descriptions say."""

import pytest
import torch
from torch.nn.functional import cosine_similarity

from tprune.core import alike
from tprune.core.budget import PROJECTOR, Site
from tprune.methods import registry
from tprune.methods.attention import Attention
from tprune.methods.token_view import TokenView


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def image(tokens=36, width=8, heads=2, seed=0, key=None):
    """A view of one crop behind a tower with a class token."""
    query, other = (
        noise(1, heads, 1 + tokens, width, seed=seed),
        noise(1, heads, 1 + tokens, width, seed=seed + 1),
    )
    everything = torch.ones(1, tokens, dtype=torch.bool)
    tower = TokenView(
        noise(1, 1 + tokens, width, seed=seed + 2),
        torch.ones(1, 1 + tokens, dtype=torch.bool),
        prefix=1,
        depth=24,
        has_cls=True,
        attention=Attention(query, other if key is None else key, other, width**-0.5),
    )
    hidden = noise(1, tokens, width, seed=seed + 3)
    view = TokenView(hidden, everything, real=everything, encoder=tower, pool=lambda x: x)
    view.grid, view.encoders = (6, tokens // 6), {5: tower, 22: tower}
    return view


def attention(view):
    """The tower's whole map, mean over heads [1 + N, 1 + N]."""
    seen = view.encoder.attention
    return (seen.query @ seen.key.transpose(2, 3) * seen.scale).softmax(3).mean(1)[0]


def kept(method, view, count, **settings):
    reduction = registry.build(method, "vlm", settings).reduce(PROJECTOR, view, count, {})
    return reduction.index[0].tolist()


@pytest.mark.parametrize("bound", [0.1, 0.4, 0.7])
def test_greedyprune_never_takes_two_alike_while_others_are_left(bound):
    view = image()
    weight, likeness = (
        attention(view)[0, 1:],
        cosine_similarity(view.hidden[0, None], view.hidden[0, :, None], -1),
    )
    chosen, limit, unrelaxed = [], bound, 0
    while len(chosen) < 20:
        free = [
            i
            for i in range(36)
            if i not in chosen and all(float(likeness[i, j]) <= limit + 1e-6 for j in chosen)
        ]
        if not free:
            limit += 0.05
            continue
        chosen.append(max(free, key=lambda i: float(weight[i])))
        unrelaxed += limit == bound
    order = alike.suppress(view.hidden, weight[None], 20, bound, 0.05, view.prunable)[0].tolist()
    assert order == chosen
    assert 1 < unrelaxed <= 20
    assert kept("greedyprune", view, 20, bound=bound) == sorted(chosen)


def test_greedyprune_without_a_bound_takes_the_most_salient():
    view = image()
    best = attention(view)[0, 1:].argsort(descending=True)[:9]
    assert kept("greedyprune", view, 9, bound=1.0) == best.sort().values.tolist()
    assert kept("greedyprune", view, 1, bound=-1.0) == [int(best[0])]


def test_star_ranks_by_what_tokens_receive_which_differs_between_them():
    view = image()
    tokens = view.hidden[0]
    received = (tokens @ tokens.T / 8**0.5).softmax(1).mean(0)
    assert received.std() > 1e-3
    assert kept("star-vlm", view, 10) == received.argsort(descending=True)[:10].sort().values.tolist()


def test_stars_second_stage_ranks_by_what_the_texts_queries_pay():
    query, key = noise(2, 4, 12, 8), noise(2, 2, 12, 8, seed=1)
    place = torch.arange(12)
    prunable = ((place >= 2) & (place < 8)).repeat(2, 1)
    real = torch.ones_like(prunable)
    real[1, :1] = False
    view = TokenView(
        noise(2, 12, 8),
        prunable,
        whole=False,
        real=real,
        attention=Attention(query, key, key, 0.3, causal=True),
    )
    logits = query @ key.repeat_interleave(2, 1).transpose(2, 3) * 0.3
    full = logits.masked_fill(place > place[:, None], -torch.inf).softmax(3)
    assert torch.allclose(view.text_attention(), full.mean(1)[:, 8:].mean(1), atol=1e-6)


def test_foprus_ranks_by_the_attention_that_patches_receive():
    view = image()
    received = attention(view)[:, 1:].mean(0)
    assert kept("fopru", view, 9) == received.argsort(descending=True)[:9].sort().values.tolist()
    rows = received.view(6, 6).mean(1).argsort(descending=True).tolist()
    whole = [6 * row + column for row in rows[:2] for column in range(6)]
    rest = sorted(range(6 * rows[2], 6 * rows[2] + 6), key=lambda i: -received[i])[:3]
    assert kept("fopru", view, 15, strategy="row") == sorted(whole + rest)


def test_longtail_keeps_what_lies_before_the_point_farthest_from_the_chord():
    view = image()
    row = attention(view)[0, 1:]
    curve = row.sort(descending=True).values.double()
    points = torch.stack([torch.arange(36.0), curve], 1)
    chord = points[-1] - points[0]
    away = (points - points[0]) @ torch.stack([chord[1], -chord[0]])
    head = int(away.abs().argmax())
    assert 1 < head < 35
    assert kept("longtail", view, 36) == row.argsort(descending=True)[:head].sort().values.tolist()
    flat = image()
    flat.encoder.attention = Attention(*[torch.zeros(1, 1, 37, 4)] * 3, 1.0)
    assert len(kept("longtail", flat, 36)) == 36


def test_tokencorr_keeps_one_token_of_a_blank_sub_image_and_all_of_a_random_one():
    blank = noise(1, 1, 1, 8).expand(1, 2, 37, 8).contiguous()
    view = image(key=blank)
    assert len(kept("tokencorr", view, 36)) == 1
    reduction = registry.build("tokencorr", "vlm").reduce(PROJECTOR, view, 36, {})
    assert torch.allclose(reduction.apply(view.hidden)[0, 0], view.hidden[0].mean(0), atol=1e-5)
    assert len(kept("tokencorr", image(width=64), 36)) == 36


def test_tokencorr_samples_half_by_each_block_and_merges_by_similarity():
    view = image()
    shallow, deep = attention(view)[0, 1:], image(seed=9).encoder
    view.encoders[5], view.encoder = view.encoder, deep
    view.encoders[22] = deep
    method = registry.build("tokencorr", "vlm").counted()
    reduction = method.reduce(PROJECTOR, view, 8, {})
    first = shallow.argsort(descending=True)[:4].tolist()
    second = [i for i in attention(view)[0, 1:].argsort(descending=True).tolist() if i not in first][:4]
    chosen = sorted(first + second)
    assert reduction.index[0].tolist() == chosen
    keys = deep.attention.key.transpose(1, 2).flatten(2)[0, 1:]
    likeness = cosine_similarity(keys[:, None], keys[None, chosen], -1)
    total, weight = view.hidden[0, chosen].clone(), torch.ones(8)
    for token in set(range(36)) - set(chosen):
        slot = int(likeness[token].argmax())
        share = float(likeness[token, slot].clamp_min(0))
        total[slot] += share * view.hidden[0, token]
        weight[slot] += share
    assert torch.allclose(reduction.apply(view.hidden)[0], total / weight[:, None], atol=1e-5)


def tower_of(tiles, tokens, seed):
    """What a tower with a class token shows of its last block, one tile in each row."""
    query, key = noise(tiles, 2, 1 + tokens, 8, seed=seed), noise(tiles, 2, 1 + tokens, 8, seed=seed + 1)
    seen = TokenView(noise(tiles, 1 + tokens, 8), torch.ones(tiles, 1 + tokens, dtype=torch.bool), prefix=1)
    seen.has_cls, seen.depth, seen.attention = True, 24, Attention(query, key, key, 1.0)
    return seen


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_ptp_shares_out_by_the_tiles_saliency_and_fuses_tower_and_text_inside_them(alpha):
    """Two prompts: two tiles and a newline between them, and one tile behind padding."""
    places = torch.tensor([[*range(2, 11)], [*range(12, 21)], [*range(5, 14)]])
    rows, tower = torch.tensor([0, 0, 1]), tower_of(3, 9, 0)
    everything = torch.ones(3, 9, dtype=torch.bool)
    tiles = TokenView(noise(3, 9, 8), everything, position=places, encoder=tower, pool=lambda x: x)
    tiles.encoders, tiles.signals = {23: tower}, {"rows": lambda: rows}
    method, memory = registry.build("ptp", "vlm", {"alpha": alpha}), {}
    assert method.reduce(PROJECTOR, tiles, 9, memory).index.tolist() == [list(range(9))] * 3

    query, key = noise(2, 4, 25, 8, seed=2), noise(2, 2, 25, 8, seed=3)
    prunable, real = torch.zeros(2, 25, dtype=torch.bool), torch.ones(2, 25, dtype=torch.bool)
    prunable[0, 2:21] = prunable[1, 5:14] = True
    real[1, :4] = False
    hidden = torch.where(real[:, None, None], 0.0, -torch.inf)
    seen = Attention(query, key, key, 0.4, bias=hidden, causal=True)
    prompt = TokenView(noise(2, 25, 8), prunable, whole=False, real=real, attention=seen)
    count = torch.tensor([10, 5])
    reduction = method.reduce(Site(2), prompt, count, memory)

    place = torch.arange(25)
    logits = query @ key.repeat_interleave(2, 1).transpose(2, 3) * 0.4 + hidden
    paid = logits.masked_fill(place > place[:, None], -torch.inf).softmax(3).mean(1)
    own = (tower.attention.query @ tower.attention.key.transpose(2, 3)).softmax(3).mean(1)[:, 0, 1:]
    for row, first_text in ((0, 21), (1, 14)):
        text = paid[row, first_text:].amax(0)
        span = prunable[row].nonzero().flatten()
        text = (text - text[span].min()) / (text[span].max() - text[span].min())
        mine = [tile for tile in range(3) if rows[tile] == row]
        total, chosen = sum(float(own[tile].mean()) for tile in mine), []
        quota = {tile: int(int(count[row]) * float(own[tile].mean()) / total) for tile in mine}
        richest = sorted(mine, key=lambda tile: -float(own[tile].mean()))
        for tile in richest[: int(count[row]) - sum(quota.values())]:
            quota[tile] += 1
        for tile in mine:
            scaled = (own[tile] - own[tile].min()) / (own[tile].max() - own[tile].min())
            fused = (1 - alpha) * scaled + alpha * text[places[tile]]
            chosen += places[tile][fused.argsort(descending=True)[: quota[tile]]].tolist()
        kept = (
            reduction.index[row][reduction.valid[row]]
            if reduction.valid is not None
            else reduction.index[row]
        )
        assert [token for token in kept.tolist() if prunable[row, token]] == sorted(chosen)
