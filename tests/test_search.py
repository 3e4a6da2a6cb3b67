"""`tprune search`: budgets by bisection, methods by successive halving, an answer that runs."""

import json

import pytest

from tests.test_cli import call
from tprune import recipe
from tprune.errors import BudgetError, UserError
from tprune.pipelines import search, trials
from tprune.pipelines.bisection import OutError, fit_cost, fit_drop


def look(model, *words, family="vit"):
    small = ("--limit", 8, "--batch-size", 4) if family == "vit" else ()
    return call("search", family, model, *small, *words)


def found(model, *words, **more):
    return json.loads(look(model, *words, "--json", **more).stdout)


def test_a_flops_target_is_met_by_every_method_that_is_left(vit_folder):
    result = found(vit_folder, "--target-flops", "0.6", "--method", "tome,evit,random")
    for one in result["candidates"]:
        # This model has 16 tokens: the next budget that is cheap enough may be some percent away.
        assert 0.55 < one["target_ratio"] <= 0.6 + search.FLOPS_TOLERANCE
        assert one["cost"] <= 0.6 + search.FLOPS_TOLERANCE
    assert result["winner"]["samples"] == 8


def test_the_winner_is_the_best_at_equal_cost(vit_folder):
    result = found(vit_folder, "--target-flops", "0.6", "--method", "tome,evit,random")
    last = [one for one in result["candidates"] if one.get("samples") == 8]
    assert result["winner"]["drop"] == min(one["drop"] for one in last)


def test_the_winning_recipe_runs_and_costs_what_was_promised(vit_folder, tmp_path):
    out = tmp_path / "best.yaml"
    result = found(vit_folder, "--target-flops", "0.6", "--method", "tome", "--out", out)
    assert recipe.read(out).stage.method == "tome"
    report = json.loads(call("run", out, "--json").stdout)
    assert report["pruned"]["flops"] / report["dense"]["flops"] == pytest.approx(
        result["winner"]["cost"], abs=1e-3
    )
    assert report["pruned"]["accuracy"] == result["winner"]["accuracy"]
    with pytest.raises(UserError, match="exists; give another file, or --force"):
        look(vit_folder, "--target-flops", "0.6", "--method", "tome", "--out", out)


def test_a_drop_is_kept_by_the_cheapest_budget_that_keeps_it(vit_folder):
    result = found(vit_folder, "--max-drop", "30", "--method", "tome,evit")
    assert result["winner"]["drop"] <= 30
    last = [
        one for one in result["tried"] if one["samples"] == 8 and one["method"] == result["winner"]["method"]
    ]
    good = [one for one in last if one["drop"] <= 30]
    assert result["winner"]["left"] == min(one["left"] for one in good)


def test_an_unreachable_target_says_what_each_method_reaches(vit_folder):
    with pytest.raises(
        UserError, match=r"nothing meets at most 5% of the dense FLOPs: evit: it reaches no less than"
    ):
        look(vit_folder, "--target-flops", "0.05", "--method", "evit")


def test_methods_that_leave_flops_alone_are_out_after_one_look(folder, text):
    words = ("--method", "wanda,flap", "--data", text, "--length", 24, "--calibration", 4, "--limit", 2)
    result = found(folder, "--target-flops", "0.8", *words, family="llm-weights")
    wanda = next(one for one in result["candidates"] if one["method"] == "wanda")
    assert "leaves this cost at 100.0%" in wanda["reason"]
    assert sum(one["method"] == "wanda" for one in result["tried"]) == 1
    assert result["winner"]["method"] == "flap"
    assert "sparsity" in result["recipe"]


UNITS = (("ms", 1), ("ratio", 10))


@pytest.mark.parametrize(("scatter", "rounds"), [(0.01, {2, 8}), (0.4, {2, 4, 8})])
def test_a_latency_target_is_timed_beside_the_dense_model_and_longer_on_a_noisy_machine(
    scatter, rounds, vit_folder, monkeypatch
):
    seen = []

    def times(self, trial, rounds):
        # As if time were in proportion to the tokens that are kept.
        kept = 10 * trial.recipe.stage.keep
        middle = {"dense": 10.0, "pruned": kept}
        seen.append(rounds)
        parts = {"": 1.0, "_q1": 1 - scatter, "_q3": 1 + scatter}
        return {
            name: {
                f"latency{part}_{unit}": ms * much / scale
                for part, much in parts.items()
                for unit, scale in UNITS
            }
            for name, ms in middle.items()
        }

    monkeypatch.setattr(trials.Trials, "latency", times)
    monkeypatch.setattr(trials.Trials, "latency_alone", lambda self, rounds: 10.0)
    words = ("--target-latency", "7ms", "--method", "tome", "--rounds", 2)
    result = found(vit_folder, *words)
    assert result["winner"]["left"] == pytest.approx(0.7, abs=0.03)
    assert result["verified"]["pruned"]["latency_ms"] == 10 * result["winner"]["left"]
    assert set(seen) == rounds
    assert "the limit of 7 ms is" in look(vit_folder, *words).stdout
    with pytest.raises(UserError, match=r"the dense model takes 10.0 ms already"):
        look(vit_folder, "--target-latency", "1s", "--method", "tome")


def test_hyperparameters_are_tried_where_a_method_has_them(vit_folder):
    result = found(
        vit_folder, "--target-flops", "0.6", "--method", "tome,evit", "--try", "prop_attn=true,false"
    )
    settings = [(one["method"], one["set"].get("prop_attn")) for one in result["candidates"]]
    assert sorted(settings, key=str) == [("evit", None), ("tome", False), ("tome", True)]


def test_samples_double_as_candidates_halve(vit_folder):
    text = look(vit_folder, "--target-flops", "0.7", "--method", "tome,evit,zero-tprune,random").stderr
    assert "4 of 4 candidates on 4 samples" in text
    assert "2 of 4 candidates on 8 samples" in text


def test_the_table_names_the_winner_and_prints_its_recipe(vit_folder):
    text = look(vit_folder, "--target-flops", "0.6", "--method", "tome,evit").stdout
    assert "winner, on 8 samples" in text
    assert "tprune: 1" in text
    assert "is within what chance does on 8 samples" in text


BAD = {
    "no constraint": ((), "give one of --target-flops"),
    "two constraints": (("--target-flops", "0.5", "--max-drop", "1"), "give one of --target-flops"),
    "flops beyond dense": (("--target-flops", "1.5"), "expected a fraction between 0 and 1"),
    "a time without unit": (("--target-latency", "20"), "expected a time such as 20ms"),
    "a drop of nothing": (("--max-drop", "0"), "above 0"),
    "a malformed try": (("--max-drop", "1", "--try", "r"), "expected NAME=A,B,C"),
    "an unknown method": (("--max-drop", "1", "--method", "nonsense"), "no method 'nonsense'"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_one_line(case, vit_folder):
    words, clue = BAD[case]
    with pytest.raises(UserError, match=clue):
        look(vit_folder, *words)


def counted(function):
    def call(place):
        call.places.append(place)
        return function(place)

    call.places = []
    return call


def test_a_smooth_cost_is_met_in_a_few_steps():
    cost = counted(lambda left: 0.1 + 0.9 * left**1.3)
    left, found = fit_cost(cost, 0.5, 0.01)
    assert found == pytest.approx(0.5, abs=0.01)
    assert cost(left) == found
    assert len(cost.places) <= 6


def test_one_slow_call_does_not_throw_a_method_out():
    slow = iter([1.2])
    left, _ = fit_cost(lambda left: next(slow, left), 0.5, 0.03, exact=False)
    assert left < 0.55


def test_a_cost_in_steps_stays_below_its_target():
    left, found = fit_cost(lambda left: round(4 * left) / 4, 0.6, 0.01)
    assert (found, round(4 * left) / 4) == (0.5, 0.5)


def test_a_reach_ends_the_bisection_at_its_end():
    def cost(left):
        if left < 0.4:
            raise BudgetError("too little", 0.4, 1.0)
        return left

    assert fit_cost(cost, 0.5, 0.01)[0] == pytest.approx(0.5, abs=0.02)
    with pytest.raises(OutError, match="reaches no less than 40.0%"):
        fit_cost(cost, 0.3, 0.01)


def test_a_drop_is_looked_for_near_an_earlier_answer_first():
    drop = counted(lambda left: 10 * (1 - left))
    assert fit_drop(drop, 4.0, start=0.62) == pytest.approx(0.6, abs=0.01)
    assert drop.places[:2] == [0.62, 0.57]
    assert all(0.57 <= place <= 0.62 for place in drop.places)


def test_a_drop_ends_at_the_smallest_good_budget_and_at_the_reach():
    drop = counted(lambda left: 10 * (1 - left))
    assert fit_drop(drop, 4.0, steps=10) == pytest.approx(0.6, abs=0.01)

    def short(left):
        if 1 - left > 0.25:
            raise BudgetError("too much", 0.0, 0.25)
        return 0.0

    assert fit_drop(short, 1.0) == 0.75
    with pytest.raises(OutError):
        fit_drop(lambda left: 5.0, 1.0)


def test_methods_of_text_encoders_are_tried_on_the_built_in_one():
    with pytest.raises(UserError, match="nothing meets.*ltp learns how many tokens stay"):
        call("search", "llm-context", "--method", "ltp", "--target-flops", "0.5", "--limit", "1", "--quiet")
