"""Metrics as expressions, and the search for one."""

import json
from random import Random

import pytest
import torch
from click.testing import CliRunner

from tests.decoders import decoder
from tests.golden_values import golden
from tests.llm_weights.tiny import prune
from tprune.cli import command
from tprune.core.evolve import Evolution
from tprune.core.expression import BINARY, UNARY, parse, simplify
from tprune.errors import UserError
from tprune.methods.llm_weights.pruner_zero import LEAVES
from tprune.pipelines import metric
from tprune.recipe import ModelSource, Recipe

TENSORS, _ = golden("llm-weights", "metric")
SMALL = ("--calibration", "3", "--length", "24", "--batch-size", "2", "--limit", "2", "--sparsity", "0.5")


def read(text):
    return parse(text, LEAVES)


@pytest.mark.parametrize("text", [name for name in TENSORS if "(" in name])
def test_an_expression_comes_to_what_the_authors_tree_does_and_says_itself_again(text):
    expression = read(text)
    assert str(expression) == text
    found = expression.value({name: TENSORS[name] for name in LEAVES})
    assert torch.allclose(found.expand(TENSORS[text].shape), TENSORS[text], rtol=1e-5)


@pytest.mark.parametrize(
    ("text", "why"), [("mul(W", "','"), ("root(W)", "root is none of"), ("W G", "too much"), ("", "its end")]
)
def test_what_is_no_expression_is_refused_with_the_reason(text, why):
    with pytest.raises(ValueError, match=why):
        read(text)


@pytest.mark.parametrize(
    ("text", "short"),
    [
        ("exp(log(W))", "W"),
        ("sqrt(sqr(neg(neg(G))))", "G"),
        ("mul(skp(W), log(exp(sub(add(G, X), X))))", "mul(W, G)"),
        ("abs(abs(mms(mms(G))))", "mms(G)"),
        ("sqr(neg(W))", "sqr(neg(W))"),
    ],
)
def test_opposing_operations_cancel(text, short):
    assert str(simplify(read(text))) == short


def test_evolution_tries_nothing_twice_keeps_to_its_size_and_finds_more_than_chance_does():
    target = read("mul(sqr(W), mms(G))").value(TENSORS)

    def fitness(expression):
        found = expression.value(TENSORS).expand(target.shape)
        apart = (found.argsort(1).argsort(1) - target.argsort(1).argsort(1)).abs().double().mean().item()
        return apart if found.isfinite().all() else float("inf")

    def tried(population, seed):
        evolution = Evolution(LEAVES, population=population)
        return list(evolution.run(fitness, 150, Random(seed)))

    found = tried(20, 3)
    assert len({str(expression) for expression, _ in found}) == len(found) == 150
    assert all(len(list(expression.nodes())) <= 15 for expression, _ in found)
    assert found == tried(20, 3)
    early, late = (sorted(value for _, value in part)[:10] for part in (found[:75], found[75:]))
    assert sum(late) < sum(early)


def test_every_operator_can_occur_and_depths_are_kept():
    evolution, random = Evolution(LEAVES), Random(0)
    made = [evolution.fresh(random, grow=bool(turn % 2)) for turn in range(300)]
    assert {node.name for one in made for _, node in one.nodes()} == {*LEAVES, *UNARY, *BINARY}
    assert {max(len(place) for place, _ in one.nodes()) for one in made} == {2, 3, 4}


def test_a_metric_that_reads_inputs_gathers_them_and_the_square_root_of_x_is_wanda_s_norm(text):
    models = decoder(), decoder()
    prune(models[0], "pruner-zero", text, sparsity=0.5, metric="mul(W, sqrt(X))")
    prune(models[1], "wanda", text, sparsity=0.5)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)


def test_metrics_that_cannot_be_read_or_are_not_finite_are_refused_by_name(text):
    with pytest.raises(UserError, match=r"--set metric=mul\(W\): ',' expected"):
        prune(decoder(), "pruner-zero", text, sparsity=0.5, metric="mul(W)")
    with pytest.raises(UserError, match="not finite"):
        prune(decoder(), "pruner-zero", text, sparsity=0.5, metric="div(W, sub(G, G))")


def search(folder, text, *more, **how):
    arguments = ["search-metric", str(folder), "--data", str(text), *SMALL, *map(str, more)]
    return CliRunner().invoke(command, arguments, catch_exceptions=False, **how)


def test_a_search_goes_on_where_it_stopped_and_its_recipe_prunes_as_well_as_it_says(
    folder, text, tmp_path, monkeypatch
):
    words, out = ("--evaluations", 6, "--population", 3, "--json"), tmp_path / "a"
    whole = json.loads(search(folder, text, *words).stdout)
    measure, measured = metric.MetricSearch.measure, []

    def interrupted(self, name):
        if len(measured) == 4:
            raise KeyboardInterrupt
        measured.append(name)
        return measure(self, name)

    monkeypatch.setattr(metric.MetricSearch, "measure", interrupted)
    with pytest.raises(BaseException):  # noqa: B017  (what click makes of an interruption)
        search(folder, text, *words, "--out", out, standalone_mode=False)
    measured = []
    again = json.loads(search(folder, text, *words, "--out", out).stdout)
    assert len(measured) == 3
    assert again["tried"] == whole["tried"]
    assert again["winner"]["perplexity"] == min(
        one["perplexity"] for one in again["tried"] if one["perplexity"]
    )
    assert f"metric: {again['winner']['metric']}" in out.read_text()
    with pytest.raises(UserError, match="another search"):
        search(folder, text, "--seed", 1, "--out", out, "--force")


def test_a_search_without_a_budget_says_what_to_give(folder):
    with pytest.raises(UserError, match="--sparsity S"):
        CliRunner().invoke(command, ["search-metric", str(folder)], catch_exceptions=False)


def test_a_file_that_cannot_be_written_is_said_before_anything_is_searched(folder, text, tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        search(folder, text, "--out", tmp_path / "nowhere" / "best.yaml")
    with pytest.raises(UserError, match="is a folder; give a file"):
        search(folder, text, "--out", tmp_path, "--force")


def test_what_follows_a_line_that_was_cut_off_is_read_again(tmp_path):
    file, asked = tmp_path / "tried.jsonl", Recipe(ModelSource("one"), ())
    metric.Tried(file, asked).write("W", 3.0)
    with file.open("a") as lines:
        lines.write('{"metric": "G", "per')
    metric.Tried(file, asked).write("X", None)
    assert metric.Tried(file, asked).found == {"W": 3.0, "X": None}
