"""`tprune compare`: how two results differ; first what they were measured on, then what came out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from tprune import artifact
from tprune.errors import UserError
from tprune.evaluate.protocol import differing, incomparable


@click.command("compare")
@click.argument("one", metavar="A")
@click.argument("other", metavar="B")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(one: str, other: str, as_json: bool) -> None:
    """Compare A and B: output folders, their report.json, or points of a sweep (DIR/points/….json).

    What differs in the protocol is said first. Figures measured on different data are not comparable; times measured on
    different machines are not, either.
    """
    reports = [read(one), read(other)]
    differences = differing([report["protocol"] for report in reports])
    same = reports[0]["method"] == reports[1]["method"]
    asked = differing([choice(report, same) for report in reports])
    barred = incomparable(differences)
    if as_json:
        content = {
            "a": one,
            "b": other,
            "comparable": {kind: not fields for kind, fields in barred.items()},
            "not_comparable_for": barred,
            "protocol": differences,
            "asked": asked,
            "figures": figures(reports),
        }
        click.echo(json.dumps(artifact.finite(content)))
        return
    show(one, other, differences, asked, barred, figures(reports))


def read(path: str) -> dict[str, Any]:
    """The report in a folder or a file.

    Raises:
        UserError: nothing that tprune measured, or a point without figures.
    """
    place = Path(path)
    if place.is_dir():
        report = artifact.read_report(place)
    else:
        try:
            report = json.loads(place.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; give an output folder or a report") from None
        except ValueError:
            raise UserError(
                f"{path} is not JSON; give an output folder, a report.json or a sweep's point"
            ) from None
    if not isinstance(report, dict) or "method" not in report:
        raise UserError(f"{path} is no report; give an output folder, a report.json or a sweep's point")
    if report.get("status", "ok") != "ok":
        raise UserError(f"{path} has no figures: it is {report['status']} ({report['reason']})")
    if "protocol" not in report:
        raise UserError(f"{path} was written before reports held their protocol; run its recipe again")
    return report


def choice(report: dict[str, Any], settings: bool) -> dict[str, Any]:
    """What was done, in the terms of the command line; hyperparameters of two methods have nothing in common."""
    told = {"method": report["method"], "budget": report["budget"]["asked"]}
    return told | ({"set": report["params"]} if settings else {})


def figures(reports: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Every figure of the pruned models beside the other's, the dense ones where they are not the same."""
    rows: dict[str, list[Any]] = {"achieved": [report["budget"]["achieved"] for report in reports]}
    for side in ("dense", "pruned"):
        names = dict.fromkeys(name for report in reports for name in report[side])
        for name in names:
            values = [report[side].get(name) for report in reports]
            if any(isinstance(value, dict) for value in values):
                continue
            if side == "pruned" or values[0] != values[1]:
                rows[f"dense {name}" if side == "dense" else name] = values
    return rows


def show(
    one: str,
    other: str,
    differences: dict[str, list[Any]],
    asked: dict[str, list[Any]],
    barred: dict[str, list[str]],
    figures: dict[str, list[Any]],
) -> None:
    """The two tables, with what may be concluded between them."""
    from tprune.evaluate.table import FORMATS, make_console, new_table, ratio, shown

    console = make_console()
    console.print(f"A: {one}\nB: {other}\n", highlight=False)
    if differences:
        console.print("what differs in the protocol")
        table = new_table(console, None, "", "A", "B")
        for name, values in differences.items():
            table.add_row(name, *(str(value) for value in values))
        console.print(table)
    else:
        console.print("the protocols are equal in every field")
    for kind, fields in barred.items():
        if fields:
            console.print(f"[bold]not comparable[/bold] in {kind}: {', '.join(fields)} differ")
    console.print("\nwhat came out")
    table = new_table(console, None, "", "A", "B", "B to A")
    for name, values in asked.items():
        table.add_row(name, *(str(value) for value in values), "")
    for name, values in figures.items():
        bare = name.removeprefix("dense ")
        words = FORMATS[bare][0] if bare in FORMATS else bare.replace("_", " ")
        label = f"dense {words}" if name.startswith("dense ") else words
        kind = "speed" if bare.startswith(SPEED) else "quality"
        barrier = bool(barred[kind]) and bare not in ("flops", "achieved")
        told = "not comparable" if barrier else difference(bare, *values, ratio)
        table.add_row(label, *(shown(bare, value) for value in values), told)
    console.print(table)


SPEED = ("latency", "throughput", "peak_memory")


def difference(name: str, a: Any, b: Any, ratio: Any) -> str:
    """B in terms of A."""
    if a is None or b is None:
        return ""
    if a == b:
        return "equal"
    if name in ("accuracy", "agreement"):
        return f"{100 * (b - a):+.2f} points"
    if name == "perplexity":
        return f"{100 * (b / a - 1):+.2f}%" if a else ""
    return ratio(name, a, b)
