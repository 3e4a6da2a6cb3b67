"""Keys that are found in stages, on the host."""

import copy

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import tprune
from tests.decoders import decoder, tokens
from tprune.core.hierarchical import Hosted, descend, hierarchical_top
from tprune.core.stored import Stored, stack_stored
from tprune.core.tiles import attend_tiles
from tprune.errors import UserError
from tprune.methods import registry

SIZES = (32, 8, 4)


def states(length, rows=2, heads=2, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, heads, length, width, generator=generator) for _ in range(2)]


def walked(values, left, right):
    """The authors' descent through one chunk, a step at a time."""
    best, size = -float("inf"), float(right - left)
    while size >= 1:
        size /= 2
        if left >= right:
            continue
        centre = (left + right) // 2
        first, second = values[(left + centre) // 2], values[(centre + right) // 2]
        best = max(best, first, second)
        left, right = (left, centre) if first > second else (centre, right)
    return best


def test_a_descent_is_that_of_the_authors_kernel():
    values = torch.randn(1, 2, 100, generator=torch.Generator().manual_seed(1))
    left = torch.arange(0, 100, 32).expand(1, 2, -1)
    right = (left + 32).clamp_max(100)
    found = descend(lambda slots: values.gather(2, slots), left, right)
    for head in range(2):
        for chunk in range(4):
            ends = int(left[0, head, chunk]), int(right[0, head, chunk])
            assert found[0, head, chunk].item() == pytest.approx(walked(values[0, head].tolist(), *ends))


def test_a_key_whose_neighbours_are_like_it_is_found_and_only_among_the_candidates():
    values = torch.zeros(1, 1, 400)
    values[..., 200:296] = torch.linspace(1, 2, 96)
    values[..., 390:] = 9.0
    slots, real = hierarchical_top(lambda at: values.gather(2, at), (1, 1), 10, 380, SIZES, (128, 32, 8))
    assert real.all()
    assert slots[0, 0].tolist() == list(range(290, 298))


def test_a_slot_is_named_once_and_none_lies_outside():
    values = torch.randn(2, 3, 150, generator=torch.Generator().manual_seed(2))
    slots, real = hierarchical_top(lambda at: values.gather(2, at), (2, 3), 5, 141, SIZES, (96, 64, 40))
    assert slots.shape == (2, 3, 40)
    for row, there in zip(slots.flatten(0, 1), real.flatten(0, 1), strict=True):
        named = row[there].tolist()
        assert len(set(named)) == len(named)
        assert min(named) >= 5
        assert max(named) < 141


def test_where_all_chunks_go_on_it_is_attention_to_all():
    (key, value), (query, _) = states(150), states(1, heads=4, seed=3)
    hosted = Hosted.of(key, value, 3, SIZES, (256, 256, 256))
    read = attend_tiles(query, hosted.seen_by(query), 0.5)
    assert torch.allclose(
        read, scaled_dot_product_attention(query, key, value, scale=0.5, enable_gqa=True), atol=1e-5
    )
    assert torch.allclose(attend_tiles(query, hosted.tiles(), 0.5), read, atol=1e-5)


def test_query_heads_of_a_group_choose_for_themselves():
    (key, value), (query, _) = states(150), states(1, heads=4, seed=3)
    hosted = Hosted.of(key, value, 3, SIZES, (64, 32, 16))
    slots, real = hierarchical_top(
        lambda at: (query @ key.repeat_interleave(2, 1).mT)[:, :, 0].gather(2, at),
        (2, 4), 3, 150, SIZES, (64, 32, 16),
    )  # fmt: skip
    visible = torch.zeros(2, 4, 150, dtype=torch.bool).scatter(2, slots.where(real, 0), True)
    visible[..., :3] = True
    assert not torch.equal(visible[:, 0], visible[:, 1])
    expected = scaled_dot_product_attention(
        query, key, value, visible.unsqueeze(2), scale=0.5, enable_gqa=True
    )
    assert torch.allclose(attend_tiles(query, hosted.seen_by(query), 0.5), expected, atol=1e-5)


def test_later_entries_join_without_moving_all_and_rows_stay_apart():
    (key, value), (query, _) = states(700), states(1, heads=4, seed=3)
    whole = Hosted.of(key, value, 3, SIZES, (64, 32, 16))
    stored = Stored((Hosted.of(key[:, :, :80], value[:, :, :80], 3, SIZES, (64, 32, 16)),))
    before = stored.parts[0].pieces[0][0].data_ptr()
    for first in range(80, 700, 10):
        part = slice(first, first + 10)
        stored = stored.absorb(key[:, :, part], value[:, :, part])
        assert len(stored.parts) == 1
        assert first > 300 or stored.parts[0].pieces[0][0].data_ptr() == before
    assert stored.parts[0].length == 700
    expected = attend_tiles(query, whole.seen_by(query), 0.5)
    assert torch.allclose(attend_tiles(query, stored.seen_by(query), 0.5), expected, atol=1e-5)
    turned = stored.each_row(lambda x: x.flip(0))
    assert torch.allclose(attend_tiles(query.flip(0), turned.seen_by(query.flip(0)), 0.5), expected.flip(0))
    rows = stack_stored([stored.each_row(lambda x, row=row: x[row : row + 1]) for row in range(2)])
    assert torch.allclose(attend_tiles(query, rows.seen_by(query), 0.5), expected, atol=1e-5)


def test_a_stage_searches_when_it_is_time_to_and_what_came_since_is_read():
    """Between searches through all, the earlier stages stay as they were; a whole search is as the first one."""
    (key, value), (query, _) = states(300), states(40, heads=4, seed=3)
    given = 3, SIZES, (64, 32, 16)
    stored = Stored((Hosted.of(key[:, :, :240], value[:, :, :240], *given, (12, 6, 3)),))
    for token in range(24):
        before, asked = stored.parts[0].found, query[:, :, token : token + 1]
        stored = stored.asked(asked)
        found, count = stored.parts[0].found, 240 + token
        same = (
            []
            if before is None
            else [torch.equal(*pair) for pair in zip(before.chunks, found.chunks, strict=True)]
        )
        assert before is None or [before.key is found.key, all(same)] == [token % 3 != 0] * 2
        if token % 12 == 0:
            whole = Hosted.of(key[:, :, :count], value[:, :, :count], *given).asked(asked).found
            assert torch.equal(whole.key, found.key)
        elif token % 6 == 0:
            assert same == [True, True, False, False]
        elif token % 3 == 0:
            assert same == [True, True, True, False]
        recent = list(stored.seen_by(asked))[1:]
        assert sum(tile.entries for tile in recent) == token % 12
        part = slice(count, count + 1)
        stored = stored.absorb(key[:, :, part], value[:, :, part])


def test_a_token_that_is_padding_searches_nothing():
    (key, value), (query, _) = states(200), states(2, heads=4, seed=3)
    stored = Stored((Hosted.of(key, value, 3, SIZES, (64, 32, 16), (4, 2, 1)),))
    whole, half = (stored.asked(query[:, :, :1], real) for real in (None, torch.tensor([True, False])))
    first, second = half.parts[0].rows
    assert torch.equal(first.parts[0].found.key, whole.parts[0].found.key[:1])
    assert second.parts[0].found is None
    again = half.asked(query[:, :, 1:]).parts[0].rows[1].parts[0].found
    assert torch.equal(again.key, stored.asked(query[:, :, 1:]).parts[0].found.key[1:])


@pytest.mark.parametrize("length", [150, 5000])
def test_keys_scored_one_by_one_or_all_at_once_are_the_same_ones(length):
    """A long context is searched key by key, a short one has fewer keys than a search looks at."""
    (key, value), (query, _) = states(length), states(1, heads=4, seed=3)
    hosted = Hosted.of(key, value, 3, SIZES, (64, 32, 16))
    slots, _ = hierarchical_top(
        lambda at: (query @ key.repeat_interleave(2, 1).mT)[:, :, 0].gather(2, at),
        (2, 4), 3, length, SIZES, (64, 32, 16),
    )  # fmt: skip
    chosen = key.repeat_interleave(2, 1).gather(2, slots.unsqueeze(3).expand(-1, -1, -1, 8))
    assert torch.equal(hosted.asked(query).found.key[:, :, 3:], chosen)


def test_what_a_token_reads_is_the_budget_and_the_rest_lies_on_the_host():
    model, ids = decoder(), tokens(1, 128)
    with tprune.prune(model, "infinitehip", keep=0.5) as handle:
        cache = model(ids).past_key_values
        assert handle.achieved().value == pytest.approx(0.5, abs=0.01)
        for layer in cache.layers:
            hosted = layer.stored.parts[0]
            assert layer.keys.shape[2] + hosted.length == 128
            assert hosted.pieces[0][0].device.type == "cpu"
        fork = copy.deepcopy(cache)
        once = model(ids[:, :1], past_key_values=cache).logits
        assert torch.equal(once, model(ids[:, :1], past_key_values=fork).logits)


def test_layers_share_the_budget_and_settings_that_cannot_be_are_refused():
    method = registry.build("infinitehip", "llm-context")
    counts = method.counts(10000, 32, 0.2)
    assert sum(counts) / 32 == pytest.approx(2000, abs=1)
    assert (counts[0] - 20) / (counts[4] - 20) == pytest.approx(2, abs=0.01)
    assert method.counts(100, 4, 0.9)[0] == 99
    assert sum(method.counts(100, 4, 0.9)) == pytest.approx(360, abs=2)
    for settings, clue in (
        ({"sizes": (256, 24, 8)}, "do not divide"),
        ({"sizes": (256, 8)}, "one more size"),
    ):
        with pytest.raises(UserError, match=clue):
            registry.build("infinitehip", "llm-context", settings)
    with tprune.prune(decoder(), "infinitehip", keep=0.05) as handle:
        with pytest.raises(UserError, match="no room for a chunk of 8"):
            handle.compression.base(tokens(1, 128))
