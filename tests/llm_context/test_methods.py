"""What single methods promise beyond what all do."""

import pytest
import torch

import tprune
from tests.decoders import decoder, tokens
from tests.llm_weights import tiny
from tprune.core.budget import Site
from tprune.core.sparse import Elements
from tprune.errors import BudgetError, UserError
from tprune.methods import registry
from tprune.methods.attention import Attention
from tprune.methods.cache import CacheMethod
from tprune.methods.cache_view import LayerView, StepView
from tprune.methods.llm_context.agile_quant import paid_to
from tprune.methods.token_view import TokenView

PROMPT = 96
CACHE_METHODS = [
    fact.id
    for fact in registry.facts("llm-context")
    if issubclass(registry.load(fact.id, "llm-context"), CacheMethod) and fact.learns != "required"
]

EVICTING = [name for name in CACHE_METHODS if not registry.load(name, "llm-context").encodes]


def after(model, method, steps=6, **settings):
    """Logits of some tokens after a pruned prompt, one by one, and the cache's last layer."""
    ids, logits = tokens(2, PROMPT + steps), []
    with tprune.prune(model, f"llm-context/{method}", keep=0.5, **settings):
        cache = model(ids[:, :PROMPT]).past_key_values
        for place in range(PROMPT, PROMPT + steps):
            logits.append(model(ids[:, place : place + 1], past_key_values=cache).logits)
    return torch.cat(logits, dim=1), cache.layers[-1]


@pytest.mark.parametrize("method", EVICTING)
def test_a_pyramid_of_budgets_keeps_what_was_asked_and_goes_on(method):
    model, ids, coming = decoder(), tokens(2, 128), tokens(2, 3, seed=2)
    asked = {"keep": 0.5, "pyramid": 1.5, "tokenizer": tiny.tokenizer()}
    with tprune.prune(model, f"llm-context/{method}", **asked) as handle:
        cache = model(ids).past_key_values
        assert [layer.length for layer in cache.layers] == [85, 64, 43]
        assert handle.achieved().value == 0.5
        assert model(coming, past_key_values=cache).logits.isfinite().all()
        for place in range(2):
            new = coming[:, place : place + 1]
            assert model(new, past_key_values=cache).logits.isfinite().all()


def test_a2sf_that_forgets_nothing_is_h2o():
    model = decoder()
    found, _ = after(model, "a2sf", forgetting=1, recent=PROMPT // 4, decode=True)
    assert torch.equal(found, after(model, "h2o")[0])


def test_a2sf_that_forgets_all_but_the_last_query_asks_that_one_alone():
    model = decoder()
    found, layer = after(model, "a2sf", forgetting=0, recent=0)
    asked, same = after(model, "snapkv", window=1, kernel=1)
    # The window that votes is the last token, which stays; a2sf lets it compete.
    shared = [
        set(one.tolist()) & set(other.tolist())
        for one, other in zip(layer.places[0], same.places[0], strict=True)
    ]
    assert all(len(both) >= PROMPT // 2 - 1 for both in shared)


def test_zeromerge_forgets_no_token():
    _, layer = after(decoder(), "zeromerge", steps=9, means=3)
    assert ((1 + layer.state["others"]).sum(-1) == PROMPT + 9).all()
    assert ((layer.state["mean"] > 0).sum(-1) == 3).all()


def test_zeromerge_of_equal_tokens_answers_as_the_whole_cache():
    model = decoder()
    ids = torch.full((1, PROMPT), 7)
    position = torch.zeros(1, PROMPT, dtype=torch.int64)
    cache = model(ids, position_ids=position).past_key_values
    dense = model(ids[:, :1], past_key_values=cache, position_ids=position[:, :1]).logits
    with tprune.prune(model, "zeromerge", keep=0.25):
        cache = model(ids, position_ids=position).past_key_values
        merged = model(ids[:, :1], past_key_values=cache, position_ids=position[:, :1]).logits
    assert torch.allclose(merged, dense, atol=1e-5)


def test_kvcrush_keeps_one_of_every_stretch_of_the_sorted_rest():
    """An oracle with plain loops, on one layer."""
    generator = torch.Generator().manual_seed(3)
    query, key = torch.randn(1, 4, 40, 8, generator=generator), torch.randn(1, 2, 40, 8, generator=generator)
    attention = Attention(query, key, key, 0.4, causal=True)
    view = LayerView(0, 1, attention, key, key, torch.arange(40).expand(1, 2, 40), {}, torch.tensor([5]))
    method = registry.build("kvcrush", "llm-context", {"anchor": "alternating", "share": 0.3, "recent": 0.25})
    kept = method.start(view, 20).index[0]
    paid = attention.rows().sum(2)[0]  # [H, T]
    best = [set(row.argsort(descending=True)[:14].tolist()) for row in paid]
    for group in range(2):
        score = paid[2 * group] + paid[2 * group + 1]
        important = set(score[:37].argsort(descending=True)[:11].tolist()) | {37, 38, 39}
        rest = [token for token in range(40) if token not in important]
        far = {j: sum((j in best[head]) != bool(head % 2) for head in range(4)) for j in rest}
        rest.sort(key=lambda token: (far[token], token))
        assert set(kept[group].tolist()) == important | set(rest[:24:4])


def test_keydiff_lets_go_of_the_entry_most_like_the_mean_of_what_is_there():
    key = torch.randn(2, 2, 9, 8, generator=torch.Generator().manual_seed(3))
    fillers = torch.tensor([0, 3])
    position = torch.arange(9).expand(2, 2, -1) - fillers[:, None, None]
    state = {"shrink": torch.cat([key[:, :, :-1].norm(dim=3).reciprocal(), torch.zeros(2, 2, 1)], dim=2)}
    view = StepView([], key, key, position.clamp_min(0), fillers, state, [0])
    gone = registry.build("keydiff", "llm-context").step(view).slot
    for row, begin in enumerate(fillers.tolist()):
        for group in range(2):
            there = key[row, group, begin:]
            mean = torch.nn.functional.normalize(there, dim=1).mean(0)
            like = torch.cosine_similarity(there, mean[None])
            assert gone[row, group] == begin + like.argmax()


@pytest.mark.parametrize("method", ["a2sf", "keydiff", "knorm"])
def test_entries_leave_while_decoding_where_that_is_asked_for(method):
    assert after(decoder(), method, steps=6)[1].length == PROMPT // 2 + 6
    found, layer = after(decoder(), method, steps=6, decode=True)
    assert layer.length == PROMPT // 2
    assert found.isfinite().all()


def test_knorm_lets_go_of_the_longest_key():
    key = torch.randn(2, 2, 9, 8, generator=torch.Generator().manual_seed(3))
    key[0, 1, -1] *= 9
    state = {"norm": torch.cat([key[:, :, :-1].norm(dim=3), torch.zeros(2, 2, 1)], dim=2)}
    view = StepView([], key, key, torch.arange(9).expand(2, 2, -1), 0, state, [0])
    gone = registry.build("knorm", "llm-context").step(view).slot
    assert torch.equal(gone, key.norm(dim=3).argmax(2))
    assert gone[0, 1] == 8, "the new one may be it"


def test_knorm_spares_the_layers_it_skips_and_takes_what_they_keep_from_the_others():
    model = decoder()
    ids = tokens(2, 128)
    with tprune.prune(model, "knorm", keep=0.5, skip=(0,)) as handle:
        cache = model(ids).past_key_values
        assert [layer.length for layer in cache.layers] == [128, 32, 32]
        assert handle.achieved().value == 0.5
    with tprune.prune(model, "knorm", keep=0.5, skip=(0,), decode=True):
        cache = model(ids).past_key_values
        model(ids[:, :1], past_key_values=cache)
        assert [layer.length for layer in cache.layers] == [129, 32, 32]
    with (
        tprune.prune(model, "knorm", keep=0.3, skip=(0,)),
        pytest.raises(BudgetError, match=r"--keep 0\.34 or more"),
    ):
        model(ids)
    with pytest.raises(UserError, match="skip=… and interval=…"):
        registry.build("knorm", "llm-context", {"skip": (0,), "interval": 4})


def test_lagkv_takes_shorter_chunks_where_the_budget_has_no_room_for_the_last():
    method = registry.build("lagkv", "llm-context")
    assert [method.chunk(2048, count) for count in (1024, 512, 256, 200)] == [128, 128, 128, 92]
    assert method.chunk(200, 100) == 42  # no two chunks of 128
    key = torch.randn(1, 2, 200, 8, generator=torch.Generator().manual_seed(1))
    places = torch.arange(200).expand(1, 2, -1)
    view = LayerView(0, 1, Attention(key, key, key, 1.0), key, key, places, {})
    kept = method.start(view, 100).index[0, 0].tolist()
    assert kept[:16] == list(range(16))
    assert kept[-58:] == list(range(142, 200))  # a chunk of 42, and 16 that make no whole one
    assert [sum(begin <= place < begin + 42 for place in kept) for begin in (16, 58, 100)] == [9, 9, 8]


@pytest.mark.parametrize(
    ("width", "count"), [(6, 5), (8, 5), (20, 5), (128, 100), (256, 255), (256, 256), (300, 270)]
)
def test_a_bitmap_and_elements_are_the_vectors_without_their_smallest(width, count):
    x = torch.randn(2, 3, 300, width, generator=torch.Generator().manual_seed(width))
    held = Elements.of(x, count)
    kept = x.abs().topk(count, dim=-1).indices
    assert torch.equal(held.dense(), torch.zeros_like(x).scatter(-1, kept, x.gather(-1, kept)))
    assert held.nbytes == 2 * 3 * 300 * (-(-width // 8) + count * 4)
    assert torch.equal(held.join(held).dense(), torch.cat([held.dense(), held.dense()], dim=2))


def test_mustafar_answers_as_a_dense_cache_with_zeros_and_prunes_each_entry_once():
    """An oracle with dense tensors: what is older than the window has lost its smallest elements."""
    model, ids = decoder(), tokens(1, PROMPT + 6)
    with tprune.prune(model, "mustafar", keep=0.5, residual=8) as handle:
        cache, logits = model(ids[:, :PROMPT]).past_key_values, []
        view = LayerView(0, 1, None, *[torch.zeros(1, 2, PROMPT, 8)] * 2, None, {})
        counts = handle.compression.method.elements(view, PROMPT // 2)
        for place in range(PROMPT, PROMPT + 6):
            logits.append(model(ids[:, place : place + 1], past_key_values=cache).logits)
    dense = model(ids[:, :PROMPT]).past_key_values
    for step in range(6):
        for layer in dense.layers:
            old = slice(0, layer.keys.shape[2] - 8)
            layer.keys[:, :, old] = Elements.of(layer.keys[:, :, old], counts[0]).dense()
            layer.values[:, :, old] = Elements.of(layer.values[:, :, old], counts[1]).dense()
        expected = model(ids[:, PROMPT + step : PROMPT + step + 1], past_key_values=dense).logits
        assert torch.allclose(logits[step], expected, atol=1e-4)
    assert [part.length for part in cache.layers[0].stored.parts] == [PROMPT - 2]


def test_sliminfer_keeps_the_blocks_of_the_best_units():
    """An oracle with plain loops, on tokens of which some have left."""
    generator = torch.Generator().manual_seed(3)
    query, key = torch.randn(1, 4, 30, 8, generator=generator), torch.randn(1, 2, 30, 8, generator=generator)
    position = torch.tensor([place for place in range(40) if place % 4])[None]
    prunable = position < 39
    view = TokenView(
        torch.zeros(1, 30, 4),
        prunable,
        position=position,
        attention=Attention(query, key, key, 0.4, causal=True),
    )
    method = registry.build("sliminfer", "llm-context", {"block_size": 8, "unit_size": 4})
    found = method.reduce(Site(1), view, 16, {}).index[0].tolist()
    keys = key.repeat_interleave(2, dim=1)[0]
    units = {}
    for place in range(30):
        units.setdefault(int(position[0, place]) // 4, []).append(place)
    score = {
        unit: float((query[0, :, -1] * keys[:, members].mean(1)).sum(1).mean())
        for unit, members in units.items()
    }
    blocks = {block: max(score[2 * block], score[2 * block + 1]) for block in range(5)}
    order = sorted(units, key=lambda unit: (unit // 2 not in (0, 4), -blocks[unit // 2], -score[unit]))
    expected = [place for unit in order for place in units[unit] if place < 29][:16]
    assert found == sorted([*expected, 29])


def test_agile_quant_goes_by_one_column_of_the_map_and_never_loses_the_first_token():
    generator = torch.Generator().manual_seed(3)
    query, key = (
        torch.randn(1, 4, 300, 8, generator=generator),
        torch.randn(1, 2, 300, 8, generator=generator),
    )
    attention = Attention(query, key, key, 0.4, causal=True)
    column = attention.rows()[..., 0]
    assert torch.allclose(paid_to(attention, torch.tensor([[0]])), column, atol=1e-6)
    view = TokenView(torch.zeros(1, 300, 4), torch.ones(1, 300, dtype=torch.bool), attention=attention)
    kept = registry.build("agile-quant", "llm-context").reduce(Site(1), view, 30, {}).index[0]
    assert torch.equal(kept, column.sum(1)[0].topk(30).indices.sort().values)
    assert kept[0] == 0


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("agile-quant", {"conventional": True}),
        ("spatten", {"values": 0.5}),
        ("spatten", {"bits": (4, 4)}),
        ("kvcrush", {"base": "snapkv", "anchor": "mean", "share": 0.2}),
        ("zeromerge", {"means": 0.2, "metric": "l2", "update": "sum"}),
        ("a2sf", {"decode": True}),
    ],
)
def test_options_too_leave_a_padded_row_as_it_is_alone(method, settings, side):
    model, ids, gap = decoder(), tokens(2, PROMPT), 13
    mask = torch.ones(2, PROMPT + 3, dtype=torch.int64)
    hidden = slice(0, gap) if side == "left" else slice(PROMPT - gap, PROMPT)
    ids[1, hidden], mask[1, hidden] = 0, 0
    places, coming = (mask.cumsum(1) - 1).clamp_min(0), tokens(2, 3, seed=2)
    with tprune.prune(model, f"llm-context/{method}", keep=0.5, **settings):
        prompt = {"attention_mask": mask[:, :PROMPT], "position_ids": places[:, :PROMPT]}
        cache = model(ids, **prompt).past_key_values
        given = {"attention_mask": mask, "position_ids": places[:, PROMPT:]}
        together = model(coming, past_key_values=cache, **given).logits[1]
        alone = model(ids[1:, mask[1, :PROMPT].bool()]).past_key_values
        expected = model(coming[1:], past_key_values=alone).logits[0]
    assert torch.allclose(together, expected, atol=1e-4)
