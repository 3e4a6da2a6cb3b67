"""What a sweep leaves behind: table.csv, table.json, Pareto plots, and one page that needs nothing else."""

from __future__ import annotations

import base64
import html
import io
import json
import math
from datetime import datetime
from pathlib import Path
from typing import Any

from tprune.artifact import finite
from tprune.evaluate import plots, table
from tprune.evaluate.points import FLOOR, STORAGE, Group, as_csv, as_rows
from tprune.evaluate.protocol import differing, flat

TEMPLATE = "page.html.jinja"
WIDEST = 1600
MEDIA = {".png": "image/png", ".jpg": "image/jpeg", ".svg": "image/svg+xml"}


def write(out: Path, groups: list[Group]) -> list[str]:
    """Tables, plots and page into the folder `out`, in the place of those of an earlier sweep; their names."""
    for file in out.glob("pareto-*"):
        file.unlink()
    files = {"table.csv": as_csv(groups).encode(), "table.json": _json(groups)}
    for number, group in enumerate(groups, start=1):
        ending = "" if number == 1 else f"-{number}"
        for axis, name in plots.AXES.items():
            if group.cost(axis) is None:
                figure = plots.pareto(group, axis)
                files[f"pareto-{name.lower()}{ending}.png"] = plots.png(figure)
                files[f"pareto-{name.lower()}{ending}.svg"] = plots.svg(figure)
    files["report.html"] = page(groups, pictures(out, groups)).encode()
    for name, content in files.items():
        partial = out / f".{name}.partial"
        partial.write_bytes(content)
        partial.replace(out / name)
    return list(files)


def _json(groups: list[Group]) -> bytes:
    content = {
        "protocols": [group.protocol for group in groups],
        "dense": [group.dense for group in groups],
        "rows": as_rows(groups),
    }
    return (json.dumps(finite(content), indent=1, ensure_ascii=False) + "\n").encode()


def pictures(out: Path, groups: list[Group]) -> dict[str, list[tuple[str, str]]]:
    """Title and file of every picture that the points of `groups` have, by budget."""
    found: dict[str, list[tuple[str, str]]] = {}
    for row in (row for group in groups for row in group.rows):
        for one in row.pictures:
            found.setdefault(row.budget, []).append(
                (f"{one['title']} {row.settings}".strip(), str(out / one["file"]))
            )
    return found


def page(groups: list[Group], pictures: dict[str, list[tuple[str, str]]] | None = None) -> str:
    """One HTML file that opens from disk: tables, plots, recipes and pictures.

    Args:
        groups: the points, the most interesting protocol first.
        pictures: under each heading titles and contents: a file (.png, .svg, .html) or HTML itself.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("tprune", "evaluate"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    protocol = groups[0].protocol
    sections = [_section(group, number) for number, group in enumerate(groups, start=1)]
    return environment.get_template(TEMPLATE).render(
        title=f"{protocol['family']} on {protocol['model']['name']}",
        made=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        sections=sections,
        differing={
            name: [_shown(value) for value in values]
            for name, values in differing([group.protocol for group in groups]).items()
        },
        pictures={
            heading: [(name, embed(content)) for name, content in each]
            for heading, each in (pictures or {}).items()
        },
    )


def _section(group: Group, number: int) -> dict[str, Any]:
    """What the template shows of one protocol."""
    drawn = [axis for axis in plots.AXES if group.cost(axis) is None]
    storage = STORAGE[group.protocol["family"]]
    names = {"flops": "FLOPs", "latency": "latency", "storage": storage.short}
    looks = plots.looks(group.lines)
    return {
        "number": number,
        "title": group.title,
        "metric": group.metric,
        "lower": group.lower,
        "dense": table.quality(group.metric, group.dense.get(group.metric)),
        "noise": sampling_error(group),
        "costs": [(axis, names[axis]) for axis in drawn],
        "missing": [(names[axis], group.cost(axis)) for axis in plots.AXES if axis not in drawn],
        "plots": [
            (names[axis], plots.inline(plots.pareto(group, axis, embedded=True), f"g{number}{axis}"))
            for axis in drawn
        ],
        "looks": [(name, look) for name, look in looks.items()],
        "floor": FLOOR,
        "rows": [_row(group, row, drawn) for row in group.rows],
        "protocol": {name: _shown(value) for name, value in flat(group.protocol).items()},
    }


def _row(group: Group, row: Any, drawn: list[str]) -> dict[str, Any]:
    """One line of the table: what is shown, and what it is sorted by."""
    told = {"ok": "", "unreachable": table.span(row.reach)}.get(row.status, row.status)
    cells = [
        (row.name, row.name),
        (row.budget, row.order),
        ("-" if row.achieved is None else f"{row.achieved:.4g}", row.achieved),
        (table.quality(group.metric, row.quality, row.spread), row.quality),
        ("-" if row.agreement is None else f"{row.agreement:.1%}", row.agreement),
        *((row.cost(axis), getattr(row, axis)) for axis in drawn),
    ]
    return {
        "method": row.method,
        "series": row.name.replace(" ", "_"),
        "cells": cells,
        "front": [axis in row.front for axis in drawn],
        "status": row.status,
        "told": told,
        "reason": row.reason,
        "recipe": row.recipe,
    }


def sampling_error(group: Group) -> str:
    """What chance does to an accuracy of so many samples, in a sentence; empty for other metrics.

    Two standard errors where they are largest: at the measured accuracy that is nearest to a half.
    """
    count = group.protocol["data"].get("samples")
    if group.metric != "accuracy" or not count or not group.measured:
        return ""
    middle = min((row.quality for row in group.measured), key=lambda value: abs(value - 0.5))
    points = 200 * math.sqrt(middle * (1 - middle) / count)
    return (
        f"With {count} samples an accuracy is uncertain by up to {points:.1f} points (two standard errors)."
    )


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)


def embed(content: str) -> str:
    """HTML as it is; a file as an element that holds it."""
    path = Path(content) if "<" not in content else None
    if path is None or not path.is_file():
        return content if path is None else f"<p>missing: {html.escape(path.name)}</p>"
    if path.suffix == ".html":
        # A document of its own, so that its styles stay with it.
        return f'<iframe loading="lazy" srcdoc="{html.escape(path.read_text(encoding="utf-8"))}"></iframe>'
    kind, content = MEDIA[path.suffix], path.read_bytes()
    if path.suffix == ".png":
        kind, content = "image/webp", smaller(content)
    data = base64.b64encode(content).decode()
    return f'<img loading="lazy" alt="" src="data:{kind};base64,{data}">'


def smaller(png: bytes) -> bytes:
    """A PNG as a WebP of at most `WIDEST` pixels across: a page of many pictures stays light."""
    from PIL import Image

    image, file = Image.open(io.BytesIO(png)), io.BytesIO()
    image.thumbnail((WIDEST, 4 * WIDEST))
    image.save(file, "WEBP", quality=80)
    return file.getvalue()
