"""DarwinLM and Týr: local pruning and divergence against the authors' code, and what their search promises."""

from random import Random

import pytest
import torch

from tests.decoders import decoder, tokens
from tests.golden_values import golden
from tests.llm_weights.test_structured_golden import edits
from tests.llm_weights.tiny import QUICK, logits, prune
from tprune.core.divergence import divergence, likeliest
from tprune.core.levels import offspring, spread
from tprune.core.statistics import Inputs
from tprune.core.units import PENDING, columns_of, damped_gram, remove_greedily, remove_in_rounds
from tprune.errors import UserError
from tprune.methods import registry
from tprune.methods.levels import LevelMethod
from tprune.methods.weight_view import UnitView
from tprune.pipelines.divergence import Divergence, draw

LEVELLED = ("darwinlm", "tyr")


@pytest.mark.parametrize("method", LEVELLED)
@pytest.mark.parametrize("kind", ["heads", "channels"])
def test_every_version_of_a_site_is_the_authors(method, kind):
    tensors, told = golden("llm-weights", method)
    inputs, setting = Inputs(("gram",)), told["settings"]
    inputs.add(tensors[f"{kind}.inputs"])
    width, stops = setting["width"][kind], setting["stops"][kind]
    unit = UnitView(kind, tensors[f"{kind}.weight"], width, 1, 1, gram=inputs.result()["gram"])
    rounds = {name: setting[name] for name in ("channel_rounds", "head_rounds") if name in setting}
    versions = registry.build(method, "llm-weights", rounds).versions(unit, stops)
    for stop, (keep, weight) in zip(stops, versions, strict=True):
        expected = tensors[f"{kind}.{stop}"]
        assert len(keep) == 24 // width - stop
        whole = torch.zeros_like(expected).index_copy_(1, columns_of(keep, width), weight)
        assert torch.allclose(whole, expected, atol=2e-4)


@pytest.mark.parametrize("method", LEVELLED)
def test_the_divergence_is_the_authors(method):
    tensors, told = golden("llm-weights", method)
    dense, index = likeliest(tensors["dense"], told["settings"].get("top"))
    found = divergence(dense, tensors["other"], index)[:, :-1].mean()
    assert found.item() == pytest.approx(tensors["kl"].item(), rel=1e-5)


def test_what_is_left_of_a_site_is_the_least_squares_solution_either_way():
    draw = torch.Generator().manual_seed(0)
    z, weight = torch.randn(200, 12, generator=draw), torch.randn(5, 12, generator=draw)
    gram = damped_gram(z.T @ z, 0.01)
    (greedy,) = remove_greedily(weight, gram.inverse(), 3, [2])
    for keep, found in (greedy, *remove_in_rounds(weight, gram, 3, [2], 2)):
        kept = columns_of(keep, 3)
        expected = torch.linalg.solve(gram[kept][:, kept], (gram @ weight.T)[kept]).T
        assert torch.allclose(found, expected, atol=1e-4)


def test_single_inputs_go_in_the_order_of_what_their_loss_costs_with_the_rest_solved_for():
    """Also behind the first `PENDING`, when the matrices have followed; an oracle that solves anew each time."""
    draw = torch.Generator().manual_seed(1)
    z, weight = torch.randn(400, 90, generator=draw).double(), torch.randn(4, 90, generator=draw).double()
    gram, stops = damped_gram(z.T @ z, 0.01), [2, PENDING + 1, PENDING + 11]
    left, now = torch.arange(90), weight
    for removed in range(1, stops[-1] + 1):
        cost = now.square().sum(0) / gram[left][:, left].inverse().diagonal()
        left = torch.cat([left[: cost.argmin()], left[cost.argmin() + 1 :]])
        now = torch.linalg.solve(gram[left][:, left], (gram @ weight.T)[left]).T
        if removed in stops:
            versions = remove_greedily(weight, gram.inverse(), 1, stops[: stops.index(removed) + 1])
            *_, (keep, found) = versions
            assert torch.equal(keep, left)
            assert torch.allclose(found, now, atol=1e-8)


def test_exchanges_keep_the_sum_of_each_kind_and_stay_in_range():
    kinds, ranges = ["heads", "channels"] * 4, [(-1, 2), (-2, 1)] * 4
    found = offspring((0,) * 8, kinds, ranges, 40, 3, Random(0))
    assert len(set(found)) == 40
    assert (0,) * 8 not in found
    for levels in found:
        assert sum(levels[0::2]) == 0 == sum(levels[1::2])
        assert all(low <= level <= high for level, (low, high) in zip(levels, ranges, strict=True))
    assert offspring((0, 0), ["heads", "channels"], [(-1, 1)] * 2, 4, 3, Random(0)) == []


@pytest.mark.parametrize("sparsity", [0.02, 0.5, 0.99])
def test_a_search_starts_at_the_budget_to_a_channel(sparsity, text):
    handle = prune(decoder(), "tyr", text, sparsity=sparsity, generations=0, rounds=1)
    assert abs(handle.achieved().value - sparsity) <= 0.5 * 3 * 32 / (3 * 7680) + 1e-9


def test_what_does_not_divide_is_spread_over_the_blocks():
    assert spread(7, [4, 4, 4]) == [2, 3, 2]
    assert spread(12, [4, 4, 4]) == [4, 4, 4]
    assert sum(spread(11, [5, 9, 2, 30])) == 11


@pytest.mark.parametrize("method", LEVELLED)
def test_a_search_over_all_tokens_never_gets_worse_and_keeps_to_the_budget(method, text, monkeypatch):
    seen, measure = [], Divergence._measure
    monkeypatch.setattr(
        Divergence, "_measure", lambda self, *given: seen.append(measure(self, *given)) or seen[-1]
    )
    handle = prune(
        decoder(),
        method,
        text,
        sparsity=0.4,
        generations=4,
        survivors=(1,),
        tokens=(96,),
        **({"training": (0,)} if method == "darwinlm" else {"rounds": 1}),
    )
    best = [float(losses.min()) for losses in seen]
    assert best == sorted(best, reverse=True)
    assert best[-1] < float(seen[0][-1])
    assert abs(handle.achieved().value - 0.4) < 0.005


def test_training_its_candidates_changes_what_darwinlm_measures_and_nothing_else(text, monkeypatch):
    seen, measure = [], Divergence._measure

    def twice(self, *given):
        seen.append(measure(self, *given))
        assert torch.equal(measure(self, *given), seen[-1])
        return seen[-1]

    monkeypatch.setattr(Divergence, "_measure", twice)
    settings = {**QUICK["darwinlm"], "generations": 1, "survivors": (1,), "tokens": (96,), "rate": 1e-2}
    models = [decoder(), decoder()]
    for model, training in zip(models, (0, 48), strict=True):
        prune(model, "darwinlm", text, sparsity=0.4, **{**settings, "training": (training,)})
    assert (seen[0] != seen[1]).all()
    dense = decoder()
    for model in models:
        assert torch.equal(model.lm_head.weight, dense.lm_head.weight)
        assert torch.equal(model.model.embed_tokens.weight, dense.model.embed_tokens.weight)


def test_a_sample_has_the_asked_tokens_and_no_sequence_of_a_single_one():
    assert draw(4, 8, 20, Random(0)).lengths == [8, 8, 4]
    assert draw(4, 8, 99, Random(0)).lengths == [8] * 4
    assert draw(4, 8, 17, Random(0)).lengths == [8, 8]
    assert draw(4, 8, 1, Random(0)).rows == []


def test_a_block_that_loses_all_units_is_gone_from_the_model_and_told_so(text, monkeypatch):
    model = decoder()
    gone = {(index, kind): 0 for index in range(3) for kind in ("heads", "channels")}
    whole = gone | {(1, "heads"): 2, (1, "channels"): 48}
    monkeypatch.setattr(LevelMethod, "start", lambda self, blocks, sparsity: whole)
    handle = prune(model, "darwinlm", text, sparsity=1 / 3, generations=0)
    assert len(model.model.layers) == 2
    assert [row["sparsity"] for row in handle.rows] == [0, 1, 0]


def test_a_model_of_levels_computes_what_the_search_saw(text, monkeypatch):
    seen, put = [], Divergence._with

    def noted(self, edits, x, ids):
        for first, part in put(self, edits, x, ids):
            seen.append(part)
            yield first, part

    monkeypatch.setattr(Divergence, "_with", noted)
    model, ids = decoder(), tokens(2, 24)
    edits(
        "darwinlm", model, ids, 0.4, generations=1, offspring=1, survivors=(1,), tokens=(48,), training=(0,)
    )
    found = logits(model, ids)[:, :-1]
    assert min(float((found - part).abs().max()) for part in seen) < 1e-4 * float(found.abs().max())


def test_stages_that_do_not_end_with_one_survivor_are_refused():
    with pytest.raises(UserError, match="survivors=4,2: expected 1 at the end"):
        registry.build("tyr", "llm-weights", {"survivors": (4, 2), "tokens": (8, 8)})
    with pytest.raises(UserError, match="2 survivors and 4 tokens; give as many of each"):
        registry.build("darwinlm", "llm-weights", {"survivors": (4, 1)})
