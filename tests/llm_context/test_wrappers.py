"""What goes around any scorer: budgets per head, pruning again while decoding; and entries held in another form."""

import copy

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import tprune
from tests.decoders import decoder, tokens
from tests.golden_values import golden
from tprune.core.by_head import Ragged, shared_counts
from tprune.core.stored import Rows, Stored, stack_stored
from tprune.core.tiles import Tile, attend_tiles
from tprune.errors import UserError
from tprune.evaluate.context import cache_bytes
from tprune.methods import registry
from tprune.models.compress import Compression

PROMPT = 128


def every_method_that_takes(name):
    facts = registry.facts("llm-context")
    found = [fact.id for fact in facts if name in getattr(registry.load(fact.id, "llm-context"), "takes", ())]
    return pytest.mark.parametrize("method", found)


def compressed(model, method, keep=0.5, **settings):
    return tprune.prune(model, f"llm-context/{method}", keep=keep, positions="original", **settings)


def padded():
    ids, mask = tokens(3, PROMPT), torch.ones(3, PROMPT + 3, dtype=torch.int64)
    ids[1, :17], mask[1, :17] = 0, 0
    ids[2, :40], mask[2, :40] = 0, 0
    return ids, mask


def random_states(length, groups=2, rows=2):
    generator = torch.Generator().manual_seed(length)
    return [torch.randn(rows, groups, length, 8, generator=generator) for _ in range(2)]


@pytest.mark.parametrize("case", golden("llm-context", "ada-kv")[1]["settings"]["cases"])
def test_heads_share_a_budget_as_in_the_authors_code(case):
    tensors, facts = golden("llm-context", "ada-kv")
    sizes = facts["settings"]["cases"][case]
    counts = shared_counts(tensors[f"{case}.score"], sizes["count"], sizes["floor"])
    assert torch.equal(counts, tensors[f"{case}.counts"])


def test_attention_from_tile_to_tile_is_attention():
    key, value = random_states(600)
    query = torch.randn(2, 6, 3, 8, generator=torch.Generator().manual_seed(1))
    visible = torch.rand(2, 1, 3, 600, generator=torch.Generator().manual_seed(2)) < 0.3
    tiles = [
        Tile(key[:, :, part], value[:, :, part], visible[..., part])
        for part in (slice(0, 7), slice(7, 300), slice(300, 600))
    ]
    expected = scaled_dot_product_attention(query, key, value, visible, scale=0.4, enable_gqa=True)
    assert torch.allclose(attend_tiles(query, tiles, 0.4), expected, atol=1e-5)


def test_heads_of_different_lengths_are_read_as_if_the_others_were_hidden():
    key, value = random_states(300)
    index = torch.rand(2, 2, 300, generator=torch.Generator().manual_seed(3)).argsort(-1)
    counts = torch.tensor([[290, 3], [270, 0]])
    ragged = Ragged.of(key, value, index, counts)
    assert ragged.nbytes == int(counts.sum()) * 2 * 8 * 4
    query = torch.randn(2, 4, 1, 8, generator=torch.Generator().manual_seed(1))
    latest = Tile(key[:, :, :1], value[:, :, :1])
    seen = torch.zeros(2, 2, 300, dtype=torch.bool)
    for row in range(2):
        for head in range(2):
            seen[row, head, index[row, head, : counts[row, head]]] = True
    mask = torch.cat([torch.ones(2, 2, 1, dtype=torch.bool), seen], -1).repeat_interleave(2, 1).unsqueeze(2)
    both = [torch.cat([latest[i], x], 2) for i, x in enumerate((key, value))]
    expected = scaled_dot_product_attention(query, *both, mask, scale=0.4, enable_gqa=True)
    assert torch.allclose(attend_tiles(query, [latest, *ragged.tiles()], 0.4), expected, atol=1e-5)
    rows = [
        Stored((Ragged.of(key[b : b + 1], value[b : b + 1], index[b : b + 1], counts[b : b + 1]),))
        for b in (0, 1)
    ]
    stacked = stack_stored(rows)
    assert isinstance(stacked.parts[0], Rows)
    assert stacked.nbytes == ragged.nbytes
    assert torch.allclose(attend_tiles(query, [latest, *stacked.tiles()], 0.4), expected, atol=1e-5)
    turned = stacked.each_row(lambda x: x.flip(0))
    first = Tile(*(x.flip(0) for x in latest[:2]))
    flipped = attend_tiles(query.flip(0), [first, *turned.tiles()], 0.4)
    assert torch.allclose(flipped.flip(0), expected, atol=1e-5)


@every_method_that_takes("per_head")
def test_heads_that_share_a_budget_hold_what_was_asked_and_go_on(method):
    model, ids, coming = decoder(), tokens(2, PROMPT), tokens(2, 3, seed=2)
    dense = cache_bytes(model(ids).past_key_values)
    with compressed(model, method, per_head=0.2) as handle:
        cache = model(ids).past_key_values
        assert abs(cache_bytes(cache) / dense - 0.5) < 0.01
        assert abs(handle.achieved().value - 0.5) < 0.01
        other = copy.deepcopy(cache)
        at_once = model(coming, past_key_values=cache).logits
        singly = [model(coming[:, i : i + 1], past_key_values=other).logits for i in range(3)]
    assert torch.allclose(at_once, torch.cat(singly, 1), atol=1e-4)


def test_equal_shares_per_head_are_the_plain_method():
    model, ids, coming = decoder(), tokens(2, PROMPT), tokens(2, 1, seed=2)
    found = []
    for settings in ({}, {"per_head": 1.0}):
        with compressed(model, "snapkv", **settings):
            found.append(model(coming, past_key_values=model(ids).past_key_values).logits)
    assert torch.allclose(*found, atol=1e-5)


@pytest.mark.parametrize("settings", [{"per_head": 0.2}, {"interval": 2}])
def test_a_padded_batch_equals_its_rows(settings):
    model, (ids, mask), coming = decoder(), padded(), tokens(3, 3, seed=2)
    places = (mask.cumsum(1) - 1).clamp_min(0)
    with compressed(model, "snapkv", window=8, **settings):
        prompt = {"attention_mask": mask[:, :PROMPT], "position_ids": places[:, :PROMPT]}
        cache = model(ids, **prompt).past_key_values
        together = [
            model(
                coming[:, i : i + 1],
                past_key_values=cache,
                attention_mask=mask[:, : PROMPT + i + 1],
                position_ids=places[:, PROMPT + i : PROMPT + i + 1],
            ).logits
            for i in range(3)
        ]
        for row in range(3):
            cache = model(ids[row : row + 1, mask[row, :PROMPT].bool()]).past_key_values
            for i in range(3):
                alone = model(coming[row : row + 1, i : i + 1], past_key_values=cache).logits
                assert torch.allclose(alone, together[i][row : row + 1], atol=1e-4)


@every_method_that_takes("interval")
def test_a_cache_pruned_at_intervals_returns_to_its_budget(method):
    model, ids, coming = decoder(), tokens(2, PROMPT), tokens(2, 10, seed=2)
    with compressed(model, method, interval=4):
        cache, held = model(ids).past_key_values, []
        for i in range(10):
            assert model(coming[:, i : i + 1], past_key_values=cache).logits.isfinite().all()
            held.append(cache.layers[0].length)
        assert held == [65, 66, 67, 64, 65, 66, 67, 64, 65, 66]
        assert cache.get_seq_length() == PROMPT + 10
        latest = cache.layers[0].places[..., -1]
    assert (latest == PROMPT + 9).all()


def test_what_is_pruned_at_intervals_is_chosen_by_the_queries_since():
    """The latest entries of the window stay, at the places they came at."""
    model, ids, coming = decoder(), tokens(1, PROMPT), tokens(1, 8, seed=2)
    with compressed(model, "snapkv", window=8, interval=8):
        cache = model(ids).past_key_values
        for i in range(8):
            model(coming[:, i : i + 1], past_key_values=cache)
        places = cache.layers[0].places[0]
    assert places.shape[1] == 64
    assert (places[:, -8:] == torch.arange(PROMPT, PROMPT + 8)).all()
    assert (places.diff(dim=1) > 0).all()


def test_what_a_method_cannot_take_is_refused():
    with pytest.raises(UserError, match="scores alone"):
        registry.build("zeromerge", "llm-context", {"per_head": 0.2})
    with pytest.raises(UserError, match="give one"):
        registry.build("snapkv", "llm-context", {"per_head": 0.2, "interval": 4})
    with pytest.raises(UserError, match="positions original"):
        Compression(decoder(), registry.build("snapkv", "llm-context", {"interval": 4}), 0.5, 0, True)
