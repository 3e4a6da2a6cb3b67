"""Channels of a cache as low frequencies: as the authors' code has them, exact where that can be, and growing."""

import pytest
import torch

import tprune
from tests.decoders import decoder, tokens
from tests.golden_values import golden
from tprune.core.fourier import Exact, Fourier, Mixed, Signal, errors, low_frequencies, together
from tprune.core.stored import Stored, attend_tiles
from tprune.errors import UserError


def test_the_errors_the_channels_and_what_a_query_reads_are_the_authors():
    tensors, facts = golden("llm-context", "fourier-attention")
    settings = facts["settings"]
    first, window, length = settings["first"], settings["window"], tensors["k"].shape[2]
    period, frequencies = length + settings["coming"] - first - window, settings["states"] // 2
    parts, exact = [], []
    for name in "kv":
        whole, chosen = tensors[name], tensors[f"{name}.chosen"]
        middle = together(whole[:, :, first : length - window])
        assert torch.allclose(errors(middle, frequencies, period)[0], tensors[f"{name}.error"], atol=1e-6)
        parts.append(Mixed.of(middle, len(chosen), frequencies, period))
        assert torch.equal(parts[-1].order[0, : len(chosen)].long().sort().values, chosen)
        exact.append(torch.cat([whole[:, :, :first], whole[:, :, length - window :]], dim=2))
    held = Stored((Exact(*exact), Fourier(*parts, tensors["k"].shape[1])))
    found = attend_tiles(tensors["q"], held.tiles(), tensors["q"].shape[-1] ** -0.5)
    assert torch.allclose(found[0, :, 0], tensors["out"], atol=1e-5)


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_all_frequencies_of_an_odd_period_are_the_channels_themselves():
    x = noise(2, 31, 5)
    x[..., 0] = 3.0
    assert torch.allclose(Signal.of(x, 16, 31).made(0, 31), x, atol=1e-5)
    assert torch.allclose(Signal.of(x, 4, 31).made(0, 31)[..., 0], x[..., 0], atol=1e-5)
    assert errors(x, 4, 31)[:, 1:].min() > 1e-2


def test_entries_that_come_later_are_added_as_if_they_had_been_there():
    x, period = noise(2, 40, 6), 50
    grown = Mixed.of(x[:, :30], 4, 7, period)
    for place in range(30, 40):
        grown = grown.append(x[:, place : place + 1])
    order = grown.order.long().unsqueeze(1).expand_as(x)
    whole = low_frequencies(x.gather(2, order)[..., :4], 7, period)
    assert torch.allclose(grown.signal.coefficient, whole, atol=1e-4)
    later = grown.dense(0, 40)
    assert torch.equal(later.gather(2, order)[..., 4:], x.gather(2, order)[..., 4:])


def test_what_leaves_the_window_joins_the_frequencies_and_the_first_stay_exact():
    model, ids = decoder(), tokens(2, 134)
    dense = model(ids[:, :128]).past_key_values.layers[0].keys
    with tprune.prune(model, "fourier-attention", keep=0.5) as handle:
        cache = model(ids[:, :128]).past_key_values
        for place in range(128, 134):
            model(ids[:, place : place + 1], past_key_values=cache)
        layer = cache.layers[0]
        assert layer.keys.shape[2] == 32
        first, middle = layer.stored.parts
        assert torch.equal(first.key, dense[:, :, :4])
        assert middle.length == 128 - 36 + 6
        assert abs(handle.achieved().value - 0.5) < 0.02


@pytest.mark.parametrize(("keep", "settings"), [(0.3, {}), (0.5, {"window": 60}), (0.5, {"states": 0.3})])
def test_a_budget_without_room_for_window_and_coefficients_is_refused(keep, settings):
    model = decoder()
    with tprune.prune(model, "fourier-attention", keep=keep, **settings):
        with pytest.raises(UserError, match="raise --keep, or lower --set window=… or states=…"):
            model(tokens(1, 128))
