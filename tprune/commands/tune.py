"""`tprune tune`: the hyperparameters with which a method does best at a fixed budget, and the recipe that has them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tprune.commands.common import (
    FAMILY_DEFAULTS,
    check_file,
    default_model,
    model_options,
    parse_settings,
    with_absolute_paths,
)
from tprune.errors import UserError
from tprune.recipe import ModelSource, Recipe, Stage, check_budget, check_read

if TYPE_CHECKING:
    from tprune.pipelines.tune import Tried, Tune

SHOWN = 5
"""The best settings in the table."""


@click.command("tune")
@click.argument("family", type=click.Choice(list(FAMILY_DEFAULTS)))
@click.argument("model", required=False)
@click.option("--method", required=True, metavar="ID", help="See: tprune methods FAMILY")
@click.option("--keep", type=float, metavar="R", help="Fraction of tokens or entries kept.")
@click.option("--sparsity", type=float, metavar="S", help="Fraction of weights removed.")
@click.option("--pattern", metavar="N:M", help="N weights kept of every M.")
@click.option(
    "--set", "settings", multiple=True, metavar="NAME=LO:HI", help="A range, or a value; lists have commas."
)
@click.option("--trials", type=click.IntRange(2), default=40, show_default=True, help="Settings tried.")
@model_options
@click.option("--out", metavar="FILE", help="Write the best recipe here.")
@click.option("--force", is_flag=True, help="Replace an existing --out file.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--quiet", is_flag=True, help="Print no progress.")
def command(
    family: str,
    model: str | None,
    settings: tuple[str, ...],
    trials: int,
    out: str | None,
    force: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Find the hyperparameters with which a method of FAMILY does best on MODEL at one budget.

    \b
      tprune tune vlm --method vflowopt --keep 0.25 --set vision=0.2:0.5 --set decoder=0.5:1,0.3:1 \\
        --set hubs=0:50 --set cell=3:24 --limit 100 --out best.yaml

    What counts is the accuracy or perplexity on --limit samples: take others to report it.
    """
    check_read([family], options)
    check_file(out, force)
    # As everywhere, the last of a name counts.
    given = {named(text): text for text in settings}
    ranges = {name: read for name, text in given.items() if (read := ranged(text)) is not None}
    recipe = planned(family, model or default_model(family, options["method"]), given, ranges, options)
    from tprune.pipelines.grid import shared_method
    from tprune.pipelines.trials import Trials
    from tprune.pipelines.tune import Space, Tune
    from tprune.progress import Progress

    method, progress = recipe.stage.method, Progress(quiet or as_json)
    space = Space.of(family, method, ranges)
    base = replace(recipe, stages=(Stage(family, shared_method(family, [method])),))
    tune, found = Tune(Trials(base, progress), recipe, space), []
    for place, one in enumerate(tune.run(trials)):
        found.append(one)
        progress.say(f"[{place}/{trials}] {words(one)}: {one.reason or f'{one.figures[tune.metric]:.4g}'}")
    best = min(found, key=lambda one: one.loss)
    if not math.isfinite(best.loss):
        raise UserError(f"none of these settings can be used: {best.reason}")
    text = tune.with_settings(best.settings).to_yaml()
    if out is not None:
        Path(out).write_text(f"# found by tprune tune among {len(found)}\n{text}", encoding="utf-8")
    if as_json:
        from tprune.artifact import finite

        tried = [vars(one) for one in found]
        result = {"best": vars(best), "dense": tune.dense, "tried": tried, "recipe": text, "out": out}
        click.echo(json.dumps(finite(result)))
        return
    show(tune, found)
    click.echo(f"\n{text}", nl=False)
    if out is not None:
        click.echo(f"written: {out}  (tprune run {out})")


def named(text: str) -> str:
    """The hyperparameter of NAME=VALUE."""
    return text.partition("=")[0].replace("-", "_")


def ranged(text: str) -> list[tuple[float, float]] | None:
    """The ranges of NAME=LO:HI,LO:HI,VALUE; None where it has none.

    Raises:
        UserError: no name, not numbers, or the wrong way round.
    """
    parts = [part.split(":") for part in text.partition("=")[2].split(",")]
    if all(len(part) == 1 for part in parts):
        return None
    try:
        found = [(float(part[0]), float(part[-1])) for part in parts if len(part) <= 2]
    except ValueError:
        found = []
    bounded = all(-math.inf < low <= high < math.inf for low, high in found)
    if len(found) != len(parts) or not bounded or not named(text):
        raise UserError(f"--set {text}: expected NAME=LO:HI with numbers, the smaller first")
    return found


def planned(
    family: str,
    model: str,
    settings: dict[str, str],
    ranges: dict[str, list[tuple[float, float]]],
    options: dict[str, Any],
) -> Recipe:
    """The recipe with the settings that stand, those of `settings` (NAME=VALUE by name) without `ranges`.

    Raises:
        UserError: nothing to look for, or no budget.
    """
    take = options.pop
    fixed = parse_settings(tuple(text for name, text in settings.items() if name not in ranges))
    source = ModelSource(model, take("revision"), take("weights"), take("random_weights"))
    budget = {name: take(name) for name in ("keep", "sparsity", "pattern")}
    stage = Stage(family, take("method"), set=fixed, **budget)
    if not any(low < high for own in ranges.values() for low, high in own):
        raise UserError("nothing to look for: give a range, --set NAME=LO:HI")
    if all(value is None for value in budget.values()):
        raise UserError("tune compares at one budget: give --keep R, --sparsity S or --pattern N:M")
    check_budget(stage)
    return with_absolute_paths(Recipe(source, (stage,), **options))


def words(one: Tried) -> str:
    """The settings in a line."""
    parts = {
        name: ",".join(f"{part:g}" for part in (value if isinstance(value, list) else [value]))
        for name, value in one.settings.items()
    }
    return " ".join(f"{name}={value}" for name, value in parts.items()) or "as it is"


def show(tune: Tune, found: list[Tried]) -> None:
    """The best settings, and the method as it is, beside the dense model."""
    from tprune.evaluate.table import make_console, new_table, percent, quality

    console = make_console()
    table = new_table(console, None, tune.metric, "agreement", "settings")
    table.columns[-1].justify = "left"
    table.add_row(quality(tune.metric, tune.dense[tune.metric]), percent(1.0), "dense")
    good = {words(one): one for one in found if not one.reason}
    best = sorted(good.values(), key=lambda one: one.loss)[:SHOWN]
    for one in best if found[0] in best or found[0].reason else [*best, found[0]]:
        figures = one.figures
        table.add_row(quality(tune.metric, figures[tune.metric]), percent(figures["agreement"]), words(one))
    console.print(table)
