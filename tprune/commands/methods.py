"""`tprune methods`: what there is, read from the sources without importing them."""

import dataclasses
import json

import click

from tprune.errors import UserError
from tprune.methods import registry


@click.command("methods")
@click.argument("family", required=False)
@click.argument("id", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(family: str | None, id: str | None, as_json: bool) -> None:
    """List the methods of all families or of FAMILY, or say all about the one called ID."""
    if family is not None and family not in registry.FAMILIES and id is None:
        family, id = None, family
    if id is not None:
        entry = registry.ask(id, family)
        click.echo(json.dumps(dataclasses.asdict(entry))) if as_json else detail(entry)
        return
    found = registry.entries(family)
    if not found:
        raise UserError(f"no methods in {family}")
    if as_json:
        click.echo(json.dumps({"methods": [dataclasses.asdict(entry) for entry in found]}))
        return
    rows = [
        (entry.family, entry.id, entry.kind, str(entry.paper.year), entry.paper.checked, entry.paper.title)
        for entry in found
    ]
    columns(("family", "id", "kind", "year", "checked", "paper"), rows)


def columns(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """An aligned table; the last column is not padded."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head) - 1)]
    for row in [head, *rows]:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        click.echo("  ".join([*cells, row[-1]]))


def detail(fact: registry.Facts | registry.Answer) -> None:
    """Everything about one method, or about a paper that is none."""
    paper = fact.paper
    click.echo(f"{fact.family}/{fact.id}: {fact.summary}")
    click.echo(f"  paper    {paper.title} ({paper.venue}, {paper.year})")
    for label, value in (("arXiv", paper.arxiv), ("code", paper.code), ("notes", paper.notes)):
        if value:
            click.echo(f"  {label:<8} {value}")
    click.echo(f"  kind     {fact.kind}")
    if isinstance(fact, registry.Answer):
        click.echo(f"  why      {fact.why}")
        click.echo(f"  use      {fact.piece}")
        return
    click.echo(f"  checked  {CHECKED[paper.checked]}")
    if fact.learns in LEARNS:
        click.echo(f"  learns   {LEARNS[fact.learns]}")
    click.echo(f"  file     {fact.module.replace('.', '/')}.py")
    if not fact.parameters:
        click.echo("  no hyperparameters")
        return
    click.echo("  hyperparameters (--set NAME=VALUE):")
    rows = [(f"    {p.name}", str(p.default), p.type, p.help) for p in fact.parameters]
    columns(("    name", "default", "type", "what it is"), rows)
    if fact.built_in:
        told = " ".join(f"{name}={value}" for name, value in fact.built_in.items())
        click.echo(f"  with --fit built-in: {told}")


LEARNS = {"required": "must be fitted: --fit DATA", "optional": "may be fitted: --fit DATA"}

CHECKED = {
    "code": "golden values from the authors' code",
    "port": "golden values from a public re-implementation",
    "paper": "against the paper's formulas",
    "abstract": "a reconstruction of what the abstract commits to",
}
