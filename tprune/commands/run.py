"""`tprune run`: a recipe from start to end."""

from dataclasses import replace
from typing import Any

import click

from tprune.commands.common import launch, output_options
from tprune.recipe import read


@click.command("run")
@click.argument("recipe")
@click.option("--model", help="Prune this model instead of the recipe's.")
@click.option("--data", metavar="SOURCE", help="Use this data instead of the recipe's.")
@click.option("--limit", type=click.IntRange(1), help="Evaluate on at most this many samples.")
@click.option("--device", help="Run here instead of on the recipe's device.")
@output_options
def command(recipe: str, model: str | None, **options: Any) -> None:
    """Run RECIPE, a YAML file as `--out` folders and the folder recipes/ hold them."""
    asked = read(recipe)
    if model is not None:
        asked = replace(asked, model=replace(asked.model, name=model, sha256=None))
    for name in ("data", "limit", "device"):
        value = options.pop(name)
        if value is not None:
            asked = replace(asked, **{name: value})
    launch(asked, **options)
