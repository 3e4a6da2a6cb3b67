"""Entries that replace each other in place: the same as moving everything, and nobody else notices."""

import copy

import pytest
import torch
from transformers import DynamicCache

import tprune
from tests.decoders import decoder, tokens
from tests.llm_weights import tiny
from tprune.core.cache import Evict, Replace, follows_entries
from tprune.core.select import worst_between
from tprune.methods import registry
from tprune.methods.cache import CacheMethod
from tprune.models.cache import fork
from tprune.models.room import Shelf

PROMPT, STEPS = 96, 12
TOKENIZER = tiny.tokenizer()
FORGETFUL = ("tova",)
"""Where the latest token may be the one that leaves."""

KINDS = {
    fact.id: registry.load(fact.id, "llm-context")
    for fact in registry.facts("llm-context")
    if fact.learns != "required"
}
CACHE_METHODS = [name for name, kind in KINDS.items() if issubclass(kind, CacheMethod)]
EVICTING = [name for name in CACHE_METHODS if registry.build(name, "llm-context").evicts_while_decoding]
every_cache_method = pytest.mark.parametrize("method", CACHE_METHODS)
every_evicting_method = pytest.mark.parametrize("method", EVICTING)


class Ordered(Shelf):
    """Keeps temporal order by copying what is left at every step, and works shifts out anew."""

    def replace(self, edit, places, state):
        if self.cached is not None:
            self.keys[:, :, : self.cached.shape[2]] = self.cached
        slots = torch.arange(places.shape[2]).expand_as(places)
        edit.absorb(self.keys)
        edit.absorb(self.values)
        left = Evict(slots[slots != edit.slot.unsqueeze(-1)].view(*places.shape[:2], -1))
        self.keys[:, :, :-1], self.values[:, :, :-1] = left.apply(self.keys), left.apply(self.values)
        self.places = left.apply(places)
        self.state = {name: left.apply(v) if follows_entries(v) else v for name, v in state.items()}
        assert (self.places.diff() >= 0).all()

    def keep_compact(self, edit, places, real, turn):
        seen = places[..., -1:] + 1
        compact = seen - torch.arange(self.places.shape[2], 0, -1)
        shift = (compact - self.places).clamp_min(0)
        self.shift = shift[..., : int((shift > 0).sum(-1).max())]
        self.cached = self.keys[:, :, : self.shift.shape[-1]].clone()
        self.keys[:, :, : self.shift.shape[-1]] = turn(self.cached, self.shift)


def prune(model, method, positions=None):
    return tprune.prune(model, f"llm-context/{method}", keep=0.5, positions=positions, tokenizer=TOKENIZER)


def decoded(model, method, positions, padded):
    """Logits and the places of all entries, sorted, of a prompt and the tokens after it."""
    ids = tokens(2, PROMPT + STEPS)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :13] = 0
        mask[1, PROMPT + 2 : PROMPT + 4] = 0
    position_ids = (mask.cumsum(1) - 1).clamp_min(0)
    cache, seen, start = DynamicCache(), [], 0
    with prune(model, method, positions):
        for end in [PROMPT, *range(PROMPT + 1, PROMPT + 8), PROMPT + STEPS]:
            part = slice(start, end)
            logits = model(
                ids[:, part],
                past_key_values=cache,
                attention_mask=mask[:, :end],
                position_ids=position_ids[:, part],
            ).logits
            seen.append(
                (logits[mask[:, part].bool()], [layer.places.sort().values for layer in cache.layers])
            )
            start = end
    return seen


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("positions", ["original", "compact"])
@every_evicting_method
def test_replacing_in_place_equals_copying_what_is_left(method, positions, padded, monkeypatch):
    model = decoder(num_attention_heads=8, num_key_value_heads=2)
    found = decoded(model, method, positions, padded)
    monkeypatch.setattr("tprune.models.room.Shelf", Ordered)
    expected = decoded(model, method, positions, padded)
    for (logits, places), (logits_copied, places_copied) in zip(found, expected, strict=True):
        assert torch.allclose(logits, logits_copied, atol=1e-3)
        assert all(torch.equal(one, other) for one, other in zip(places, places_copied, strict=True))


@every_evicting_method
def test_a_decode_step_moves_no_entry(method):
    model, ids = decoder(), tokens(1, PROMPT)
    with prune(model, method, "original"):
        cache = model(ids).past_key_values
        model(ids[:, :1], past_key_values=cache)
        layer = cache.layers[1]
        held, where = layer.keys.clone(), layer.keys.data_ptr()
        for step in range(1, 6):
            model(ids[:, step : step + 1], past_key_values=cache)
            assert layer.keys.data_ptr() == where
            # One entry comes, and another may take in the one that leaves.
            assert (layer.keys != held).any(-1).sum(-1).max() <= 2 * step


@every_cache_method
@pytest.mark.parametrize("first", ["original", "fork"])
def test_what_a_forked_cache_does_its_origin_does_not_see(method, first):
    model, ids, coming = decoder(), tokens(2, PROMPT), tokens(2, 6, seed=2)
    with prune(model, method):
        cache = model(ids).past_key_values
        for step in range(2):
            model(coming[:, step : step + 1], past_key_values=cache)
        apart, other = copy.deepcopy(cache), fork(cache)
        writes, waits = (cache, other) if first == "original" else (other, cache)
        held = [layer.keys.clone() for layer in waits.layers]
        for step in range(4):
            model(ids[:, step : step + 1], past_key_values=writes)
        assert all(torch.equal(layer.keys, keys) for layer, keys in zip(waits.layers, held, strict=True))
        for step in range(2, 6):
            new = coming[:, step : step + 1]
            alone = model(new, past_key_values=apart).logits
            assert torch.equal(model(new, past_key_values=waits).logits, alone)


def test_a_cache_made_in_inference_mode_goes_on_outside_of_it():
    model, ids = decoder(), tokens(1, PROMPT)
    for method in ("h2o", "streaming-llm", "snapkv"):
        with tprune.prune(model, method, keep=0.5):
            with torch.inference_mode():
                cache = model(ids).past_key_values
                model(ids[:, :1], past_key_values=cache)
            expected = copy.deepcopy(cache)
            found = model(ids[:, 1:2], past_key_values=cache).logits
            with torch.inference_mode():
                assert torch.equal(found, model(ids[:, 1:2], past_key_values=expected).logits)


@every_cache_method
def test_a_second_turn_counts_as_generated_tokens(method):
    model, ids = decoder(), tokens(1, PROMPT)
    turns = [tokens(1, count, seed=count) for count in (5, 1, 9, 1)]
    evicts = method in EVICTING
    with prune(model, method):
        cache = model(ids).past_key_values
        single, seen = fork(cache), PROMPT
        for turn in turns:
            at_once = model(turn, past_key_values=cache).logits
            one_by_one = [
                model(
                    turn[:, i : i + 1], past_key_values=single, position_ids=torch.tensor([[seen + i]])
                ).logits
                for i in range(turn.shape[1])
            ]
            seen += turn.shape[1]
            assert torch.allclose(at_once, torch.cat(one_by_one, dim=1), atol=1e-4)
            assert cache.get_seq_length() == seen
            for layer in cache.layers:
                if not registry.load(method, "llm-context").encodes:
                    assert layer.length == PROMPT // 2 + (0 if evicts else seen - PROMPT)
                latest = layer.places.max()
                assert latest == seen - 1 or (method in FORGETFUL and latest < seen)
                assert (layer.places.sort().values.diff() > 0).all()


def test_the_worst_entry_is_found_in_any_order_of_slots():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        score = torch.randint(5, (2, 3, 12), generator=generator).float()
        later = torch.rand(2, 3, 9, generator=generator).argsort(-1) + 2
        position = torch.cat([torch.arange(2).expand(2, 3, 2), later, torch.full((2, 3, 1), 11)], -1)
        for first, last in ((2, 4), (0, 0), (2, 9)):
            for ends in ((first, last), (torch.full((2,), first), torch.full((2,), last))):
                slot = worst_between(score, position, *ends)
                for row in range(2):
                    for head in range(3):
                        free = [n for n in range(first, 12) if position[row, head, n] <= 11 - last]
                        key = [(score[row, head, n].item(), -position[row, head, n].item()) for n in free]
                        assert slot[row, head] == free[key.index(min(key))]


def test_a_replacement_as_a_value_and_in_place_agree():
    numbers = torch.arange(10.0).view(1, 2, 5)
    edit = Replace(torch.tensor([[1, 4]]))
    assert edit.apply(numbers).tolist() == [[[0, 4, 2, 3], [5, 6, 7, 8]]]
    written = numbers.clone().unsqueeze(-1)
    edit.write(written)
    assert torch.equal(written[:, :, :-1].squeeze(-1), edit.apply(numbers))


def test_a_compiled_model_is_pruned_as_a_plain_one():
    model, ids = decoder(num_hidden_layers=1), tokens(1, PROMPT + 1)
    compiled = torch.compile(model, backend="eager")

    def logits(call):
        cache = DynamicCache()
        call(ids[:, :PROMPT], past_key_values=cache)
        return call(ids[:, PROMPT:], past_key_values=cache).logits

    dense = logits(model)
    with prune(model, "snapkv"):
        pruned = logits(model)
        assert torch.equal(logits(compiled), pruned)
    assert not torch.allclose(pruned, dense, atol=1e-3)
    assert torch.equal(logits(compiled), dense)
