"""`tprune tune`: hyperparameters within ranges, at one budget."""

import json
import math

import pytest

from tests.test_cli import call
from tprune import recipe
from tprune.commands.tune import ranged
from tprune.errors import UserError
from tprune.pipelines import tune
from tprune.pipelines.tune import Space


def look(model, *words, **more):
    return call("tune", "vit", model, "--limit", 8, "--batch-size", 8, *words, **more)


def test_the_best_of_all_tried_is_written_and_runs_at_the_budget(vit_folder, tmp_path):
    out = tmp_path / "best.yaml"
    words = ("--method", "evit", "--keep", "0.6", "--set", "layers=1:2,3", "--trials", "4")
    result = json.loads(look(vit_folder, *words, "--out", out, "--json").stdout)
    assert len(result["tried"]) == 5
    assert result["tried"][0]["settings"] == {}
    assert result["best"]["loss"] == min(one["loss"] for one in result["tried"])
    stage = recipe.read(out).stage
    assert stage.keep == 0.6
    assert stage.set == result["best"]["settings"]
    report = json.loads(call("run", out, "--json").stdout)
    assert report["pruned"]["accuracy"] == result["best"]["figures"]["accuracy"]
    again = json.loads(look(vit_folder, *words, "--json").stdout)
    assert [one["settings"] for one in again["tried"]] == [one["settings"] for one in result["tried"]]
    with pytest.raises(UserError, match="exists; give another file, or --force"):
        look(vit_folder, *words, "--out", out)


def test_the_table_has_the_dense_model_and_the_method_as_it_is(vit_folder, monkeypatch):
    monkeypatch.setattr(tune, "drop", lambda metric, dense, figures: 0.0)
    shown = look(
        vit_folder, "--method", "evit", "--keep", "0.6", "--set", "layers=1:3", "--trials", "2"
    ).stdout
    assert "dense" in shown
    assert "as it is" in shown
    assert "method: evit" in shown


def test_settings_that_cannot_be_used_are_passed_over(vit_folder, monkeypatch):
    given = []

    def tried(self, settings):
        given.append(settings)
        bad = len(given) == 2
        return tune.Tried(
            settings, float("inf") if bad else -len(given), {"accuracy": 0.5, "agreement": 1.0}, "no" * bad
        )

    monkeypatch.setattr(tune.Tune, "tried", tried)
    words = ("--method", "evit", "--keep", "0.6", "--set", "layers=1:3", "--trials", "6", "--json")
    result = json.loads(look(vit_folder, *words).stdout)
    assert result["best"]["settings"] == given[-1]
    monkeypatch.setattr(
        tune.Tune, "tried", lambda self, settings: tune.Tried(settings, float("inf"), {}, "never")
    )
    with pytest.raises(UserError, match="none of these settings can be used: never"):
        look(vit_folder, *words)


def test_settings_whose_figures_are_not_finite_are_passed_over_with_a_reason(vit_folder, monkeypatch):
    monkeypatch.setattr(tune, "drop", lambda metric, dense, figures: math.inf)
    words = ("--method", "evit", "--keep", "0.6", "--set", "layers=1:3", "--trials", "2")
    with pytest.raises(UserError, match="none of these settings can be used: their accuracy is not finite"):
        look(vit_folder, *words)


def test_a_point_becomes_numbers_of_the_hyperparameters_kinds():
    space = Space.of(
        "vlm",
        "vflowopt",
        {"decoder": ranged("decoder=0.5:1,0.25"), "layers": ranged("layers=3:9"), "cell": [(3, 24)]},
    )
    assert space.bounds.tolist() == [[0.5, 1], [3, 9], [3, 24]]
    found = space.settings(tune.numpy.array([0.5, 0.26, 1 / 3]))
    assert found == {"decoder": [0.75, 0.25], "layers": [5], "cell": 10.0}
    assert isinstance(found["layers"][0], int)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--keep", "0.6"], "nothing to look for: give a range"),
        (["--keep", "0.6", "--set", "layers=2"], "nothing to look for: give a range"),
        (["--keep", "0.6", "--set", "layers=1:3", "--set", "layers=2"], "nothing to look for: give a range"),
        (["--set", "layers=1:3"], "tune compares at one budget: give --keep"),
        (
            ["--keep", "0.6", "--set", "layers=3:1"],
            "--set layers=3:1: expected NAME=LO:HI with numbers, the smaller",
        ),
        (["--keep", "0.6", "--set", "layers=1:x"], "--set layers=1:x: expected NAME=LO:HI with numbers"),
        (
            ["--keep", "0.6", "--set", "layers=-inf:3"],
            "--set layers=-inf:3: expected NAME=LO:HI with numbers",
        ),
        (["--keep", "0.6", "--set", "=1:3"], "--set =1:3: expected NAME=LO:HI with numbers"),
        (["--keep", "0.6", "--set", "layers=1:2:3"], "--set layers=1:2:3: expected NAME=LO:HI with numbers"),
        (["--keep", "0.6", "--set", "deep=1:3"], "--set deep: evit has layers"),
        (
            ["--keep", "0.6", "--set", "ratio=0.5:0.9"],
            "--set ratio: it is a budget of evit itself; give ranges of",
        ),
        (["--keep", "0.6", "--set", "layers=-3:3"], "--set layers=.*: expected 0 to"),
        (["--keep", "0.6", "--set", "fuse=0:1"], "--set fuse: ranges are for numbers; give a value"),
        (
            ["--keep", "0.6", "--set", "lr=0:1", "--method", "bavit"],
            "bavit must be trained, which tune does not do",
        ),
    ],
)
def test_what_cannot_be_looked_for_is_refused_in_one_line(words, told, vit_folder):
    with pytest.raises(UserError, match=told):
        look(vit_folder, "--method", "evit", *words)
