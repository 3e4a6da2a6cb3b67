"""`tprune sweep`: many methods at many budgets under one protocol: a table, plots, and a page to look at."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import click

from tprune.commands.common import (
    FAMILY_DEFAULTS,
    default_model,
    model_options,
    parse_settings,
    with_absolute_paths,
)
from tprune.errors import UserError
from tprune.recipe import ModelSource, Recipe, Stage, check_read


@click.command("sweep")
@click.argument("family", type=click.Choice(list(FAMILY_DEFAULTS)))
@click.argument("model", required=False)
@click.option("--method", "methods", metavar="ID[,ID…]|all", help="Which methods; random is always one.")
@click.option("--keep", metavar="R[,R…]", help="Fractions of tokens or entries kept.")
@click.option("--sparsity", metavar="S[,S…]", help="Fractions of weights removed.")
@click.option("--pattern", metavar="N:M[,N:M…]", help="N weights kept of every M.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="For the methods that have it.")
@click.option("--grid", "grid_file", metavar="FILE", help="Methods, settings and budgets from a YAML file.")
@click.option("--fit", metavar="DATA", help="Train the methods that learn first: 'built-in', or a folder.")
@click.option("--positions", help="'original' or 'compact' position ids, for vlm also 'gap' [paper's].")
@click.option("--loadable", default="any", help="'plain': only shapes that stock loaders read.")
@click.option("--seeds", type=click.IntRange(1), default=1, show_default=True, help="Of methods that draw.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Timed calls of each.")
@click.option("--no-latency", is_flag=True, help="Time nothing: quicker, and independent of the machine.")
@click.option(
    "--sample", type=click.IntRange(0), default=0, show_default=True, help="Draw what is kept of it."
)
@click.option("--no-pictures", is_flag=True, help="Draw nothing but the plots.")
@model_options
@click.option(
    "--out", required=True, metavar="DIR", help="Points, table, plots, page; goes on if it is there."
)
@click.option("--force", is_flag=True, help="Measure again what is already measured.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--quiet", is_flag=True, help="Print no progress.")
def command(
    family: str,
    model: str | None,
    out: str,
    seeds: int,
    rounds: int,
    no_latency: bool,
    sample: int,
    no_pictures: bool,
    force: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Measure FAMILY's methods on MODEL at every budget; write table, plots and report.html.

    \b
      tprune sweep vit --method all --keep 0.9,0.7,0.5,0.3 digits-vit --out sweeps/vit
      tprune sweep llm-weights --method all --sparsity 0.3,0.5 --pattern 2:4 --out sweeps/weights

    A point is written as soon as it is measured: a sweep that was stopped goes on, and another one with more
    methods or budgets and the same --out adds its points.
    """
    check_read([family], options)
    base, plan = planned(family, model, seeds, options)
    from tprune.evaluate import points
    from tprune.evaluate.page import write
    from tprune.pipelines.base import Sample
    from tprune.pipelines.sweep import Store, Sweep
    from tprune.pipelines.trials import Trials
    from tprune.progress import Progress

    progress = Progress(quiet or as_json)
    store = Store(Path(out))
    shown = None if no_pictures else Sample(sample)
    sweep = Sweep(Trials(base, progress), store, 0 if no_latency else rounds, shown, progress)
    mine = sweep.run(plan, again=force)
    found = points.groups(store.all(), first=sweep.trials.protocol)
    files = write(Path(out), found)
    status = Counter(point["status"] for point in mine)
    if as_json:
        click.echo(
            json.dumps({"out": out, "status": status, "points": points.as_rows(found), "files": files})
        )
    else:
        from tprune.evaluate.table import print_sweep

        print_sweep(found[0])
        tell(out, found, files)
    if status["failed"]:
        for point in mine:
            if point["status"] == "failed":
                click.echo(f"failed: {point['method']} {point['asked']}: {point['reason']}", err=True)
        sys.exit(1)


def planned(
    family: str, model: str | None, seeds: int, options: dict[str, Any]
) -> tuple[Recipe, list[Recipe]]:
    """The recipe that all points share, with the floor as its method or the first where there is none, and the recipe
    of every point; without a model those of the built-in one that the methods run on.

    Raises:
        UserError: an unknown method or hyperparameter, a malformed budget, nothing to do.
    """
    from tprune.pipelines import grid

    take = options.pop
    methods, file, settings = take("methods"), take("grid_file"), parse_settings(take("settings"))
    fit = take("fit")
    budgets = grid.budgets(**{name: take(name) for name in grid.BUDGETS})
    chosen = grid.read(file, family) if file else []
    if methods:
        chosen += grid.choose(family, methods.split(","), settings, budgets)
    elif settings or budgets != [{}]:
        raise UserError("budgets and --set are for the methods of --method; a --grid file has its own")
    if not chosen:
        raise UserError("no methods: give --method ID[,ID…], --method all, or --grid FILE")
    names = [one.method for one in chosen]
    source = ModelSource(
        model or default_model(family, *names), take("revision"), take("weights"), take("random_weights")
    )
    if seeds > 1 and source.random_weights:
        raise UserError(f"--seeds {seeds} with --random-weights: the seed makes the model; give one --seed")
    floored = grid.has_floor(family, names)
    stage = Stage(
        family, grid.shared_method(family, names), positions=take("positions"), loadable=take("loadable")
    )
    base = with_absolute_paths(Recipe(source, (stage,), **options))
    return base, grid.recipes(base, grid.with_floor(chosen) if floored else chosen, seeds, fit)


def tell(out: str, found: list[Any], files: list[str]) -> None:
    """Where everything is, and what else the folder holds."""
    if len(found) > 1:
        rest = sum(len(group.rows) for group in found[1:])
        click.echo(
            f"{rest} rows in this folder were measured under other protocols: they are in the files, "
            "each protocol in a plot of its own"
        )
    click.echo(f"written: {out}/report.html, {', '.join(sorted(set(files) - {'report.html'}))}")
