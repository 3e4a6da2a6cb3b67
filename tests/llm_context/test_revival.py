"""Tokens that left inside the decoder and come back, against the paper's bookkeeping, one token at a time."""

import copy

import pytest
import torch
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import tprune
from tests.decoders import decoder, tokens
from tprune.errors import UserError
from tprune.models.deferred import DeferringLayer

LAYERS, PROMPT, SITES = 6, 24, {2: 0.6, 4: 0.3}


def prune(model, **more):
    """Tokens leave before the layers of `SITES`."""
    # Layers are given for a depth of 32.
    layers = tuple(round(layer * 32 / LAYERS) for layer in SITES)
    return tprune.prune(model, "lazyllm", layers=layers, rates=tuple(SITES.values()), **more)


class Bookkeeper:
    """LazyLLM as the paper tells it: which token has keys and values where, and whose hidden states wait where."""

    def __init__(self, model):
        self.model, self.layers = model.model, model.model.layers
        self.cached = [{} for _ in self.layers]
        self.waiting = [{} for _ in self.layers]
        self.seen = 0

    def attend(self, layer, rows, hidden, alive):
        """A layer's output for the tokens `rows`, and what the last of `alive` pays to each of them."""
        attention, count = self.layers[layer].self_attn, len(rows)
        normed = self.layers[layer].input_layernorm(hidden)
        query, key, value = (
            p(normed).view(1, count, -1, attention.head_dim).transpose(1, 2)
            for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *self.model.rotary_emb(hidden, torch.tensor([rows])))
        for place, token in enumerate(rows):
            assert token not in self.cached[layer], "computed twice"
            self.cached[layer][token] = key[0, :, place], value[0, :, place]
        keys, values = (
            torch.stack([self.cached[layer][token][x] for token in alive], dim=1).repeat_interleave(2, dim=0)
            for x in (0, 1)
        )
        logits = query[0] @ keys.transpose(1, 2) * attention.scaling
        future = torch.tensor([[token > row for token in alive] for row in rows])
        paid = logits.masked_fill(future, -torch.inf).softmax(-1)
        mixed = attention.o_proj((paid @ values).transpose(0, 1).reshape(1, count, -1))
        hidden = hidden + mixed
        hidden = hidden + self.layers[layer].mlp(self.layers[layer].post_attention_layernorm(hidden))
        return hidden, paid[:, rows.index(max(alive))].mean(0)

    def call(self, ids):
        """The last hidden states of the tokens `ids` [N], and how many came back."""
        new = list(range(self.seen, self.seen + len(ids)))
        first, self.seen = self.seen == 0, self.seen + len(ids)
        rows, alive = list(new), list(range(self.seen))
        hidden, paid, back = self.model.embed_tokens(ids[None]), None, 0
        for layer in range(LAYERS):
            if layer in SITES:
                old = [token for token in alive if token not in new or (first and token != new[-1])]
                total = self.seen - 1 if first else self.seen - len(new)
                count = round(SITES[layer] * (PROMPT - 1))
                count = count if first else int(count * total / (PROMPT - 1) + 0.5)
                worth = dict(zip(alive, paid.tolist(), strict=True))
                chosen = sorted(old, key=lambda token: -worth[token])[:count]
                alive = sorted({*chosen, *(new[-1:] if first else new)})
                for place, token in enumerate(rows):
                    self.waiting[layer][token] = hidden[:, place : place + 1]
                missing = [token for token in alive if token not in self.cached[layer]]
                back += sum(token not in rows for token in missing)
                rows = missing
                hidden = torch.cat([self.waiting[layer][token] for token in rows], dim=1)
            hidden, paid = self.attend(layer, rows, hidden, alive)
        return self.model.norm(hidden)[0, [rows.index(token) for token in new if token in rows]], back


def test_later_tokens_find_what_the_paper_lets_them_find():
    model, ids = decoder(num_hidden_layers=LAYERS), tokens(1, PROMPT + 6)
    told, returned = Bookkeeper(model), 0
    with prune(model):
        cache = DynamicCache(config=model.config)
        for part in [slice(0, PROMPT), *(slice(PROMPT + i, PROMPT + i + 1) for i in range(4)), slice(28, 30)]:
            expected, back = told.call(ids[0, part])
            hidden = model.model(ids[:, part], past_key_values=cache).last_hidden_state[0]
            returned += back
            count = 1 if part.start == 0 else len(expected)
            assert torch.allclose(hidden[-count:], expected[-count:], atol=1e-4)
        stored = next(layer.stored for layer in cache.layers if isinstance(layer, DeferringLayer))
    assert returned > 0
    for layer, place in ((2, 2), (4, 4), (5, 4)):
        slots, real = stored.held[place]
        assert cache.layers[layer].keys.shape[2] == slots.shape[1]
        assert sorted(slots[real].tolist()) == sorted(told.cached[layer])


def test_a_token_that_comes_back_where_nothing_else_left_has_the_dense_model_s_keys():
    model, ids = decoder(num_hidden_layers=LAYERS), tokens(1, PROMPT + 1)
    dense = model(ids).past_key_values
    with prune(model):
        cache = model(ids[:, :PROMPT]).past_key_values
        layer = next(layer for layer in cache.layers if isinstance(layer, DeferringLayer))
        # From now on all may stay, so that all that left before layers 2 and 4 comes back.
        layer.stored.counts.update(dict.fromkeys(layer.stored.counts, layer.stored.prunable))
        model(ids[:, PROMPT:], past_key_values=cache)
        slots, real = layer.stored.held[2]
    assert real.all()
    keys = torch.empty_like(dense.layers[2].keys).index_copy_(2, slots[0], cache.layers[2].keys)
    assert torch.allclose(keys, dense.layers[2].keys, atol=1e-5)
    assert cache.layers[5].keys.shape[2] == PROMPT + 1


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_rows_of_a_batch_choose_for_themselves_and_follow_the_cache(kernel):
    model = decoder(num_hidden_layers=LAYERS, attn_implementation=kernel)
    ids, mask = tokens(2, PROMPT + 3), torch.ones(2, PROMPT + 3, dtype=torch.int64)
    mask[1, :5] = 0
    places = (mask.cumsum(1) - 1).clamp_min(0)

    def steps(row, cache, order=None):
        seen = []
        for end in range(PROMPT + 1, PROMPT + 4):
            part = slice(end - 1, end)
            given = {"attention_mask": mask[row, :end], "position_ids": places[row, part]}
            if order is not None:
                given = {name: value[order] for name, value in given.items()}
            some = ids[row, part] if order is None else ids[row, part][order]
            seen.append(model(some, past_key_values=cache, **given).logits)
        return torch.cat(seen, dim=1)

    with prune(model):
        both = model(
            ids[:, :PROMPT], attention_mask=mask[:, :PROMPT], position_ids=places[:, :PROMPT]
        ).past_key_values
        turned = copy.deepcopy(both)
        together = steps(slice(0, 2), both)
        alone = steps(slice(0, 1), model(ids[:1, :PROMPT]).past_key_values)
        turned.reorder_cache(torch.tensor([1, 0]))
        swapped = steps(slice(0, 2), turned, torch.tensor([1, 0]))
    assert torch.allclose(together[0], alone[0], atol=1e-4)
    assert torch.allclose(swapped, together.flip(0), atol=1e-5)


def test_without_revival_the_prompt_s_pruning_is_final():
    model, ids = decoder(num_hidden_layers=LAYERS), tokens(1, PROMPT + 1)
    held = {}
    for revive in (True, False):
        with prune(model, revive=revive):
            cache = model(ids[:, :PROMPT]).past_key_values
            before = cache.layers[-1].keys.shape[2]
            model(ids[:, PROMPT:], past_key_values=cache)
            held[revive] = cache.layers[-1].keys.shape[2] - before
    assert held[False] == 1 < held[True]


def test_what_tokens_cannot_come_back_to_is_refused_or_told():
    model = decoder(num_hidden_layers=LAYERS)
    with pytest.raises(UserError, match="keep their positions"):
        tprune.prune(model, "lazyllm", keep=0.5, positions="compact")
    with tprune.prune(model, "snapkv", keep=0.5, window=2), prune(model):
        with pytest.raises(UserError, match="PrunedLayer.*revive=false"):
            model(tokens(1, PROMPT))
    with tprune.prune(decoder("gemma2"), "lazyllm", keep=0.5) as handle:
        assert handle.achieved().details == {"tokens_come_back": False}
