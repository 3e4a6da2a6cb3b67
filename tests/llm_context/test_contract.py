"""What every method of the family must do, run over whatever files there are."""

import copy

import pytest
import torch
from transformers import DynamicCache

import tprune
from tests.decoders import CONFIGS, NO_ROPE, count_hooks, decoder, tokens
from tests.llm_weights import tiny
from tprune.evaluate.context import layer_bytes
from tprune.methods import registry
from tprune.methods.cache import CacheMethod

METHODS = [
    name
    for name in registry.running_on("plain", "llm-context")
    if registry.load(name, "llm-context").learns != "required"
]
CACHE_METHODS = [name for name in METHODS if issubclass(registry.load(name, "llm-context"), CacheMethod)]
REVIVING = [
    name for name in METHODS if name not in CACHE_METHODS and registry.build(name, "llm-context").revives()
]
"""What these look for by the latest token depends on which tokens come together."""
PROMPT = 128
TOKENIZER = tiny.tokenizer()
SHORT = {"think-clearly": {"instruction": "stop."}}
"""Hyperparameters of methods whose text is long, one token a letter."""

every_method = pytest.mark.parametrize("method", METHODS)
every_cache_method = pytest.mark.parametrize("method", CACHE_METHODS)
every_decoder = pytest.mark.parametrize("name", CONFIGS)


def prune(model, method, keep=0.5, name="llama", **more):
    """The method on the model; models without RoPE cannot have compact positions."""
    positions = "original" if name in NO_ROPE else None
    more = {"positions": positions, "tokenizer": TOKENIZER} | SHORT.get(method, {}) | more
    return tprune.prune(model, f"llm-context/{method}", keep=keep, **more)


def left_padded():
    """Two rows of which the second begins with padding, and their mask."""
    ids = tokens(2, PROMPT)
    mask = torch.ones_like(ids)
    ids[1, :17], mask[1, :17] = 0, 0
    return ids, mask


def positions_of(mask):
    """Position ids as `generate` makes them."""
    return (mask.cumsum(1) - 1).clamp_min(0)


def generated(model, ids, mask=None, **more):
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False, **more
    )


@every_decoder
@every_method
def test_keeping_all_is_bitwise_the_dense_model(method, name):
    model, (ids, mask) = decoder(name), left_padded()
    dense = model(ids).logits, model(ids, attention_mask=mask).logits
    texts = generated(model, ids), generated(model, ids, mask)
    with prune(model, method, 1.0, name) as handle:
        assert torch.equal(model(ids).logits, dense[0])
        assert torch.equal(model(ids, attention_mask=mask).logits, dense[1])
        assert torch.equal(generated(model, ids), texts[0])
        assert torch.equal(generated(model, ids, mask), texts[1])
        assert handle.achieved().value == 1.0


@every_decoder
@every_method
def test_a_pruned_prompt_goes_on_and_leaving_restores_the_model_exactly(method, name):
    model, ids, coming = decoder(name), tokens(2, PROMPT), tokens(2, 3, seed=2)
    config, hooks = model.config, count_hooks(model)
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    dense = model(ids).logits, model(coming, past_key_values=cache).logits
    with prune(model, method, 0.5, name) as handle:
        cache = DynamicCache(config=model.config)
        model(ids, past_key_values=cache)
        pruned = model(coming, past_key_values=cache).logits
        assert pruned.isfinite().all()
        assert not torch.allclose(pruned, dense[1], atol=1e-3)
        assert abs(handle.achieved().value - 0.5) < 0.02
        assert len(handle.per_layer()) == 3
    assert torch.equal(model(ids).logits, dense[0])
    assert model.config is config
    assert count_hooks(model) == hooks


@every_cache_method
def test_the_prompt_itself_is_answered_by_the_dense_model(method):
    model, ids = decoder(), tokens(2, PROMPT)
    dense = model(ids).logits
    with prune(model, method):
        assert torch.equal(model(ids).logits, dense)


@every_cache_method
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_cache_bytes_fall_by_exactly_what_was_asked(method, name):
    model, ids = decoder(name), tokens(2, PROMPT)
    own = registry.load(method, "llm-context")
    encodes = own.encodes
    full = [layer for layer in model(ids).past_key_values.layers if not layer.is_sliding]
    dense = layer_bytes(full[:1])
    with prune(model, method, 0.5, name) as handle:
        cache = model(ids).past_key_values
        for layer, kind in zip(cache.layers, DynamicCache(config=model.config).layers, strict=True):
            if kind.is_sliding:
                assert layer.keys.shape[2] == model.config.sliding_window - 1
            elif not own.forgets:
                assert layer_bytes([layer]) == dense
            elif not encodes:
                assert layer.keys.shape[2] == layer.values.shape[2] == PROMPT // 2
                assert layer.keys.untyped_storage().nbytes() == layer.keys.nbytes
            else:
                # Bitmaps and the like come in whole bytes, and the vectors of tiny models are short.
                assert abs(layer_bytes([layer]) / dense - 0.5) < 0.02
        assert abs(handle.achieved().value - 0.5) <= (0.02 if encodes else 0)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in REVIVING])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt-neox", "opt"])
def test_three_tokens_at_once_are_three_single_steps(method, name):
    model, ids, coming = decoder(name), tokens(2, PROMPT), tokens(2, 3, seed=2)
    with prune(model, method, 0.5, name):
        cache = model(ids).past_key_values
        other = copy.deepcopy(cache)
        at_once = model(coming, past_key_values=cache).logits
        singly = [model(coming[:, i : i + 1], past_key_values=other).logits for i in range(3)]
    assert torch.allclose(at_once, torch.cat(singly, dim=1), atol=1e-4)


@every_method
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_equals_its_rows(method, side):
    model, ids, coming = decoder(), tokens(3, PROMPT), tokens(3, 4, seed=2)
    lengths = (PROMPT, PROMPT - 17, PROMPT - 40)
    mask = torch.ones(3, PROMPT + 4, dtype=torch.int64)
    for row, length in enumerate(lengths):
        gap = slice(0, PROMPT - length) if side == "left" else slice(length, PROMPT)
        ids[row, gap], mask[row, gap] = 0, 0
    places, parts = positions_of(mask), (slice(0, 1), slice(1, 2), slice(2, 4))
    with prune(model, method):
        cache = DynamicCache(config=model.config)
        prompt = {"attention_mask": mask[:, :PROMPT], "position_ids": places[:, :PROMPT]}
        model(ids, past_key_values=cache, **prompt)
        together = [
            model(
                coming[:, part],
                past_key_values=cache,
                attention_mask=mask[:, : PROMPT + part.stop],
                position_ids=places[:, PROMPT + part.start : PROMPT + part.stop],
            ).logits
            for part in parts
        ]
        for row in range(3):
            cache = model(ids[row : row + 1, mask[row, :PROMPT].bool()]).past_key_values
            alone = [model(coming[row : row + 1, part], past_key_values=cache).logits for part in parts]
            assert torch.allclose(torch.cat(alone, 1), torch.cat(together, 1)[row : row + 1], atol=1e-4)


@every_method
def test_a_padded_generate_equals_its_rows(method):
    model, (ids, mask) = decoder(), left_padded()
    with prune(model, method):
        together = generated(model, ids, mask)[:, PROMPT:]
        for row in range(2):
            alone = generated(model, ids[row : row + 1, mask[row].bool()])[:, -6:]
            assert torch.equal(alone, together[row : row + 1])


@every_method
def test_generate_and_a_loop_of_ones_own_agree(method):
    model, ids = decoder(), tokens(2, PROMPT)
    with prune(model, method):
        expected = generated(model, ids)
        cache, text, new = DynamicCache(), ids, ids
        for _ in range(6):
            new = model(new, past_key_values=cache).logits[:, -1:].argmax(-1)
            text = torch.cat([text, new], dim=1)
    assert torch.equal(text, expected)


@every_method
def test_several_turns_on_one_pruned_cache(method):
    model, ids, question = decoder(), tokens(1, PROMPT), tokens(1, 5, seed=3)
    with prune(model, method):
        cache = model(ids).past_key_values
        first = generated(model, torch.cat([ids, question], dim=1), past_key_values=copy.deepcopy(cache))
        again = generated(model, torch.cat([ids, question], dim=1), past_key_values=copy.deepcopy(cache))
        assert torch.equal(first, again)
        text, new = torch.cat([ids, question], dim=1), question
        for _ in range(6):
            new = model(new, past_key_values=cache).logits[:, -1:].argmax(-1)
            text = torch.cat([text, new], dim=1)
        assert torch.equal(text, first)


@every_cache_method
def test_padding_among_later_tokens_leaves_a_row_as_it_is_alone(method):
    """A second turn whose texts differ in length; each row's own entries leave, not those of the longest."""
    model, ids, coming = decoder(), tokens(2, PROMPT), tokens(2, 9, seed=2)
    mask = torch.ones(2, PROMPT + 9, dtype=torch.int64)
    mask[1, PROMPT + 1 : PROMPT + 4] = 0
    places, real = positions_of(mask), mask[1, PROMPT:].bool()
    with prune(model, method):
        together, alone = model(ids).past_key_values, model(ids[1:]).past_key_values
        found = model(
            coming, past_key_values=together, attention_mask=mask, position_ids=places[:, PROMPT:]
        ).logits[1, real]
        expected = model(coming[1:, real], past_key_values=alone).logits[0]
    assert torch.allclose(found, expected, atol=1e-4)


@every_cache_method
def test_rows_are_exchanged_whatever_of_them_is_dense(method):
    model, ids = decoder(), tokens(2, PROMPT)
    with prune(model, method):
        cache = model(ids).past_key_values
        swapped = copy.deepcopy(cache)
        swapped.reorder_cache(torch.tensor([1, 0]))
        straight, crossed = (
            model(tokens(2, 1, seed=2)[order], past_key_values=one).logits
            for one, order in ((cache, [0, 1]), (swapped, [1, 0]))
        )
    assert torch.allclose(straight, crossed.flip(0), atol=1e-5)


@every_method
def test_the_same_seed_keeps_the_same_and_another_may_not(method):
    model, ids, coming = decoder(), tokens(2, PROMPT), tokens(2, 1, seed=2)

    def after(seed):
        with prune(model, method, seed=seed):
            return model(coming, past_key_values=model(ids).past_key_values).logits

    assert torch.equal(after(0), after(0))
    draws = "seeds" in registry.load(method, "llm-context").reads
    assert draws == (not torch.equal(after(0), after(1)))


@every_method
def test_half_precision_runs(method):
    model, ids = decoder().to(torch.bfloat16), tokens(2, PROMPT)
    with prune(model, method):
        cache = model(ids).past_key_values
        assert model(ids[:, :2], past_key_values=cache).logits.isfinite().all()
        assert all(layer.keys.dtype == torch.bfloat16 for layer in cache.layers)
