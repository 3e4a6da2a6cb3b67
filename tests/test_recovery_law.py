"""The law of training after pruning: what it recovers from planted curves, and the command that applies it."""

import csv
import json

import numpy as np
import pytest
from click.testing import CliRunner

from tprune.cli import command
from tprune.commands.predict_recovery import COLUMNS
from tprune.core.recovery_law import Law, Points, fit, free_parameters, quality
from tprune.errors import UserError

PLANTED = Law(n_c=0.9, d_c=0.35, e=0.4, alpha=0.5, beta=0.4, gamma=-1.3, delta=0.2)


def grid(sizes=(0.5, 1.5, 3.0, 8.0), rates=(0.15, 0.25, 0.35), tokens=(0.01, 0.03, 0.1, 0.3, 0.5)):
    """Every combination, with a dense loss that falls with the size."""
    size, rate, count = (part.ravel() for part in np.meshgrid(sizes, rates, tokens, indexing="ij"))
    return Points(size, count, rate, 3.0 - 0.3 * np.log(size))


def one(**changes):
    """A single point."""
    known = {"size": 3.0, "tokens": 0.1, "rate": 0.25, "dense": 2.5} | changes
    return Points(**{name: np.array([value]) for name, value in known.items()})


def test_the_law_is_the_paper_s_formula():
    at = one()
    by_hand = 2.5 + (1 / 0.25) ** -1.3 * (1 / 3) ** 0.2 * (0.9 / 3**0.5 + 0.35 / 0.1**0.4 + 0.4)
    assert PLANTED.loss(at).item() == pytest.approx(by_hand)


def test_planted_curves_are_found_again_and_foretold_where_nothing_was_measured():
    at = grid()
    law = fit(at, PLANTED.loss(at))
    assert (law.beta, law.gamma) == (pytest.approx(0.4, rel=1e-3), pytest.approx(-1.3, rel=1e-3))
    beyond = grid(sizes=(14.0,), rates=(0.45,), tokens=(1.0, 5.0))
    assert np.allclose(law.loss(beyond), PLANTED.loss(beyond), rtol=2e-3)
    assert quality(law, at, PLANTED.loss(at))["r2"] > 1 - 1e-8


def test_noise_of_a_hundredth_moves_what_is_foretold_by_little():
    at = grid()
    noise = np.random.default_rng(1).normal(size=len(at.size)) * 0.01
    law = fit(at, PLANTED.loss(at) + noise)
    beyond = grid(tokens=(1.0, 2.0))
    assert np.abs(law.loss(beyond) - PLANTED.loss(beyond)).max() < 0.05


def test_more_tokens_never_raise_the_loss_and_more_pruning_does():
    along = Points(np.full(9, 3.0), np.geomspace(0.01, 10, 9), np.full(9, 0.2), np.full(9, 2.5))
    assert (np.diff(PLANTED.loss(along)) < 0).all()
    losses = [PLANTED.loss(one(rate=rate)).item() for rate in (0.1, 0.2, 0.4)]
    assert losses == sorted(losses)


def test_one_model_and_one_rate_leave_a_curve_of_tokens_alone():
    at = grid(sizes=(0.135,), rates=(0.2,))
    assert free_parameters(at) == ("d_c", "e", "beta")
    law = fit(at, PLANTED.loss(at))
    assert np.allclose(law.loss(at), PLANTED.loss(at), atol=1e-5)
    assert law.beta == pytest.approx(0.4, rel=1e-3)


def test_the_tokens_for_a_loss_lead_to_it_and_a_loss_below_the_best_takes_endless_ones():
    at = one()
    need = PLANTED.tokens_for(3.4, at)
    assert PLANTED.loss(one(tokens=need.item())).item() == pytest.approx(3.4)
    assert np.isinf(PLANTED.tokens_for(PLANTED.best(at).item() - 0.01, at))


def test_behind_the_tokens_that_are_enough_a_doubling_gains_less():
    enough = PLANTED.tokens_until_doubling_gains(0.01, one()).item()
    saved = PLANTED.loss(one(tokens=enough)) - PLANTED.loss(one(tokens=2 * enough))
    assert saved.item() == pytest.approx(0.01)


def test_the_slope_error_compares_neighbours_of_a_curve():
    at = grid(sizes=(1.0,), rates=(0.2,), tokens=(1.0, 2.0, 4.0))
    loss = PLANTED.loss(at) + np.array([0.0, 0.1, 0.0])
    assert quality(PLANTED, at, loss)["slope_error"] == pytest.approx((0.1 + 0.05) / 2)


@pytest.fixture
def table(tmp_path):
    at = grid()
    measured = (1e9 * at.size, 1e9 * at.tokens, at.rate, at.dense, PLANTED.loss(at))
    rows = [[float(value) for value in row] for row in zip(*measured, strict=True)]
    with open(tmp_path / "points.csv", "w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    content = [dict(zip(COLUMNS, row, strict=True)) for row in rows]
    (tmp_path / "points.json").write_text(json.dumps(content))
    return tmp_path


def call(*arguments):
    result = CliRunner().invoke(command, ["predict-recovery", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def test_the_command_says_the_same_of_both_formats_and_draws(table):
    asked = ("--rate", "0.5", "--parameters", "14e9", "--dense-loss", "2.2", "--target-loss", "3.2", "--json")
    one_way, other = (json.loads(call(table / f"points.{kind}", *asked)) for kind in ("csv", "json"))
    assert one_way == other
    (told,) = one_way["foretold"]
    planted = one(size=14.0, rate=0.5, dense=2.2)
    assert told["target_tokens"] == pytest.approx(1e9 * PLANTED.tokens_for(3.2, planted).item(), rel=0.05)
    assert [part["tokens"] for part in told["losses"]] == pytest.approx([5e8, 1e9, 5e9])
    out = call(table / "points.csv", "--tokens", "1e9", "--plot", table / "law.svg")
    assert "R² 1.0000" in out
    assert out.count("\n") > 12
    assert (table / "law.svg").read_text().count("without") == 12


@pytest.mark.parametrize(
    ("content", "clue"),
    [
        ("", "holds no points"),
        ("tokens,loss\n1,2\n", "point 1: parameters is None; expected a number"),
        (",".join(COLUMNS) + "\n1e9,1e8,1.5,2,3\n", "rate is 1.5; it must be between 0 and 1"),
        (",".join(COLUMNS) + "\n1e9,1e8,0.2,2,3\n", "1 points for 3 parameters .*; measure more"),
        (
            ",".join(COLUMNS) + "\n1e9,1e8,0.2,2,3" * 3,
            "after 1 different numbers of tokens, where a curve needs 3",
        ),
        (",".join(COLUMNS) + "\n1e9,0,0.2,2,3\n", "tokens is 0; it must be positive"),
    ],
)
def test_points_that_are_none_are_refused_by_name(content, clue, tmp_path):
    (tmp_path / "points.csv").write_text(content)
    with pytest.raises(UserError, match=clue):
        call(tmp_path / "points.csv")


def test_what_else_cannot_be_is_refused(table, tmp_path):
    for arguments, clue in (
        ([tmp_path / "none.csv"], "cannot be read; give a .csv or .json file"),
        ([table / "points.csv", "--tokens", "1e8,many"], "expected positive numbers such as 1e8,1e9"),
        ([table / "points.csv", "--plot", "law.gif"], "ends in .png or .svg"),
        ([table / "points.csv", "--plot", table / "points.svg" / "law.svg"], "no folder"),
    ):
        with pytest.raises(UserError, match=clue):
            call(*arguments)
