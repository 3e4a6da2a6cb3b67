"""CSKV against its authors' code, and against dense tensors."""

import pytest
import torch

import tprune
from tests.decoders import decoder, tokens
from tests.golden_values import golden, under
from tprune.core.low_rank import LowRankMap
from tprune.errors import UserError
from tprune.evaluate.context import cache_bytes

GOLDEN, FACTS = golden("llm-context", "cskv")
every_case = pytest.mark.parametrize("case", FACTS["settings"]["cases"])


@every_case
@pytest.mark.parametrize("part", ["key", "value"])
def test_the_first_maps_are_those_of_the_authors(case, part):
    weight, size = GOLDEN[part[0]], GOLDEN[f"calibration.{part}"] + 1e-6
    down, up = GOLDEN[f"{case}.{part}_down"], GOLDEN[f"{case}.{part}_up"]
    found = LowRankMap.of(weight, size**0.5).first(len(down))
    assert torch.allclose(found.up @ found.down, up @ down, atol=1e-5)
    assert torch.allclose(found.down.norm(dim=1), down.norm(dim=1), atol=1e-5)
    plain = LowRankMap.of(weight).first(len(down))
    assert torch.allclose(plain.up @ plain.down, GOLDEN[f"{case}.{part}_product_svd"], atol=1e-5)


@every_case
def test_it_attends_to_what_the_authors_attend_to(case):
    """A layer's attention over a prompt and fourteen more tokens, through windows that fill up and are emptied."""
    settings = FACTS["settings"]
    model = decoder(
        "mistral",
        num_hidden_layers=1,
        num_attention_heads=settings["heads"],
        num_key_value_heads=settings["groups"],
        rms_norm_eps=1e-6,
    )
    attention, seen = model.model.layers[0].self_attn, []
    for name in "qkvo":
        getattr(attention, f"{name}_proj").weight.copy_(GOLDEN[name])
    state = {f"{name}.0": tensor for name, tensor in under(GOLDEN, f"{case}.").items() if "_" in name}
    prompt, embeds = settings["prompt"], GOLDEN["embeds"]
    with tprune.prune(model, "cskv", keep=0.6, window=settings["window"], state=state):
        attention.register_forward_hook(lambda module, args, output: seen.append(output[0]))
        cache = model(inputs_embeds=embeds[:, :prompt]).past_key_values
        for place in range(prompt, embeds.shape[1]):
            model(inputs_embeds=embeds[:, place : place + 1], past_key_values=cache)
    assert torch.allclose(torch.cat(seen, dim=1)[0], GOLDEN[f"{case}.out"], atol=1e-5)


def test_what_the_maps_lose_is_the_tail_of_the_singular_values():
    weight = torch.randn(12, 20, generator=torch.Generator().manual_seed(0))
    tail = torch.linalg.svdvals(weight)[5:].norm()
    short = LowRankMap.of(weight).first(5)
    assert torch.allclose((short.up @ short.down - weight).norm(), tail, atol=1e-4)
    whole = LowRankMap.of(weight, torch.arange(1.0, 21.0))
    assert torch.allclose(whole.up @ whole.down, weight, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma2", "gpt2"])
def test_all_codes_are_the_dense_cache(name):
    """Bias, norms of keys, fused projections and rotation come back as they were."""
    model, ids = decoder(name), tokens(1, 70)
    dense = model(ids).logits[:, 64:]
    with tprune.prune(model, "cskv", keep=0.5, positions="original") as handle:
        made = handle.compression.made.projections
    state = {}
    for layer, one in made.items():
        for part, weight in zip(("key", "value"), one.weights(), strict=True):
            whole = LowRankMap.of(weight)
            state |= {f"{part}_down.{layer}": whole.down, f"{part}_up.{layer}": whole.up}
    with tprune.prune(model, "cskv", keep=0.99, positions="original", state=state):
        cache = model(ids[:, :64]).past_key_values
        found = model(ids[:, 64:], past_key_values=cache).logits
    assert torch.allclose(found, dense, atol=1e-3)


def test_the_bytes_are_codes_and_the_entries_behind_the_last_full_window():
    model, ids = decoder(), tokens(2, 70)
    with tprune.prune(model, "cskv", keep=0.5, window=16) as handle:
        cache = model(ids).past_key_values
    codes = round((35 - 6) / 70 * 32)
    assert cache_bytes(cache) == 3 * 2 * 4 * (70 * codes + 6 * 32)
    assert handle.achieved().value == pytest.approx((70 * codes + 6 * 32) / (70 * 32))
    assert cache.layers[0].keys.shape[2] == 6


def test_what_has_no_room_is_refused():
    model = decoder()
    with tprune.prune(model, "cskv", keep=0.2), pytest.raises(UserError, match="behind the last full window"):
        model(tokens(1, 60))
    with tprune.prune(model, "cskv", keep=0.02), pytest.raises(UserError, match="leave nothing"):
        model(tokens(1, 64))
    cache = model(tokens(1, 40)).past_key_values
    with tprune.prune(model, "cskv", keep=0.5), pytest.raises(UserError, match="start from an empty cache"):
        model(tokens(1, 64), past_key_values=cache)
