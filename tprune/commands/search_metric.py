"""`tprune search-metric`: a genetic programme that looks for the metric to prune a language model's weights by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tprune.commands.common import FAMILY_DEFAULTS, check_file, model_options, with_absolute_paths
from tprune.errors import UserError
from tprune.recipe import ModelSource, Recipe, Stage, check_budget

if TYPE_CHECKING:
    from tprune.pipelines.metric import MetricSearch

FAMILY = "llm-weights"
SHOWN = 5
"""The best metrics in the table."""


@click.command("search-metric")
@click.argument("model", default=FAMILY_DEFAULTS[FAMILY])
@click.option("--sparsity", type=float, metavar="S", help="Fraction of weights removed.")
@click.option("--pattern", metavar="N:M", help="N weights kept of every M.")
@click.option("--evaluations", type=click.IntRange(1), default=200, show_default=True, help="Metrics tried.")
@click.option("--population", type=click.IntRange(2), default=40, show_default=True, help="Metrics alive.")
@click.option(
    "--largest", type=click.IntRange(2), default=15, show_default=True, help="Nodes of a metric at most."
)
@model_options
@click.option(
    "--out", metavar="FILE", help="Write the recipe of the best here, and all tried beside it: *.tried.jsonl."
)
@click.option("--force", is_flag=True, help="Replace an existing --out file.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--quiet", is_flag=True, help="Print no progress.")
def command(
    model: str,
    evaluations: int,
    population: int,
    largest: int,
    out: str | None,
    force: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Evolve a metric over weights, gradients and inputs for MODEL, as Pruner-Zero did.

    \b
      tprune search-metric smollm2-135m --sparsity 0.5 --out best.yaml

    A metric is worth the perplexity of the model pruned by it, on text of the calibration part of --data (--limit
    windows, 8 by default); the published one is measured first. With --out an interrupted search goes on where it
    stopped.
    """
    check_file(out, force)
    recipe = planned(model, options)
    from tprune.core.evolve import Evolution
    from tprune.methods.llm_weights.pruner_zero import LEAVES
    from tprune.pipelines.metric import MetricSearch, Tried
    from tprune.progress import Progress

    progress = Progress(quiet or as_json)
    file = None if out is None else Path(f"{out}.tried.jsonl")
    search = MetricSearch(recipe, Tried(file, recipe), progress)
    evolution = Evolution(LEAVES, population, largest=largest)
    found = {search.driver.method.metric: search.published}
    for place, (metric, perplexity) in enumerate(search.run(evolution, evaluations), start=1):
        found[metric] = perplexity
        progress.say(f"[{place}/{evaluations}] {perplexity:.2f}  {metric}")
    best = min(found, key=found.get)
    if found[best] == float("inf"):
        raise UserError("no metric could be used on this model, not even the published one")
    winner = search.winner(best).to_yaml()
    if out is not None:
        Path(out).write_text(
            f"# found by tprune search-metric among {len(found)}\n{winner}", encoding="utf-8"
        )
    if as_json:
        report(search, found, best, winner, out)
        return
    show(search, found)
    click.echo(f"\n{winner}", nl=False)
    if out is not None:
        click.echo(f"written: {out}  (tprune run {out})")


def planned(model: str, options: dict[str, Any]) -> Recipe:
    """The recipe of the published metric, whose budget and data the others share.

    Raises:
        UserError: no budget, or one that means nothing.
    """
    take = options.pop
    source = ModelSource(model, take("revision"), take("weights"), take("random_weights"))
    stage = Stage(FAMILY, "pruner-zero", sparsity=take("sparsity"), pattern=take("pattern"))
    if stage.sparsity is None and stage.pattern is None:
        raise UserError("search-metric needs a budget: give --sparsity S (such as 0.5) or --pattern N:M")
    check_budget(stage)
    return with_absolute_paths(Recipe(source, (stage,), **options))


def report(search: MetricSearch, found: dict[str, float], best: str, recipe: str, out: str | None) -> None:
    """One JSON object."""
    from tprune.artifact import finite

    tried = [{"metric": metric, "perplexity": perplexity} for metric, perplexity in found.items()]
    result = {
        "winner": {"metric": best, "perplexity": found[best]},
        "dense": search.dense,
        "published": search.published,
        "tried": tried,
        "recipe": recipe,
        "out": out,
    }
    click.echo(json.dumps(finite(result)))


def show(search: MetricSearch, found: dict[str, float]) -> None:
    """The best metrics beside the dense model; the published one is always there."""
    from tprune.evaluate.table import make_console, new_table

    console = make_console()
    table = new_table(console, None, "perplexity", "metric")
    table.columns[-1].justify = "left"
    table.add_row(f"{search.dense:.2f}", "dense")
    published = search.driver.method.metric
    best = sorted(found, key=found.get)[:SHOWN]
    for metric in best if published in best else [*best, published]:
        table.add_row(f"{found[metric]:.2f}", metric + (" (published)" if metric == published else ""))
    console.print(table)
