"""OPTIN: encoders without one unit at a time."""

import math
from dataclasses import replace

import pytest
import torch

from tests.decoders import tokens
from tests.encoders import encoder, outputs
from tests.golden_values import golden
from tests.llm_weights.test_encoders import different, driver_of, prune
from tprune.core.allocate import two_lists
from tprune.core.trajectory import balanced
from tprune.errors import UserError
from tprune.methods.llm_weights import optin
from tprune.methods.weights import WeightBudget
from tprune.models import units
from tprune.models.blocks import find_decoder
from tprune.pipelines import prune_weights
from tprune.pipelines.journal import Journal


@pytest.mark.parametrize("case", ["official", "default", "other"])
def test_optin_scores_units_and_keeps_the_same_as_the_authors(case, monkeypatch):
    tensors, told = golden("llm-weights", "optin")
    setting, seen, score = told["settings"]["cases"][case], {}, optin.OPTIN.scores

    def spy(method, model, kind):
        seen[kind] = score(method, model, kind)
        return seen[kind]

    monkeypatch.setattr(optin.OPTIN, "scores", spy)
    handle = prune(encoder(), "optin", setting["sparsity"], tensors["tokens"], **setting["set"])
    for kind, found in seen.items():
        expected = tensors[f"{case}.{kind}.scores"]
        assert torch.allclose(torch.stack(found), expected, rtol=2e-3, atol=1e-5)
        for index in range(3):
            stay = tensors[f"{case}.{kind}"][index].nonzero()[:, 0]
            assert torch.equal(handle.edits[f"keep/{index}.{kind}"], stay)
    assert setting["sparsity"] <= handle.achieved().value < setting["sparsity"] + 0.005


def test_optin_takes_what_nothing_reads_and_changes_no_answer():
    model, ids = encoder(), tokens(4, 20)
    for index, head in ((0, 2), (1, 0), (2, 3)):
        units.site(find_decoder(model), index, "heads").reader.weight[:, 8 * head : 8 * head + 8] = 0
        units.site(find_decoder(model), index, "channels").reader.weight[:, 5:9] = 0
    before = outputs(model, ids)
    handle = prune(model, "optin", 3 * (1024 + 4 * 64) / (3 * 7168), ids, heads=1e3)
    assert different(outputs(model, ids), before) < 2e-5
    assert [handle.edits[f"keep/{index}.heads"].tolist() for index in range(3)] == [
        [0, 1, 3],
        [1, 2, 3],
        [0, 1, 2],
    ]


def run(model, ids, journal=None, minutes=None, batch=8, **settings):
    """What the method keeps of an encoder in memory."""
    driver = driver_of("optin", **settings)
    driver.recipe, driver.max_minutes = replace(driver.recipe, batch_size=batch), minutes
    journal = journal or Journal(None, "test")
    return prune_weights.prune(driver, find_decoder(model), WeightBudget(0.3), ids, journal).edits


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_optin_without_classes_goes_by_the_trajectory_alone_whatever_the_batch():
    one, other = (run(encoder(head=False), tokens(4, 20), batch=batch, tokens=30) for batch in (1, 3))
    assert same(one, other)


def test_optin_that_is_stopped_goes_on_where_it_was_and_ends_as_if_it_had_not_been(tmp_path):
    model, ids, journal = encoder(), tokens(4, 20), Journal(tmp_path, "test")
    for _ in range(5):  # heads of three blocks, and channels of two
        with pytest.raises(UserError, match="the same command goes on there"):
            run(model, ids, journal, minutes=0.0)
    assert same(run(model, ids, journal, minutes=0.0), run(encoder(), ids))


def test_errors_are_balanced_as_a_loop_over_units_does_it():
    first = torch.tensor([5e3, 2.0, 0.0, 7e5, 1.0, 3e-2, 9.0])
    second = torch.tensor([0.4, 3.0, 0.0, 2e-3, 0.0, 1e-2, 1e-4])
    expected, factors = [], []
    for one, other in zip(first.tolist(), second.tolist(), strict=True):
        if one > other > 0:
            factors.append(10.0 ** int(math.log10(one / other) - 1))
            expected.append(one + factors[-1] * other)
        else:
            expected.append(one + (sum(factors) / len(factors) if factors else 1.0) * other)
    assert torch.allclose(balanced(first, second, 10.0), torch.tensor(expected, dtype=torch.float64))
    assert balanced(torch.ones(1), torch.full((1,), 3.0), 10.0).item() == 4.0


@pytest.mark.parametrize("budget", [7.0, 17.0, 26.0, 41.0, 80.0])
def test_a_budget_is_split_between_two_kinds_as_the_best_of_all_splits(budget):
    generator = torch.Generator().manual_seed(4)
    first, second = torch.rand(5, generator=generator) * 3, torch.rand(12, generator=generator)
    splits = {
        (one, other): first[:one].sum() + second[:other].sum()
        for one in range(1, 6)
        for other in range(1, 13)
        if 5 * one + 2 * other <= budget
    }
    assert two_lists(first, second, (5, 2), budget) == max(splits, key=splits.get)


def test_the_best_unit_of_every_block_is_kept_first():
    scores, order = optin.ranked([torch.tensor([5.0, 7.0, 6.0]), torch.tensor([1.0, 0.5])])
    assert order.tolist() == [1, 3, 2, 0, 4]
    assert scores.tolist() == [7.0, 1.0, 6.0, 5.0, 0.5]
