"""Searches over structure: they stop when their time is up, and go on where they were."""

from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner

from tests.decoders import decoder
from tests.llm_weights.test_artifacts import QUIET, recipe, weights
from tests.llm_weights.tiny import prune
from tprune.cli import command
from tprune.core.weights import StructureEdit
from tprune.errors import BudgetError, UserError
from tprune.methods import registry
from tprune.methods.weight_view import BlockView, ModelView
from tprune.methods.weights import WeightBudget
from tprune.pipelines.removal import Removal, fingerprint
from tprune.pipelines.run import execute
from tprune.pipelines.trials import Trials


def test_a_search_stops_when_its_time_is_up_and_goes_on_where_it_was(folder, text, tmp_path, monkeypatch):
    asked, out = recipe(folder, text, "sleb", sparsity=0.6), tmp_path / "out"
    asked = replace(asked, stages=(replace(asked.stage, set={"early_barrier": 0}),))
    execute(asked, QUIET, out=str(tmp_path / "whole"), evaluate=False)
    measure, steps = Removal._measure, []

    def counted(self, made, candidates):
        steps.append(len(made))
        return measure(self, made, candidates)

    monkeypatch.setattr(Removal, "_measure", counted)
    with pytest.raises(UserError, match="--max-minutes 0: the search stopped behind step 1"):
        execute(asked, QUIET, out=str(out), evaluate=False, max_minutes=0.0)
    assert steps == [0]
    assert not out.exists()
    execute(asked, QUIET, out=str(out), evaluate=False, max_minutes=0.0)
    assert steps == [0, 1]
    assert weights(out) == weights(tmp_path / "whole")


SEARCHING = {
    "blockpruner": {},
    "bonsai": {},
    "darwinlm": {"generations": 1},
    "multipruner": {"channels": 8},
    "tyr": {"rounds": 1, "generations": 1},
}
"""Beside sleb, and what makes them quick."""


def test_every_method_that_searches_decoders_is_in_these_tests():
    facts = [registry.load(fact.id, "llm-weights") for fact in registry.facts("llm-weights")]
    assert {kind.id for kind in facts if kind.measures and "plain" in kind.runs_on} == {"sleb", *SEARCHING}


@pytest.mark.parametrize("method", SEARCHING)
def test_every_search_stops_and_goes_on_to_the_same_bytes(method, folder, text, tmp_path):
    asked, out = recipe(folder, text, method), tmp_path / "out"
    asked = replace(asked, stages=(replace(asked.stage, set=asked.stage.set | SEARCHING[method]),))
    execute(asked, QUIET, out=str(tmp_path / "whole"), evaluate=False)
    with pytest.raises(UserError, match="--max-minutes 0: the search stopped behind step 1"):
        execute(asked, QUIET, out=str(out), evaluate=False, max_minutes=0.0)
    execute(asked, QUIET, out=str(out), evaluate=False)
    assert weights(out) == weights(tmp_path / "whole")


def test_a_search_at_another_budget_measures_only_what_is_new(folder, text, monkeypatch):
    small, large = (recipe(folder, text, "blockpruner", sparsity=sparsity) for sparsity in (0.2, 0.5))
    measure, measured = Removal._measure, []

    def counted(self, made, candidates):
        measured.append(len(made))
        return measure(self, made, candidates)

    def rows(trials, asked):
        with trials.pruned(asked) as trial:
            return trial.handle.per_layer()

    monkeypatch.setattr(Removal, "_measure", counted)
    alone, whole = rows(Trials(large, QUIET), large), list(measured)
    trials = Trials(small, QUIET)
    rows(trials, small)
    measured.clear()
    assert rows(trials, large) == alone
    assert measured == whole[-len(measured) :], "the first steps were known"
    assert 0 < len(measured) < len(whole)


def test_losses_are_told_apart_by_what_is_gone_and_what_is_read():
    tokens = torch.arange(6).view(2, 3)
    heads = [StructureEdit(0, keep={"heads": torch.tensor(kept)}) for kept in ([0, 1], [0, 2])]
    half, whole = StructureEdit(1, halves=("mlp", "attention")), StructureEdit(1, removed=True)
    sets = [
        [],
        heads[:1],
        heads[1:],
        [whole],
        [whole, heads[0]],
        [StructureEdit(0, bias={"heads": torch.ones(2)})],
    ]
    names = [fingerprint(tokens, edits) for edits in sets]
    assert len(set(names)) == len(sets)
    assert fingerprint(tokens, [heads[0], half]) == names[4], "in any order, and by whichever words"
    assert fingerprint(tokens + 1, []) != names[0]


def test_a_limit_of_time_for_a_method_that_does_not_search_is_refused(folder, text, tmp_path):
    with pytest.raises(UserError, match="--max-minutes 1: flap does not search"):
        execute(recipe(folder, text, "flap"), QUIET, out=str(tmp_path / "out"), max_minutes=1.0)


def test_loadable_plain_is_refused_by_name_where_blocks_get_different_shapes(folder, text):
    said = "--loadable plain: blockpruner leaves blocks of different shapes"
    with pytest.raises(UserError, match=said):
        execute(recipe(folder, text, "blockpruner", loadable="plain"), QUIET)
    with pytest.raises(UserError, match=said):
        prune(decoder(), "blockpruner", text, sparsity=0.34, loadable="plain")


def test_a_limit_of_time_without_a_place_to_keep_what_was_found_is_refused(folder):
    asked = ["llm-weights", "--method", "sleb", "--sparsity", "0.34", "--max-minutes", "1", str(folder)]
    with pytest.raises(
        UserError, match="--max-minutes 1: what a search found is kept beside --out DIR; give one"
    ):
        CliRunner().invoke(command, asked, catch_exceptions=False)


def test_blockpruner_never_takes_the_last_half_out():
    blocks = [BlockView(index, 5, halves={"attention": 1, "mlp": 4}) for index in range(2)]
    model = ModelView(blocks, losses_with=lambda made, candidates: torch.zeros(len(candidates)))
    method = registry.build("blockpruner", "llm-weights")
    with pytest.raises(BudgetError, match=r"at most 0\.6 \(one half of a block stays\)"):
        method.plan(model, WeightBudget(0.9))
    gone = method.plan(model, WeightBudget(0.6))
    assert [edit.halves for edit in gone] == [("attention", "mlp"), ("attention",)]


def test_multipruner_without_any_share_is_refused():
    with pytest.raises(UserError, match="distribution=0,0,0: expected three shares"):
        registry.build("multipruner", "llm-weights", {"distribution": (0.0, 0.0, 0.0)})
