"""`tprune zoo`: the built-in models and the command that trains them again."""

import json
import os
from pathlib import Path

import click

from tprune import artifact, zoo


@click.group("zoo")
def command() -> None:
    """List and train the built-in models."""


@command.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def list_models(as_json: bool) -> None:
    """The built-in models, where they are and how well they do on their evaluation samples."""
    found = [{"name": name, "path": str(zoo.path(name)), **zoo.facts(name)} for name in zoo.NAMES]
    if as_json:
        click.echo(json.dumps({"models": found}))
        return
    for model in found:
        click.echo(f"{model['name']}: {zoo.DESCRIPTIONS[model['name']]}")
        unit = "scenes" if "scenes" in model else "passages"
        click.echo(f"  accuracy {model['accuracy']:.1%} on {model[unit]} {unit}")
        for kind, accuracy in model.get("accuracy_by_kind", {}).items():
            click.echo(f"    {kind:<6} {accuracy:.1%}")
        click.echo(f"  {model['path']}")


@command.command("train")
@click.argument("name", type=click.Choice(zoo.NAMES))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write the model to.")
@click.option(
    "--steps", type=click.IntRange(1), help="Steps in all; the default is what the shipped weights had."
)
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of weights and samples."
)
@click.option(
    "--workers", type=click.IntRange(1), help="Processes that share each step; the default is one a core."
)
@click.option("--scenes", type=click.IntRange(1), default=2000, show_default=True, help="Evaluation samples.")
@click.option("--force", is_flag=True, help="Replace an existing folder.")
def train_model(
    name: str, out: Path, steps: int | None, seed: int, workers: int | None, scenes: int, force: bool
) -> None:
    """Train a built-in model again. A run that was interrupted goes on from its last checkpoint.

    \b
      tprune zoo train digits-vit --out my-vit
      tprune zoo train digits-llava --out my-llava --steps 200
    """
    artifact.check_free(out, force)
    from tprune.zoo.train import train

    workers = workers or min(2, len(os.sched_getaffinity(0)))
    facts = train(name, out.absolute(), steps, seed, workers, scenes)
    click.echo(json.dumps(facts, indent=2))
    click.echo(f"wrote {out}")
