"""`tprune eval`: measure an output folder or a model again, from disk."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from tprune import artifact
from tprune.commands.common import FAMILY_DEFAULTS, model_options
from tprune.errors import UserError
from tprune.recipe import ModelSource, Recipe, Stage, check_read, read


@click.command("eval")
@click.argument("model")
@click.option("--family", type=click.Choice(list(FAMILY_DEFAULTS)), help="How to measure a MODEL [guessed].")
@model_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--quiet", is_flag=True, help="Print no progress.")
@click.pass_context
def command(
    context: click.Context, model: str, family: str | None, as_json: bool, quiet: bool, **options: Any
) -> None:
    """Measure MODEL: an output folder of tprune, or any model that --family prunes."""
    from tprune.pipelines.load import open_artifact
    from tprune.pipelines.run import check_device, measure, pipeline
    from tprune.progress import Progress

    written = artifact.is_artifact(model)
    if written:
        refuse(
            model,
            {"family": family, **{name: options[name] for name in ("revision", "weights", "random_weights")}},
        )
        family = read(Path(model) / artifact.RECIPE).stages[-1].family
    elif family is None:
        family = guess_family(model)
    check_read([family], options)
    progress = Progress(quiet or as_json)
    source = ModelSource(
        model, options.pop("revision"), options.pop("weights"), options.pop("random_weights")
    )
    given = {
        name: value
        for name, value in options.items()
        if context.get_parameter_source(name) != click.core.ParameterSource.DEFAULT
    }
    if written:
        opened = open_artifact(model, progress, given.pop("device", None))
        driver, subject, found = opened.driver, opened.subject, artifact.read_report(model)
        driver.recipe = replace(driver.recipe, **given)
        driver.prepare(subject)
    else:
        recipe = Recipe(source, (Stage(family, "random"),), **options)
        check_device(recipe)
        driver = pipeline(recipe, recipe.stage, progress)
        subject, found = driver.load(), {}
        driver.prepare(subject)
    figures, _ = measure(driver, subject, None, True, progress, "given")
    del figures["agreement"]
    result = {"model": model, "family": driver.family, "measured": artifact.finite(figures)}
    if found:
        result |= {"method": found["method"], "recorded": found["pruned"]}
    if as_json:
        click.echo(json.dumps(result))
        return
    from tprune.evaluate.table import print_figures

    print_figures(result)


def refuse(folder: str, given: dict[str, Any]) -> None:
    """Refuse options that say which model, and how it is measured, for an output folder.

    Raises:
        UserError: naming the first.
    """
    for name, value in given.items():
        if value:
            said = f"--{name.replace('_', '-')}" + (f" {value}" if value is not True else "")
            raise UserError(f"{said}: {folder} is an output folder, which says it itself; leave it out")


def guess_family(model: str) -> str:
    """The family a built-in model belongs to; llm-weights (perplexity) for the rest of transformers, vit for timm's."""
    from tprune.models.source import resolve

    for family, name in FAMILY_DEFAULTS.items():
        if name == model and family != "llm-context":
            return family
    return "vit" if resolve(ModelSource(model), "vit").library == "timm" else "llm-weights"
