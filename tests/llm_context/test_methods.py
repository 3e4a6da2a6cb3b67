"""What single methods promise beyond what all do."""

import torch

import tprune
from tests.decoders import decoder, tokens

PROMPT = 96


def after(model, method, steps=6, **settings):
    """Logits of some tokens after a pruned prompt, one by one, and the cache's last layer."""
    ids, logits = tokens(2, PROMPT + steps), []
    with tprune.prune(model, f"llm-context/{method}", keep=0.5, **settings):
        cache = model(ids[:, :PROMPT]).past_key_values
        for place in range(PROMPT, PROMPT + steps):
            logits.append(model(ids[:, place : place + 1], past_key_values=cache).logits)
    return torch.cat(logits, dim=1), cache.layers[-1]


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
