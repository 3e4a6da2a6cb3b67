"""`tprune show`: what an output folder holds."""

import json
from pathlib import Path

import click

from tprune import artifact
from tprune.recipe import read


@click.command("show")
@click.argument("folder")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(folder: str, as_json: bool) -> None:
    """Say what the output FOLDER holds: method, budget, figures, files, how to load it."""
    report, recipe = artifact.read_report(folder), read(Path(folder) / artifact.RECIPE)
    files = {file.name: file.stat().st_size for file in sorted(Path(folder).iterdir()) if file.is_file()}
    if as_json:
        click.echo(json.dumps({**report, "out": str(folder), "files": files}))
        return
    from tprune.evaluate.table import print_report

    print_report({**report, "out": str(folder)})
    click.echo("\nfiles")
    for name, size in files.items():
        click.echo(f"  {name:<32} {size / 1e6:10.3f} MB")
    click.echo("\nrecipe")
    click.echo("".join(f"  {line}\n" for line in recipe.to_yaml().splitlines()), nl=False)
