"""What the family commands share: the options, spelled the same everywhere, and the run from options to table."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import click

from tprune.errors import UserError
from tprune.recipe import UNREAD, ModelSource, Recipe, Stage, check_budget

FAMILY_DEFAULTS = {
    "vit": "digits-vit",
    "vlm": "digits-llava",
    "llm-context": "smollm2-135m",
    "llm-weights": "smollm2-135m",
}
"""The built-in model of every family."""
ENCODER_DEFAULT = "minilm-topics"
"""That of methods which work in text encoders alone."""
STAGE_OPTIONS = (
    "keep",
    "sparsity",
    "pattern",
    "positions",
    "loadable",
    "fit",
    "allocate",
    "recover",
    "recover_data",
)
"""The options that belong to a stage of the recipe, by their names there."""

OUTPUT_OPTIONS = (
    "out",
    "force",
    "by_reference",
    "no_eval",
    "dry_run",
    "as_json",
    "quiet",
    "max_minutes",
    "export",
)
"""The options of `launch`."""


def model_options(command: Callable) -> Callable:
    """Where the model runs and what feeds it."""
    for option in reversed(
        (
            click.option("--data", metavar="SOURCE", help="Evaluation and calibration data [built-in]."),
            click.option("--limit", type=click.IntRange(1), help="Evaluate on at most this many samples."),
            click.option(
                "--calibration", type=click.IntRange(1), help="Number of calibration sequences [method's]."
            ),
            click.option("--length", type=click.IntRange(2), help="Tokens per text sequence [family's]."),
            click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True),
            click.option("--device", default="cpu", show_default=True),
            click.option("--dtype", default="float32", show_default=True),
            click.option("--seed", type=int, default=0, show_default=True),
            click.option("--revision", help="Revision of a hub model."),
            click.option("--weights", metavar="FILE", help="A .safetensors file for the named model."),
            click.option(
                "--random-weights", is_flag=True, help="Initialise from the seed, download nothing."
            ),
        )
    ):
        command = option(command)
    return command


def output_options(command: Callable) -> Callable:
    """What becomes of the result."""
    for option in reversed(
        (
            click.option("--out", metavar="DIR", help="Write the pruned model here."),
            click.option("--force", is_flag=True, help="Replace an existing --out folder."),
            click.option(
                "--by-reference", is_flag=True, help="Name the base weights instead of copying them."
            ),
            click.option("--no-eval", is_flag=True, help="Measure cost only, not quality."),
            click.option("--dry-run", is_flag=True, help="Say what would happen and stop."),
            click.option("--json", "as_json", is_flag=True, help="Print one JSON object."),
            click.option("--quiet", is_flag=True, help="Print no progress."),
        )
    ):
        command = option(command)
    return command


def family_command(family: str, help: str) -> click.Command:
    """The command of a family."""
    weights = family == "llm-weights"

    @click.command(family, help=help)
    @click.option("--method", required=True, metavar="ID", help=f"See: tprune methods {family}")
    @click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="A hyperparameter.")
    @click.argument("model", required=False)
    @model_options
    @output_options
    def command(method: str, settings: tuple[str, ...], model: str | None, **options: Any) -> None:
        if model is None:
            model = default_model(family, method)
            if not options["quiet"] and not options["as_json"]:
                click.echo(f"no model given: using the built-in {model}", err=True)
        budget = {name: options.pop(name) for name in STAGE_OPTIONS if name in options}
        budget = {name: value for name, value in budget.items() if value is not None}
        stage = Stage(family, method, set=parse_settings(settings), **budget)
        output = {name: options.pop(name) for name in OUTPUT_OPTIONS if name in options}
        source = ModelSource(
            model, options.pop("revision"), options.pop("weights"), options.pop("random_weights")
        )
        launch(Recipe(source, (stage,), **options), **output)

    if weights:
        extra = (
            click.option("--sparsity", type=float, metavar="S", help="Fraction of weights removed."),
            click.option("--pattern", metavar="N:M", help="N weights kept of every M."),
            click.option(
                "--allocate",
                default="uniform",
                metavar="RULE",
                help="How it is shared out: uniform, global, block, owl[:factor=5,spread=0.08], erk, tamp-das.",
            ),
            click.option("--loadable", default="any", help="'plain': only shapes that stock loaders read."),
            click.option(
                "--max-minutes",
                type=click.FloatRange(0),
                metavar="N",
                help="Stop a search after so long; the same command goes on (needs --out).",
            ),
            click.option(
                "--recover",
                metavar="HOW",
                help="Train what is left: lora[:rank=8,epochs=1,lr=1e-4,batch=8] or full[:…].",
            ),
            click.option(
                "--export",
                metavar="FORM",
                help="'sparse24': measure 2:4 weights on sparse tensor cores (needs --device cuda).",
            ),
            click.option(
                "--max-memory",
                metavar="SIZE",
                help="Read the model block by block and keep to so much, such as 8GB (needs --out).",
            ),
            click.option(
                "--recover-data", metavar="SOURCE", help="Text for it [the calibration part of --data]."
            ),
        )
    else:
        extra = (
            click.option("--keep", type=float, metavar="R", help="Fraction of tokens or entries kept."),
            click.option(
                "--positions", help="'original' or 'compact' position ids, for vlm also 'gap' [paper's]."
            ),
        )
    extra += (
        click.option(
            "--fit", metavar="DATA", help="Train a method that learns: 'built-in', a folder, or text."
        ),
    )
    found = functools.reduce(lambda made, option: option(made), reversed(extra), command)
    found.params = [option for option in found.params if option.name not in UNREAD.get(family, {})]
    return found


def default_model(family: str, *methods: str) -> str:
    """The built-in model that methods run on where none is named."""
    from tprune.methods import registry

    inside = all(registry.load(method, family).runs_on == ("encoder",) for method in methods)
    return ENCODER_DEFAULT if inside else FAMILY_DEFAULTS[family]


def parse_settings(settings: tuple[str, ...]) -> dict[str, Any]:
    """The --set options, values as YAML scalars.

    Raises:
        UserError: not of the form NAME=VALUE.
    """
    import yaml

    parsed = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name:
            raise UserError(f"--set {setting}: expected NAME=VALUE")
        read = yaml.safe_load(value)
        parsed[name] = value if isinstance(read, dict | list) or read is None else read
    return parsed


def launch(
    recipe: Recipe,
    *,
    out: str | None,
    force: bool,
    by_reference: bool,
    no_eval: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    max_minutes: float | None = None,
    export: str | None = None,
) -> None:
    """Run a recipe and print its report: a table for people, or one JSON object."""
    from tprune.progress import Progress

    for stage in recipe.stages:
        check_budget(stage)
    if max_minutes is not None and out is None:
        raise UserError(
            f"--max-minutes {max_minutes:g}: what a search found is kept beside --out DIR; give one"
        )
    recipe = with_absolute_paths(recipe)
    if dry_run:
        show_plan(recipe, out, force, as_json)
        return
    from tprune.pipelines.run import assist, execute

    if int(os.environ.get("RANK", "0")) > 0:
        # Started beside the first process by `accelerate launch` or `torchrun`: that one writes and prints.
        assist(recipe)
        return
    report = execute(
        recipe,
        Progress(quiet or as_json),
        out=out,
        force=force,
        by_reference=by_reference,
        evaluate=not no_eval,
        max_minutes=max_minutes,
        export=export,
    )
    show_report(report, as_json)


def check_file(out: str | None, force: bool, option: str = "--out") -> None:
    """Refuse an output file that cannot be written, or exists and may not be replaced, before anything is measured."""
    if out is None:
        return
    if os.path.exists(out) and not force:
        raise UserError(f"{option} {out} exists; give another file, or --force to replace it")
    if os.path.isdir(out):
        raise UserError(f"{option} {out} is a folder; give a file")
    folder = os.path.dirname(os.path.abspath(out))
    if not os.access(folder, os.W_OK):
        raise UserError(f"{option} {out}: there is no folder {folder} to write in")


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """The recipe with the files and folders it names made absolute, so that it runs from anywhere."""

    def absolute(path: str | None) -> str | None:
        return os.path.abspath(path) if path and os.path.exists(path) else path

    model = replace(recipe.model, name=absolute(recipe.model.name), weights=absolute(recipe.model.weights))
    stages = tuple(
        replace(
            stage,
            fit=stage.fit if stage.fit == "built-in" else absolute(stage.fit),
            recover_data=absolute(stage.recover_data),
        )
        for stage in recipe.stages
    )
    return replace(recipe, model=model, data=absolute(recipe.data), stages=stages)


def show_plan(recipe: Recipe, out: str | None, force: bool, as_json: bool) -> None:
    """What would happen, with everything checked that can be without loading a model."""
    from tprune import artifact
    from tprune.methods import registry
    from tprune.models.source import resolve

    if out is not None:
        artifact.check_free(out, force)
    steps = []
    for stage in recipe.stages:
        method = registry.build(stage.method, stage.family, stage.set, stage.fit)
        method.check_fit(stage.fit)
        source = resolve(recipe.model, stage.family)
        steps.append(
            {
                "family": stage.family,
                "method": stage.method,
                "params": method.settings(),
                "budget": stage.pattern or (stage.sparsity if stage.family == "llm-weights" else stage.keep),
                "model": source.name,
                "from": source.location if source.kind == "folder" else f"{source.kind} {source.location}",
                "fit": stage.fit,
                "data": recipe.data or "built-in",
                "out": out,
            }
        )
    if as_json:
        click.echo(json.dumps(steps[0] if len(steps) == 1 else steps))
        return
    for step in steps:
        click.echo(f"would prune {step['model']} ({step['from']})")
        click.echo(f"  with {step['family']} {step['method']} {step['params']}, budget {step['budget']}")
        if step["fit"]:
            click.echo(f"  fit on {step['fit']} data")
        click.echo(f"  measure on {step['data']} data, and write {out or 'nothing'}")


def show_report(report: dict[str, Any], as_json: bool) -> None:
    """The report on stdout."""
    if as_json:
        click.echo(json.dumps(report))
        return
    from tprune.evaluate.table import print_report

    print_report(report)
