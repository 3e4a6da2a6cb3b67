"""Reports as tables: rich on a terminal, plain text when piped."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from tprune.evaluate.points import FLOOR, STORAGE, Group

FORMATS = {
    "accuracy": ("accuracy", lambda value: f"{value:.2%}"),
    "perplexity": ("perplexity", lambda value: f"{value:,.2f}"),
    "patch_accuracy": ("patches named right", lambda value: f"{value:.2%}"),
    "mean_iou": ("mean IoU of patches", lambda value: f"{value:.2%}"),
    "patch_agreement": ("map as without exits", lambda value: f"{value:.2%}"),
    "agreement": ("agreement with dense", lambda value: f"{value:.2%}"),
    "flops": ("FLOPs", lambda value: engineering(value)),
    "latency_ms": ("latency (ms)", lambda value: f"{value:,.1f}"),
    "throughput": ("throughput (1/s)", lambda value: f"{value:,.1f}"),
    "peak_memory_mb": ("peak memory (MB)", lambda value: f"{value:,.0f}"),
}
QUALITY = {"accuracy", "agreement", "patch_accuracy", "mean_iou", "patch_agreement"}
LOWER_IS_FASTER = {"flops", "latency_ms", "peak_memory_mb"}


def engineering(value: float) -> str:
    """4610000000 -> 4.61 G."""
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= scale:
            return f"{value / scale:.2f} {unit}"
    return f"{value:g}"


def number(value: Any) -> str:
    """A figure that has no format of its own."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def shown(name: str, value: Any) -> str:
    """A figure as its row shows it."""
    return "-" if value is None else FORMATS[name][1](value) if name in FORMATS else number(value)


def flat(figures: dict[str, Any]) -> dict[str, Any]:
    """Nested figures as `outer / inner` rows."""
    rows = {}
    for name, value in figures.items():
        if isinstance(value, dict):
            rows |= {f"{name} / {inner}": content for inner, content in value.items()}
        else:
            rows[name] = value
    return rows


def ratio(name: str, dense: Any, pruned: Any) -> str:
    """How much faster or smaller, where that means something."""
    if name not in FORMATS or name in QUALITY or not dense or not pruned:
        return ""
    if name not in LOWER_IS_FASTER:
        return f"x {pruned / dense:.2f}"
    return f"{dense / pruned:.2f}x less" if dense >= pruned else f"{pruned / dense:.2f}x more"


def new_table(console: Console, title: str | None, *columns: str) -> Table:
    """A table whose first column is left-aligned and all others right-aligned."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD if console.is_terminal else None)
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place == 0 else "right", no_wrap=True)
    return table


def make_console() -> Console:
    """stdout; wide enough not to wrap when piped."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=160)


def print_report(report: dict[str, Any]) -> None:
    """Budget, dense beside pruned, and what was kept per layer."""
    console = make_console()
    budget = report["budget"]
    asked = "the method's own hyperparameters" if budget["asked"] is None else budget["asked"]
    console.print(f"[bold]{report['family']} {report['method']}[/bold] on {report['model']}")
    console.print(f"budget: asked {asked}, achieved {number(budget['achieved'])}")
    for name, value in budget.items():
        if name not in ("asked", "achieved"):
            console.print(f"  {name.replace('_', ' ')}: {number(value)}")
    if report.get("fit"):
        console.print(training_line("fit", report["fit"].get("unit", "images"), report["fit"]))
    if report.get("recovery"):
        told = report["recovery"]
        before = "".join(f"; {name} before {shown(name, value)}" for name, value in told["before"].items())
        console.print(training_line(f"recovery ({told['kind']})", "sequences", told) + before)
    if report.get("export"):
        form = report["export"]
        console.print(
            f"{form['kind']}: {form['converted']} layers ({form['left']} left as they are), "
            f"{form['dense_ms']:,.2f} ms as {form['sparse_ms']:,.2f} ms, {form['speed_up']:.2f}x faster"
        )
    table = new_table(console, None, "", "dense", "pruned", "")
    dense, pruned = flat(report["dense"]), flat(report["pruned"])
    for name, value in dense.items():
        label = FORMATS[name][0] if name in FORMATS else name.replace("_", " ")
        other = pruned.get(name)
        table.add_row(
            label,
            FORMATS["accuracy"][1](value) if name.startswith("accuracy_by_kind /") else shown(name, value),
            FORMATS["accuracy"][1](other) if name.startswith("accuracy_by_kind /") else shown(name, other),
            ratio(name, value, other),
        )
    console.print(table)
    print_layers(console, report["per_layer"])
    if report["out"]:
        console.print(f"written: {report['out']} ({report['kind']})")


def training_line(title: str, unit: str, fit: dict[str, Any]) -> str:
    """What was trained, in one line."""
    losses = ", ".join(f"{name} {first:.3g} to {last:.3g}" for name, (first, last) in fit["losses"].items())
    return (
        f"{title}: {fit['steps']} steps of {fit['batch']} {unit} ({fit['data']['source']}), "
        f"{fit['seconds']:,.0f} s, loss {losses}"
    )


def print_layers(console: Console, rows: list[dict[str, Any]]) -> None:
    """One row per layer."""
    if not rows:
        return
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = new_table(console, None, *(name.replace("_", " ") for name in columns))
    for row in rows:
        table.add_row(*(number(row.get(name)) for name in columns))
    console.print(table)


def print_figures(result: dict[str, Any]) -> None:
    """What `tprune eval` found, beside what the artifact recorded."""
    console = make_console()
    recorded = flat(result.get("recorded", {}))
    columns = ("", "measured", "recorded") if recorded else ("", "measured")
    table = new_table(console, None, *columns)
    for name, value in flat(result["measured"]).items():
        label = FORMATS[name][0] if name in FORMATS else name
        cells = [shown(name, value)] + ([shown(name, recorded.get(name))] if recorded else [])
        table.add_row(label, *cells)
    console.print(f"[bold]{result['model']}[/bold] ({result['family']})")
    console.print(table)


def percent(value: float | None) -> str:
    """A fraction of the dense model's cost."""
    return "-" if value is None else f"{value:.1%}"


def quality(metric: str, value: float | None, spread: float | None = None) -> str:
    """A quality as its metric is shown, with the standard deviation over seeds where there is one."""
    if value is None:
        return "-"
    if spread is None:
        return FORMATS[metric][1](value)
    if metric == "perplexity":
        return f"{value:,.2f} ± {spread:,.2f}"
    return f"{100 * value:.2f} ± {100 * spread:.2f}%"


def span(reach: tuple[float | None, float | None]) -> str:
    """What a method can reach."""
    low, high = ("?" if end is None else f"{end:.3g}" for end in reach)
    return f"reaches {low} to {high}" if reach != (None, None) else "out of reach"


def print_sweep(group: Group) -> None:
    """The rows of one protocol, budget by budget, the best first; the floor is marked."""
    console = make_console()
    console.print(f"[bold]{group.title}[/bold]; costs in percent of the dense model's")
    drawn = [axis for axis in ("flops", "latency", "storage") if group.cost(axis) is None]
    names = {"flops": "FLOPs", "latency": "latency", "storage": STORAGE[group.protocol["family"]].short}
    kinds = list(group.dense.get("accuracy_by_kind", {}))
    heads = [group.metric, *kinds, "agreement", *(names[axis] for axis in drawn)]
    table = new_table(console, None, "budget", "method", "achieved", *heads, "")
    table.columns[1].justify = "left"
    table.columns[-1].justify = "left"
    # A long reason wraps; numbers never do.
    table.columns[-1].no_wrap = False
    costs = ["100.0%" if group.dense else "-" for _ in drawn]
    dense = quality(group.metric, group.dense.get(group.metric))
    told = [f"{value:.1%}" for value in group.dense.get("accuracy_by_kind", {}).values()]
    table.add_row("", "dense", "", dense, *told, "100.00%", *costs, "")
    last = ""
    for row in group.rows:
        if row.budget != last:
            table.add_section()
        note = {"ok": "floor" if row.method == FLOOR else "", "unreachable": span(row.reach)}
        table.add_row(
            row.budget if row.budget != last else "",
            row.name,
            "-" if row.achieved is None else f"{row.achieved:.4g}",
            quality(group.metric, row.quality, row.spread),
            *(percent(row.kinds.get(kind)) for kind in kinds),
            "-" if row.agreement is None else f"{row.agreement:.2%}",
            *(row.cost(axis) for axis in drawn),
            note.get(row.status, f"{row.status}: {row.reason}"),
            style="dim" if row.method == FLOOR else None,
        )
        last = row.budget
    console.print(table)
