"""Bonsai against its authors' code, a round on a tiny decoder, and its regression on planted worth."""

from dataclasses import replace

import pytest
import torch
from scipy.stats import kendalltau

from tests.decoders import decoder
from tests.golden_values import golden
from tests.llm_weights.test_structured_golden import answers, edits
from tests.llm_weights.tiny import prune
from tprune.core.regress import Lasso, kendall_tau
from tprune.methods.llm_weights import bonsai


def test_a_round_of_bonsai_is_the_authors_from_the_prior_to_what_stays(monkeypatch):
    tensors, told = golden("llm-weights", "bonsai")
    setting = told["settings"]
    places = [f"{layer}.{kind}" for layer in range(3) for kind in ("heads", "channels")]
    drawn, found, fitted, rounds = [], [], [], []
    candidates, fit, turn = bonsai.Bonsai.candidates, Lasso.fit, bonsai.Bonsai.round

    def noted(self, unit, alive, share):
        found.append((self.score(unit), *candidates(self, unit, alive, share)))
        return found[-1][1:]

    def given(chance, count, number, generator):
        drawn.append(count)
        return tensors[f"{places[len(drawn) - 1]}.off"]

    def once(self, *arguments):
        rounds.append(turn(self, *arguments) if not rounds else {})
        return rounds[-1]

    monkeypatch.setattr(bonsai.Bonsai, "candidates", noted)
    monkeypatch.setattr(bonsai.Bonsai, "round", once)
    monkeypatch.setattr(bonsai, "pairs", given)
    chosen = {"rates": (setting["found"]["lr_factor"],), "penalties": (setting["found"]["reg_weight"],)}
    monkeypatch.setattr(
        Lasso, "fit", lambda self, *given: fitted.append(fit(replace(self, **chosen), *given)) or fitted[-1]
    )
    asked = answers(monkeypatch)
    model = decoder(num_key_value_heads=4)
    weights = sum(p.numel() for p in model.model.layers.parameters() if p.dim() > 1)
    sparsity = setting["prune_frac"] * setting["parameters"] / weights
    kept = edits(
        "bonsai",
        model,
        tensors["tokens"],
        sparsity,
        fraction=sparsity,
        masks=setting["masks_per_iter"],
        batches=(setting["bsz"],),
    )
    for place, (prior, units, chance) in zip(places, found, strict=True):
        expected = tensors[f"{place}.prior"]
        assert torch.allclose(prior / prior.sum(), expected / expected.sum(), rtol=1e-4)
        assert torch.equal(units, tensors[f"{place}.candidates"])
        assert torch.allclose(chance, tensors[f"{place}.chance"].double(), rtol=1e-3)
    assert drawn == [int(tensors[f"{place}.off"][0].sum()) for place in places]
    assert torch.allclose(torch.cat(asked).exp(), tensors["perplexity"], rtol=1e-4)
    assert torch.allclose(fitted[0], tensors["beta"].double(), atol=2e-3)
    for place in places:
        layer, kind = place.split(".")
        expected = tensors[f"{place}.keep"]
        assert torch.equal(
            kept.get(f"keep/{layer}.{kind}", torch.arange(len(tensors[f"{place}.prior"]))), expected
        )


def test_the_regression_puts_planted_worth_in_order():
    draw = torch.Generator().manual_seed(1)
    on, worth = torch.rand(120, 12, generator=draw) < 0.6, torch.arange(12).double()
    rule = Lasso(rates=(0.1,), penalties=(0.0,), batches=(32,), epochs=100)
    found = rule.fit(on, on.double() @ worth - 40, draw)
    assert kendalltau(found, worth).correlation > 0.9


def test_kendall_s_tau_is_that_of_scipy_with_ties_and_is_nan_of_constants():
    draw = torch.Generator().manual_seed(2)
    one, other = torch.randint(4, (5, 15), generator=draw), torch.randint(6, (15,), generator=draw)
    expected = [kendalltau(row, other).correlation for row in one]
    assert kendall_tau(one.double(), other.double()).tolist() == pytest.approx(expected)
    assert kendall_tau(torch.ones(1, 4), torch.arange(4.0)).isnan().all()


def test_a_draw_and_its_complement_switch_every_candidate_off_once():
    chance = torch.tensor([0.0, 0.5, 0.3, 0.2])
    off = bonsai.pairs(chance, 2, 6, torch.Generator().manual_seed(0))
    assert off.shape == (12, 4)
    assert torch.equal(off[0::2], ~off[1::2])
    assert (off[0::2].sum(1) == 2).all()
    assert not off[0::2, 0].any()
    assert torch.equal(bonsai.pairs(chance, 4, 1, torch.Generator())[0], chance > 0)


@pytest.mark.parametrize("fraction", [0.2, 1e-3])
def test_bonsai_goes_on_in_rounds_and_falls_short_of_the_budget_by_less_than_a_head(fraction, text):
    handle = prune(decoder(), "bonsai", text, sparsity=0.5, fraction=fraction)
    head, whole = 2 * 8 * 32 * 3, 3 * 7680
    assert 0 <= 0.5 - handle.achieved().value < head / whole
