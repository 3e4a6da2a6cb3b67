"""Where pruned caches go wrong: lengths, masks, positions, padding, heads, sliding windows, other people's caches."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, QuantizedCache, StaticCache

import tprune
from tests.decoders import NO_ROPE, decoder, tokens
from tprune.core.cache import Evict
from tprune.errors import UserError
from tprune.methods.cache import CacheMethod
from tprune.models.cache import fork
from tprune.models.cache_layer import PrunedLayer
from tprune.models.compress import Compression
from tprune.models.rope import Rotation

PROMPT = 64


@dataclass(frozen=True)
class Chosen(CacheMethod):
    """Keeps what a test says: per layer, as many of the given places as asked for."""

    places: tuple = ()
    sizes: tuple = ()

    def __post_init__(self):
        object.__setattr__(self, "id", "chosen")

    def counts(self, length, layers, keep):
        return list(self.sizes) or [len(self.places)] * layers

    def start(self, layer, count):
        index = torch.tensor(self.places[:count]).expand(layer.key.shape[0], layer.groups, -1)
        return Evict(index)


def compressed(model, places, sizes=(), compact=False):
    return Compression(model, Chosen(places, sizes), 0.5, 0, compact)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox", "phi3", "mixtral"])
def test_an_evicted_entry_is_exactly_a_hidden_one(name):
    model, ids, coming = decoder(name), tokens(2, PROMPT), tokens(2, 3, seed=2)
    places = (0, 3, 4, 9, 20, 33, 34, 60, 63)
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    seen = torch.zeros(PROMPT + 3, dtype=torch.bool)
    seen[list(places)] = True
    seen[PROMPT:] = True
    mask = seen & torch.ones(PROMPT + 3, PROMPT + 3, dtype=torch.bool).tril()
    mask = mask[None, None, -3:].expand(2, 1, -1, -1)
    hidden = model(coming, past_key_values=cache, attention_mask=mask).logits
    compression = compressed(model, places)
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    evicted = model(coming, past_key_values=cache).logits
    compression.remove()
    assert torch.allclose(hidden, evicted, atol=1e-4)


def test_layers_may_hold_different_numbers_of_entries():
    model, ids, coming = decoder(), tokens(2, PROMPT), tokens(2, 3, seed=2)
    compression = compressed(model, tuple(range(0, 60, 3)), sizes=(4, 20, 11))
    cache = model(ids).past_key_values
    assert [layer.length for layer in cache.layers] == [4, 20, 11]
    other = copy.deepcopy(cache)
    at_once = model(coming, past_key_values=cache).logits
    singly = [model(coming[:, i : i + 1], past_key_values=other).logits for i in range(3)]
    assert torch.allclose(at_once, torch.cat(singly, dim=1), atol=1e-5)
    text = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert text.shape == (2, PROMPT + 4)
    compression.remove()


@pytest.mark.parametrize("name", ["llama", "gpt-neox", *NO_ROPE])
def test_the_next_position_counts_tokens_and_a_mask_counts_entries(name):
    model, ids = decoder(name), tokens(1, PROMPT)
    with tprune.prune(model, "llm-context/random", keep=0.25):
        cache = model(ids).past_key_values
        assert cache.get_seq_length() == PROMPT
        assert cache.get_mask_sizes(3, 0) == (PROMPT // 4 + 3, 0)
        by_default = model(ids[:, :2], past_key_values=fork(cache)).logits
        explicit = model(
            ids[:, :2], past_key_values=cache, position_ids=torch.tensor([[PROMPT, PROMPT + 1]])
        ).logits
        assert torch.equal(by_default, explicit)
        assert cache.get_seq_length() == PROMPT + 2


def test_a_padding_mask_over_all_tokens_hides_no_real_entry():
    model, ids = decoder(), tokens(2, 20)
    mask = torch.ones(2, 20, dtype=torch.int64)
    ids[0, :6], mask[0, :6] = 0, 0
    compression = compressed(model, tuple(range(6, 14)))
    cache = DynamicCache()
    model(ids, past_key_values=cache, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0))
    assert cache.layers[0].places[:, 0].tolist() == [list(range(6, 14))] * 2
    assert cache.layers[0].valid.all()
    step = {"position_ids": torch.tensor([[14], [20]])}
    grown = torch.ones(2, 21, dtype=torch.int64)
    grown[0, :6] = 0
    new = tokens(2, 1, seed=4)
    together = model(new, past_key_values=cache, attention_mask=grown, **step).logits
    for row in range(2):
        cache = model(ids[row : row + 1, mask[row].bool()]).past_key_values
        assert torch.allclose(
            model(new[row : row + 1], past_key_values=cache).logits, together[row : row + 1], atol=1e-5
        )
    compression.remove()


@pytest.mark.parametrize("method", ["h2o", "streaming-llm", "snapkv"])
def test_padding_in_a_later_turn_changes_nothing(method):
    model, ids = decoder(), tokens(2, PROMPT)
    question, after = tokens(2, 6, seed=5), tokens(2, 1, seed=6)
    mask = torch.ones(2, PROMPT + 7, dtype=torch.int64)
    question[1, :2], mask[1, PROMPT : PROMPT + 2] = 0, 0
    places = (mask.cumsum(1) - 1).clamp_min(0)
    settings = {"window": 8} if method == "snapkv" else {}
    with tprune.prune(model, method, keep=0.5, **settings):
        cache = model(ids).past_key_values
        both = [
            model(
                new,
                past_key_values=cache,
                attention_mask=mask[:, : start + new.shape[1]],
                position_ids=places[:, start : start + new.shape[1]],
            ).logits[:, -1]
            for start, new in ((PROMPT, question), (PROMPT + 6, after))
        ]
        cache = model(ids[1:]).past_key_values
        alone = [model(new, past_key_values=cache).logits[:, -1] for new in (question[1:, 2:], after[1:])]
    for one, other in zip(both, alone, strict=True):
        assert torch.allclose(one[1:], other, atol=1e-5)


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
@pytest.mark.parametrize("given", ["none", "empty", "plain"])
def test_sliding_layers_hold_what_they_held(name, given):
    model, ids = decoder(name), tokens(2, PROMPT)

    def run():
        cache = {
            "none": lambda: None,
            "empty": lambda: DynamicCache(config=model.config),
            "plain": DynamicCache,
        }
        return model(ids, past_key_values=cache[given]()).past_key_values

    dense = DynamicCache(config=model.config)
    model(ids, past_key_values=dense)
    with tprune.prune(model, "llm-context/random", keep=0.25):
        pruned = run()
    assert torch.equal(pruned.layers[0].keys, dense.layers[0].keys)
    assert not isinstance(pruned.layers[0], PrunedLayer)
    assert pruned.layers[1].length == PROMPT // 4


def test_heads_of_one_group_share_their_entries_and_groups_choose_their_own():
    model, ids = decoder(num_attention_heads=8, num_key_value_heads=2), tokens(1, PROMPT)
    with tprune.prune(model, "snapkv", keep=0.5, window=4):
        places = model(ids).past_key_values.layers[0].places
    assert places.shape == (1, 2, PROMPT // 2)
    assert (places[..., 1:] > places[..., :-1]).all()
    assert not torch.equal(places[:, 0], places[:, 1])


@pytest.mark.parametrize("name", ["llama", "gpt-neox", "gemma3", "qwen3"])
def test_compact_positions_are_those_of_a_shorter_text(name):
    model, ids, coming = decoder(name), tokens(1, PROMPT), tokens(1, 2, seed=2)
    if name == "gemma3":
        model = decoder(name, layer_types=["full_attention"] * 3)
    places = (0, 1, 5, 20, 40, 63)
    compression = compressed(model, places, compact=True)
    cache = model(ids).past_key_values
    compact = model(coming, past_key_values=fork(cache)).logits
    compression.remove()
    compression = compressed(model, places)
    cache = model(ids).past_key_values
    compression.remove()
    rotation = Rotation(model)
    plain = DynamicCache(config=model.config)
    far = 300
    for layer, held in enumerate(cache.layers):
        kind = compression.kinds[layer]
        near = torch.arange(len(places)) + far
        keys = rotation.turn(held.keys, (near - held.places), kind)
        plain.update(keys, held.values, layer)
    again = model(
        coming, past_key_values=plain, position_ids=torch.arange(2)[None] + far + len(places)
    ).logits
    assert torch.allclose(compact, again, atol=1e-3)


def test_compact_positions_need_rope():
    with pytest.raises(UserError, match="no RoPE"):
        tprune.prune(decoder("gpt2"), "streaming-llm", keep=0.5)


def test_a_stream_far_beyond_the_trained_length_keeps_near_distances():
    model = decoder()
    with tprune.prune(model, "streaming-llm", keep=0.25, sink=2):
        cache, new = DynamicCache(), tokens(1, PROMPT)
        for _ in range(40):
            new = model(new, past_key_values=cache).logits[:, -1:].argmax(-1)
        layer = cache.layers[0]
        assert layer.length == PROMPT // 4
        assert layer.places[0, 0, :2].tolist() == [0, 1]
        assert layer.shift[0, 0].tolist() == [cache.get_seq_length() - layer.length] * 2


@pytest.mark.parametrize("method", ["h2o", "vatp", "streaming-llm"])
def test_the_cache_keeps_its_size_while_decoding(method):
    model, ids = decoder(), tokens(2, 128)
    with tprune.prune(model, method, keep=0.5):
        cache, new = DynamicCache(), ids
        for _ in range(10):
            new = model(new, past_key_values=cache).logits[:, -1:].argmax(-1)
            assert {layer.length for layer in cache.layers} == {64}
        assert cache.get_seq_length() == 128 + 9


class Widest(TorchDispatchMode):
    """Remembers the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.elements = max(self.elements, made.untyped_storage().nbytes() // made.element_size())
        return made


@pytest.mark.parametrize("method", ["h2o", "vatp", "snapkv"])
def test_no_attention_map_is_ever_whole(method):
    model, ids = decoder(max_position_embeddings=4096), tokens(1, 4096)
    with tprune.prune(model, method, keep=0.5), Widest() as widest:
        model(ids, logits_to_keep=1)
    assert widest.elements <= 4 * 4096 * 128


def test_beam_search_and_several_sequences_carry_the_rows_along():
    model, ids = decoder(), tokens(2, PROMPT)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    for method, settings in (("h2o", {}), ("snapkv", {"window": 8}), ("streaming-llm", {})):
        with tprune.prune(model, method, keep=0.5, **settings):
            greedy = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
            beams = model.generate(ids, attention_mask=mask, max_new_tokens=5, num_beams=3, do_sample=False)
            assert beams.shape == greedy.shape
            cache = model(ids, attention_mask=mask).past_key_values
            swapped = fork(cache)
            swapped.reorder_cache(torch.tensor([1, 0]))
            grown = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
            straight = model(ids[:, :1], past_key_values=cache, attention_mask=grown).logits
            crossed = model(ids[:, :1].flip(0), past_key_values=swapped, attention_mask=grown.flip(0)).logits
            assert torch.allclose(straight, crossed.flip(0), atol=1e-5)


def test_a_dense_cache_that_was_filled_before_is_pruned_with_the_next_prompt():
    model, ids = decoder(), tokens(1, PROMPT)
    with tprune.prune(model, "h2o", keep=0.5):
        whole = model(ids).past_key_values.layers[0]
    cache = model(ids[:, :40]).past_key_values
    with tprune.prune(model, "h2o", keep=0.5):
        model(ids[:, 40:], past_key_values=cache)
    assert cache.layers[0].length == whole.length == PROMPT // 2
    assert cache.get_seq_length() == PROMPT


def test_tokens_can_be_taken_back_where_none_has_left_for_them():
    model, ids = decoder(), tokens(1, PROMPT)
    with tprune.prune(model, "llm-context/random", keep=0.5):
        cache = model(ids).past_key_values
        first = model(ids[:, :3], past_key_values=cache).logits
        cache.crop(-3)
        assert cache.get_seq_length() == PROMPT
        assert torch.equal(model(ids[:, :3], past_key_values=cache).logits, first)
        with pytest.raises(UserError, match="cannot be taken back"):
            cache.crop(-20)
    with tprune.prune(model, "h2o", keep=0.5):
        cache = model(ids).past_key_values
        with pytest.raises(UserError, match="cannot be taken back"):
            cache.crop(-1)


def test_numbers_and_vectors_of_entries_grow_with_them_and_are_taken_back():
    model, ids = decoder(), tokens(2, PROMPT)
    with tprune.prune(model, "llm-context/random", keep=0.5):
        cache = model(ids).past_key_values
        layer, held = cache.layers[0], PROMPT // 2
        carried = {"number": torch.ones(2, 2, held), "vector": torch.ones(2, 1, held, 5)}
        layer.state = dict(carried)
        model(ids[:, :3], past_key_values=cache)
        for name, value in carried.items():
            assert torch.equal(layer.state[name][:, :, :held], value)
            assert layer.state[name].shape[2] == held + 3
            assert not layer.state[name][:, :, held:].any()
        cache.crop(-3)
    for name, value in carried.items():
        assert torch.equal(layer.state[name], value)


def test_an_emptied_cache_starts_anew():
    model, ids = decoder(), tokens(1, PROMPT)
    with tprune.prune(model, "h2o", keep=0.5):
        cache = model(ids).past_key_values
        first = cache.layers[0].places
        cache.reset()
        model(ids, past_key_values=cache)
        assert torch.equal(cache.layers[0].places, first)


def test_a_model_called_without_a_cache_is_dense():
    model, ids = decoder(), tokens(1, PROMPT)
    dense = model(ids, use_cache=False).logits
    with tprune.prune(model, "h2o", keep=0.5):
        assert torch.equal(model(ids, use_cache=False).logits, dense)


def test_the_map_that_a_prompt_asks_for_is_the_dense_model_s_and_a_later_one_is_of_what_is_left():
    model, ids, later = decoder(), tokens(2, PROMPT), tokens(2, 3, seed=2)
    model.set_attn_implementation("eager")
    dense = model(ids, output_attentions=True).attentions
    with tprune.prune(model, "a2sf", keep=0.5):
        prompt = model(ids, output_attentions=True)
        after = model(later, past_key_values=prompt.past_key_values, output_attentions=True)
    assert all(torch.equal(one, other) for one, other in zip(prompt.attentions, dense, strict=True))
    for paid in after.attentions:
        assert paid.shape == (2, 4, 3, PROMPT // 2 + 3)
        assert torch.allclose(paid.sum(-1), torch.ones(2, 4, 3), atol=1e-5)


def test_misuse_is_refused_in_one_clear_line():
    model, ids = decoder(), tokens(1, PROMPT)
    with tprune.prune(model, "h2o", keep=0.5):
        cache = model(ids).past_key_values
        with pytest.raises(UserError, match="StaticCache cannot be pruned"):
            model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=PROMPT))
        with pytest.raises(UserError, match="QuantizedCache cannot be pruned"):
            model(ids, past_key_values=QuantizedCache("fp8", model.config))
        with pytest.raises(UserError, match="one per token so far"):
            model(ids[:, :1], past_key_values=fork(cache), attention_mask=torch.ones(1, 5))
        with pytest.raises(UserError, match="2-D attention_mask"):
            model(ids[:, :1], past_key_values=fork(cache), attention_mask=torch.ones(1, 1, 1, 5))
    with pytest.raises(UserError, match="inside the with block"):
        model(ids[:, :1], past_key_values=fork(cache))
    with tprune.prune(model, "streaming-llm", keep=0.5):
        with pytest.raises(UserError, match="by another method"):
            model(ids[:, :1], past_key_values=fork(cache))


@pytest.mark.parametrize(
    ("method", "keep", "settings", "clue"),
    [
        ("snapkv", 0.25, {}, "--set window=8"),
        ("snapkv", 0.25, {"window": 200}, "window of 200"),
        ("vatp", 0.25, {}, "room for 20 sinks"),
        ("streaming-llm", 0.05, {}, "beside 4 sinks"),
        ("llm-context/random", 0.25, {"sink": 10, "recent": 10}, "fewer than the 10 first and 10 latest"),
        ("h2o", 0.001, {}, "rounds to no entry"),
        ("h2o", 0.999, {}, "rounds to keeping them all"),
        ("lazyllm", 0.1, {}, "reaches 0.3"),
        ("lazyllm", 0.999, {}, "rounds to keeping all"),
        ("lazyllm", 0.5, {"layers": (3, 4)}, "both budgets"),
        ("lazyllm", None, {"layers": (3, 4)}, "give as many of each"),
        ("h2o", None, {}, "needs --keep"),
    ],
)
def test_budgets_out_of_reach_name_the_mend(method, keep, settings, clue):
    model = decoder()
    with pytest.raises(UserError, match=clue):
        with tprune.prune(model, method, keep=keep, **settings):
            model(tokens(1, PROMPT))


def test_models_that_only_slide_and_kernels_without_masks_are_refused():
    with pytest.raises(UserError, match="sliding window"):
        tprune.prune(decoder("mistral", sliding_window=8), "h2o", keep=0.5)
    model = decoder()
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(UserError, match="sdpa and eager"):
        tprune.prune(model, "h2o", keep=0.5)
