"""What single methods promise beyond what all do."""

import pytest
import torch

import tprune
from tests.decoders import decoder, tokens
from tprune.methods import registry
from tprune.methods.base import CacheMethod
from tprune.methods.views import Attention, LayerView

PROMPT = 96
CACHE_METHODS = [
    fact.id
    for fact in registry.facts("llm-context")
    if issubclass(registry.load(fact.id, "llm-context"), CacheMethod)
]


def after(model, method, steps=6, **settings):
    """Logits of some tokens after a pruned prompt, one by one, and the cache's last layer."""
    ids, logits = tokens(2, PROMPT + steps), []
    with tprune.prune(model, f"llm-context/{method}", keep=0.5, **settings):
        cache = model(ids[:, :PROMPT]).past_key_values
        for place in range(PROMPT, PROMPT + steps):
            logits.append(model(ids[:, place : place + 1], past_key_values=cache).logits)
    return torch.cat(logits, dim=1), cache.layers[-1]


@pytest.mark.parametrize("method", CACHE_METHODS)
def test_a_pyramid_of_budgets_keeps_what_was_asked_and_goes_on(method):
    model, ids, coming = decoder(), tokens(2, 128), tokens(2, 3, seed=2)
    with tprune.prune(model, f"llm-context/{method}", keep=0.5, pyramid=1.5) as handle:
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
