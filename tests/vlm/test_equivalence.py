"""What leaves is as if hidden, and a cached decode is as one forward over everything: for every method."""

import pytest
import torch

import tprune
from tests.vlm.tiny import start, tiny
from tprune.core.budget import PROJECTOR
from tprune.core.reduction import Reduction
from tprune.errors import UserError
from tprune.methods import registry
from tprune.models.decoder import DecoderDriver
from tprune.models.prompts import noise_prompts

METHODS = [fact.id for fact in registry.facts("vlm")]
PLAIN = {
    "sparsevlm": {"version": "v2"},
    "aim": {"exact_mask": False},
    "glimpseprune": {"caches": "later"},
    "par": {"layers": 0.0},
}
"""Settings under which tokens leave inside the decoder, none merges there, and every layer runs and caches its keys."""
NEW = 3


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def put_to_work(model, method, **more):
    """The method at work, or None where it does not fit the model or nothing leaves before or inside its decoder."""
    try:
        handle = tprune.prune(
            model, f"vlm/{method}", keep=0.5, **start(method, model), **PLAIN.get(method, {}), **more
        )
    except UserError:
        return None
    if isinstance(handle.driver, DecoderDriver):
        return handle
    handle.remove()
    return None


def cached_decode(model, inputs, told):
    """Logits of the last prompt token and of `told` [B, n], decoded one by one; and the cache."""
    output = model(**inputs, use_cache=True)
    found, cache = [output.logits[:, -1]], output.past_key_values
    for token in told.unbind(1):
        found.append(model(input_ids=token[:, None], past_key_values=cache, use_cache=True).logits[:, -1])
    return torch.stack(found, 1), cache


def only_drops(trace, before):
    """Whether no token comes to stand for another at the sites of `trace`; `before` [B, N] is who did already."""
    for _, heirs in trace:
        if not ((heirs == before) | (heirs == -1)).all():
            return False
        before = heirs
    return True


def inside(trace, length):
    """The part of a trace inside the decoder, and what stood for what before it."""
    entry = [heirs for site, heirs in trace if site == PROJECTOR]
    before = entry[0] if entry else torch.arange(length)
    return [step for step in trace if step[0] != PROJECTOR], before


class Replay:
    """Makes a method's choices again, in a sequence that keeps its length."""

    returns = False

    def __init__(self, method, track):
        self.reads, self.left = method.reads, track.layers

    def reduce(self, site, view, count, memory):
        kept = self.left.get(site.layer)
        return None if kept is None else Reduction.keep(kept.index, view.hidden.shape[1], kept.valid)


def in_one_forward(model, layers, inputs, told, track):
    """Logits of the dense model over prompt and answer at once, each layer hiding what `track` lacks there."""
    length = inputs["input_ids"].shape[1] + told.shape[1]
    own = torch.eye(length, dtype=torch.bool)
    handles = []
    for place, layer in enumerate(layers):
        seen = torch.zeros(len(told), length, dtype=torch.bool)
        slots, kept = track.entry, track.at(place)
        index = torch.arange(length).expand(len(told), -1) if slots is None else slots.index
        real = (
            torch.ones_like(index, dtype=torch.bool) if slots is None or slots.valid is None else slots.valid
        )
        if kept is not None:
            real = real.gather(1, kept.index)
            real = real if kept.valid is None else real & kept.valid
            index = index.gather(1, kept.index)
        for row in range(len(told)):
            seen[row, index[row][real[row]]] = True

        def hide(module, args, kwargs, shown=(seen[:, None] | own)[:, None]):
            mask = kwargs["attention_mask"]
            mask = torch.ones(length, length, dtype=torch.bool).tril() if mask is None else mask
            lowest = None if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
            mask = mask & shown if lowest is None else mask.masked_fill(~shown, lowest)
            return args, kwargs | {"attention_mask": mask}

        handles.append(layer.register_forward_pre_hook(hide, with_kwargs=True))
    whole = dict(inputs)
    whole["input_ids"] = torch.cat([inputs["input_ids"], told], 1)
    for name, fill in (("attention_mask", 1), ("mm_token_type_ids", 0), ("token_type_ids", 0)):
        if name in whole:
            whole[name] = torch.nn.functional.pad(whole[name], (0, told.shape[1]), value=fill)
    logits = model(**whole, use_cache=False).logits[:, -told.shape[1] - 1 :]
    for handle in handles:
        handle.remove()
    return logits


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["llava", "qwen2-vl"])
def test_a_cached_decode_is_one_dense_forward_in_which_what_left_is_hidden(method, kind):
    model = tiny(kind)
    inputs, told = noise_prompts(model, 2, 0), torch.arange(5, 5 + 2 * NEW).view(2, NEW)
    handle = put_to_work(model, method, positions="original")
    if handle is None:
        return
    with handle:
        handle.driver.trace = trace = []
        found, cache = cached_decode(model, inputs, told)
        layers, asked = handle.driver.layers, handle.driver.method
        shorter = asked.tower_blocks(3, 1) or (asked.before_tower and kind == "qwen2-vl")
    if not shorter and only_drops(trace, torch.arange(inputs["input_ids"].shape[1])):
        expected = in_one_forward(model, layers, inputs, told, cache.tprune_track)
        assert torch.allclose(found, expected, atol=2e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_hiding_inside_the_decoder_is_removing(method, positions):
    model = tiny("llava")
    inputs, told = noise_prompts(model, 2, 0, images=2), torch.arange(5, 5 + 2 * NEW).view(2, NEW)
    handle = put_to_work(model, method, positions=positions)
    if handle is None:
        return
    with handle:
        driver = handle.driver
        driver.trace, driver.hides = [], False
        track = model(**inputs, use_cache=True).past_key_values.tprune_track
        trace, driver.trace = driver.trace, None
        if not only_drops(*inside(trace, inputs["input_ids"].shape[1])):
            return
        removed, short = cached_decode(model, inputs, told)
        driver.method, driver.hides = Replay(driver.method, track), True
        hidden, full = cached_decode(model, inputs, told)
    assert torch.allclose(removed, hidden, atol=2e-4)
    lengths = [[layer.keys.shape[2] for layer in cache.layers] for cache in (short, full)]
    assert lengths[1] == [track.entered + NEW] * len(lengths[0])
