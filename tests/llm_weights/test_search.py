"""Searches over structure: they stop when their time is up, and go on where they were."""

from dataclasses import replace

import pytest
from click.testing import CliRunner

from tests.llm_weights.test_artifacts import QUIET, recipe, weights
from tprune.cli import command
from tprune.errors import UserError
from tprune.pipelines.removal import Removal
from tprune.pipelines.run import execute


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


def test_a_limit_of_time_for_a_method_that_does_not_search_is_refused(folder, text, tmp_path):
    with pytest.raises(UserError, match="--max-minutes 1: flap does not search"):
        execute(recipe(folder, text, "flap"), QUIET, out=str(tmp_path / "out"), max_minutes=1.0)


def test_loadable_plain_is_refused_by_name_where_blocks_get_different_shapes(folder, text):
    with pytest.raises(UserError, match="--loadable plain: blockpruner leaves blocks of different shapes"):
        execute(recipe(folder, text, "blockpruner", loadable="plain"), QUIET)


def test_a_limit_of_time_without_a_place_to_keep_what_was_found_is_refused(folder):
    asked = ["llm-weights", "--method", "sleb", "--sparsity", "0.34", "--max-minutes", "1", str(folder)]
    with pytest.raises(
        UserError, match="--max-minutes 1: what a search found is kept beside --out DIR; give one"
    ):
        CliRunner().invoke(command, asked, catch_exceptions=False)
