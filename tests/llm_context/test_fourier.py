"""Channels of a cache as low frequencies: as the authors' code has them, exact where that can be, and growing."""

import pytest
import torch

import tprune
from tests.decoders import decoder, tokens
from tests.golden_values import golden
from tprune.core import waves
from tprune.core.fourier import Exact, Fourier, Mixed, Signal, errors, together
from tprune.core.stored import TILE, Stored
from tprune.core.tiles import attend_tiles
from tprune.core.waves import low_frequencies
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
        assert torch.equal(parts[-1].order[0, : len(chosen)].sort().values, chosen)
        exact.append(torch.cat([whole[:, :, :first], whole[:, :, length - window :]], dim=2))
    held = Stored((Exact(*exact), Fourier(*parts, tensors["k"].shape[1])))
    for seen in (held.tiles(), held.seen_by(tensors["q"])):
        found = attend_tiles(tensors["q"], seen, tensors["q"].shape[-1] ** -0.5)
        assert torch.allclose(found[0, :, 0], tensors["out"], atol=1e-5)


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("stretched", [True, False])
def test_all_frequencies_of_an_odd_period_are_the_channels_themselves(stretched):
    x = noise(2, 31, 5)
    x[..., 0] = 3.0
    assert torch.allclose(Signal.of(x, 16, 31, stretched).made(0, 31), x, atol=1e-5)
    assert torch.allclose(Signal.of(x, 4, 31, stretched).made(0, 31)[..., 0], x[..., 0], atol=1e-5)
    assert errors(x, 4, 31, stretched)[:, 1:].min() > 1e-2


def test_a_plain_series_leaves_out_what_it_cannot_say_and_a_stretched_one_has_the_range():
    x = noise(2, 31, 5)
    assert (errors(x, 4, 31, False) <= x.var(1, correction=0) + 1e-6).all()
    assert (errors(x, 4, 31, False) < errors(x, 4, 31)).all()
    made = Signal.of(x, 4, 31).made(0, 31)
    deviation = [(one - one.mean(1, keepdim=True)).abs().amax(1) for one in (made, x)]
    assert torch.allclose(*deviation, atol=1e-5)


def test_entries_that_come_later_are_added_as_if_they_had_been_there():
    x, period = noise(2, 40, 6), 50
    grown = Mixed.of(x[:, :30], 4, 7, period)
    for place in range(30, 40):
        grown = grown.append(x[:, place : place + 1])
    order = grown.order.unsqueeze(1).expand_as(x)
    begun, whole = (low_frequencies(x[:, :n].gather(2, order[:, :n])[..., :4], 7, period) for n in (30, 40))
    first = Mixed.of(x[:, :30], 4, 7, period).signal
    expected = first.coefficient + (whole - begun) * first.ratio / 7
    assert torch.allclose(grown.signal.coefficient, expected, atol=1e-4)
    later = grown.dense(0, 40)
    assert torch.equal(later.gather(2, order)[..., 4:], x.gather(2, order)[..., 4:])


@pytest.mark.parametrize("table", [0, waves.TABLE])
@pytest.mark.parametrize("period", [31, 50])
def test_what_is_read_of_frequencies_is_what_they_make(period, table, monkeypatch):
    """By a table and by transforms, within the period and beyond it."""
    monkeypatch.setattr(waves, "TABLE", table)
    x, weight, paid = noise(2, 31, 6), noise(2, 6, 3), noise(2, 3, 40)
    held = Mixed.of(x, 4, 5, period)
    held = held.append(noise(2, 9, 6))
    assert torch.allclose(held.times(weight), (held.dense(0, 40) @ weight).mT, atol=1e-4)
    assert torch.allclose(held.summed(paid), paid @ held.dense(0, 40), atol=1e-4)


@pytest.mark.parametrize("table", [0, waves.TABLE])
def test_the_waves_at_a_few_places_are_those_of_all_also_around_the_period_s_end(table, monkeypatch):
    monkeypatch.setattr(waves, "TABLE", table)
    whole = waves.waves(0, 33, 5, 33, torch.device("cpu")).T
    for first, last in ((0, 1), (30, 33), (30, 36), (70, 73)):
        places = torch.arange(first, last) % 33
        found = waves.waves_of_few(first, last, 5, 33, torch.device("cpu"))
        assert torch.allclose(found, whole[:, places], atol=1e-5)


def test_what_was_read_without_gradients_is_read_with_them_later():
    held, weight = Signal.of(noise(1, 20, 3), 2, 37), noise(1, 3, 2)
    with torch.inference_mode():
        held.times(weight, 20)
    held.times(weight.requires_grad_(), 20).sum().backward()
    assert weight.grad.isfinite().all()


def test_exact_channels_of_many_entries_that_came_one_by_one_are_all_there():
    x = noise(2, 30 + TILE + 5, 6)
    held = Mixed.of(x[:, :30], 4, 3, 400)
    for place in range(30, x.shape[1]):
        held = held.append(x[:, place : place + 1])
    assert held.length == x.shape[1]
    assert held.latest.shape[1] == 5
    order = held.order.unsqueeze(1).expand_as(x)
    assert torch.equal(held.dense(0, x.shape[1]).gather(2, order)[..., 4:], x.gather(2, order)[..., 4:])
    weight, paid = noise(2, 6, 3), noise(2, 3, x.shape[1])
    assert torch.allclose(held.times(weight), (held.dense(0, x.shape[1]) @ weight).mT, atol=1e-4)
    assert torch.allclose(held.summed(paid), paid @ held.dense(0, x.shape[1]), atol=1e-3)


def test_a_channel_of_no_frequency_but_zero_stands_at_its_mean():
    held = Signal.of(noise(2, 20, 5), 1, 64)
    assert torch.allclose(
        held.made(0, 20), noise(2, 20, 5).mean(1, keepdim=True).expand(-1, 20, -1), atol=1e-5
    )


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
