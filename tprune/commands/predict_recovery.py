"""`tprune predict-recovery`: the P² law, fitted to losses that were measured, and what it says of others."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tprune import artifact
from tprune.commands.common import check_file
from tprune.errors import UserError

if TYPE_CHECKING:
    from tprune.core.recovery_law import Array, Law, Points

COLUMNS = ("parameters", "tokens", "rate", "dense_loss", "loss")
"""Of every point: the dense model's parameters, the tokens of training, the fraction removed, both losses."""
BILLION = 1e9


@click.command("predict-recovery")
@click.argument("points", metavar="POINTS")
@click.option("--parameters", type=click.FloatRange(0, min_open=True), help="Foretell a model of this size.")
@click.option("--rate", type=click.FloatRange(0, 1, min_open=True, max_open=True), help="... pruned so far.")
@click.option("--dense-loss", type=click.FloatRange(0), help="... whose dense loss is this.")
@click.option("--tokens", metavar="D[,D…]", help="Foretell the loss after so many tokens.")
@click.option("--target-loss", type=click.FloatRange(0), help="Say how many tokens lead to this loss.")
@click.option(
    "--gain",
    type=click.FloatRange(0, min_open=True),
    default=0.01,
    show_default=True,
    help="Say from where on doubling the tokens gains less than this.",
)
@click.option("--plot", metavar="FILE", help="Draw points and curves as .png or .svg.")
@click.option("--force", is_flag=True, help="Replace an existing --plot file.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(points: str, plot: str | None, force: bool, as_json: bool, **asked: Any) -> None:
    """Fit the P² law to POINTS and foretell how training recovers a pruned model.

    POINTS is a .csv file with the columns parameters, tokens, rate, dense_loss and loss, or a .json list of objects
    with these names: losses (logarithms of perplexities) measured while pruned models were trained. What is foretold is
    about these models, or about one of which --parameters, --rate or --dense-loss differ.
    """
    from tprune.core import recovery_law

    if plot is not None and Path(plot).suffix not in (".png", ".svg"):
        raise UserError(f"--plot {plot}: give a file that ends in .png or .svg")
    check_file(plot, force, "--plot")
    tokens = counts(asked["tokens"])
    at, loss = read(points)
    try:
        law = recovery_law.fit(at, loss)
    except ValueError as error:
        raise UserError(f"{points}: {error}; measure more") from None
    found = {
        "law": asdict(law),
        "free": list(recovery_law.free_parameters(at)),
        "points": len(loss),
        "fit": recovery_law.quality(law, at, loss),
        "foretold": [foretold(law, one, tokens, asked) for one in subjects(at, asked)],
    }
    if plot is not None:
        from tprune.evaluate.recovery_plot import draw

        Path(plot).write_bytes(draw(law, at, loss, Path(plot).suffix[1:]))
    if as_json:
        click.echo(json.dumps(artifact.finite(found)))
    else:
        show(found)


def counts(text: str | None) -> list[float]:
    """The numbers of tokens in a list such as 1e8,1e9.

    Raises:
        UserError: something else.
    """
    try:
        found = [float(part) for part in text.split(",")] if text else []
    except ValueError:
        found = [-1.0]
    if any(not 0 < count < float("inf") for count in found):
        raise UserError(f"--tokens {text}: expected positive numbers such as 1e8,1e9")
    return found


def read(path: str) -> tuple[Points, Array]:
    """The points of a file, in billions, and their losses [P].

    Raises:
        UserError: a file that is not there or holds something else.
    """
    import numpy as np

    from tprune.core.recovery_law import Points

    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8-sig")
        rows = json.loads(text) if file.suffix == ".json" else list(csv.DictReader(text.splitlines()))
    except (OSError, UnicodeDecodeError, csv.Error):
        raise UserError(f"{path} cannot be read; give a .csv or .json file of measured points") from None
    except ValueError:
        raise UserError(f"{path} is not JSON; give a list of objects with {', '.join(COLUMNS)}") from None
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path} holds no points; give rows with {', '.join(COLUMNS)}")
    values = np.array(
        [[value(path, place, row, name) for name in COLUMNS] for place, row in enumerate(rows, 1)]
    )
    parameters, tokens, rate, dense, loss = values.T
    return Points(parameters / BILLION, tokens / BILLION, rate, dense), loss


def value(path: str, place: int, row: dict[str, Any], name: str) -> float:
    """One number of a point.

    Raises:
        UserError: none, or one that cannot be.
    """
    given = row.get(name)
    try:
        number = float(given)
    except (TypeError, ValueError):
        raise UserError(f"{path}, point {place}: {name} is {given!r}; expected a number") from None
    most = 1.0 if name == "rate" else float("inf")
    if not 0 < number < most:
        expected = "between 0 and 1" if name == "rate" else "positive"
        raise UserError(f"{path}, point {place}: {name} is {given}; it must be {expected}")
    return number


def subjects(at: Points, asked: dict[str, Any]) -> list[Points]:
    """What is foretold: every pruned model of the points at its last tokens, with what was asked in its place."""
    import numpy as np

    from tprune.core.recovery_law import Points, at_place, curves

    found: dict[tuple[float, ...], Points] = {}
    scale = {"parameters": ("size", BILLION), "rate": ("rate", 1.0), "dense_loss": ("dense", 1.0)}
    changed = {
        name: np.array([asked[key] / unit]) for key, (name, unit) in scale.items() if asked[key] is not None
    }
    for curve in curves(at):
        one = at_place(at, int(curve[-1]))
        one = Points(
            **{name: changed.get(name, getattr(one, name)) for name in ("size", "tokens", "rate", "dense")}
        )
        found.setdefault((one.size.item(), one.rate.item(), one.dense.item()), one)
    return list(found.values())


def foretold(law: Law, one: Points, tokens: list[float], asked: dict[str, Any]) -> dict[str, Any]:
    """What the law says of one pruned model; its tokens are the most that were measured."""
    from dataclasses import replace

    import numpy as np

    measured = one.tokens.item()
    after = [count / BILLION for count in tokens] or [measured, 2 * measured, 10 * measured]
    losses = {count: law.loss(replace(one, tokens=np.array([count]))).item() for count in after}
    said: dict[str, Any] = {
        "parameters": one.size.item() * BILLION,
        "rate": one.rate.item(),
        "dense_loss": one.dense.item(),
        "losses": [{"tokens": count * BILLION, "loss": loss} for count, loss in losses.items()],
        "best_loss": law.best(one).item(),
        "enough_tokens": law.tokens_until_doubling_gains(asked["gain"], one).item() * BILLION,
    }
    if asked["target_loss"] is not None:
        need = law.tokens_for(asked["target_loss"], one).item()
        said["target_loss"] = asked["target_loss"]
        said["target_tokens"] = need * BILLION if np.isfinite(need) else None
    return said


def show(found: dict[str, Any]) -> None:
    """Two tables: the law, and what it foretells."""
    from tprune.evaluate.table import engineering, make_console, new_table

    console = make_console()
    console.print(
        "L = L0 + rate^-γ · N^-δ · (N_C · N^-α + D_C · D^-β + E), N and D in billions", highlight=False
    )
    names = {"n_c": "N_C", "d_c": "D_C", "e": "E", "alpha": "α", "beta": "β", "gamma": "γ", "delta": "δ"}
    told = "  ".join(f"{names[name]} {found['law'][name]:.4g}" for name in found["free"])
    bound = [names[name] for name in names if name not in found["free"]]
    console.print(
        told + (f"  ({', '.join(bound)}: the points do not tell, 0)" if bound else ""), highlight=False
    )
    fit = found["fit"]
    r2 = f"R² {fit['r2']:.4f}, " if "r2" in fit else ""
    console.print(f"{found['points']} points: {r2}mean error {fit['error']:.4f}\n", highlight=False)
    head = [f"after {engineering(one['tokens'])}" for one in found["foretold"][0]["losses"]]
    if len({one["losses"][0]["tokens"] for one in found["foretold"]}) > 1:
        head = ["as measured", "2 times that", "10 times that"]
    target = "target_loss" in found["foretold"][0]
    table = new_table(
        console,
        None,
        "parameters",
        "rate",
        "dense",
        *head,
        "at best",
        "tokens enough",
        *["to target"] * target,
    )
    for one in found["foretold"]:
        need = [engineering(one["target_tokens"]) if one["target_tokens"] else "never"] if target else []
        table.add_row(
            engineering(one["parameters"]),
            f"{one['rate']:.3g}",
            f"{one['dense_loss']:.4f}",
            *(f"{part['loss']:.4f}" for part in one["losses"]),
            f"{one['best_loss']:.4f}",
            engineering(one["enough_tokens"]),
            *need,
        )
    console.print(table)
