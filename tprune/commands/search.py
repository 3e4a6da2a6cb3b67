"""`tprune search`: the best method and budget under a constraint, and the recipe that does it."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tprune.commands.common import (
    FAMILY_DEFAULTS,
    check_file,
    default_model,
    model_options,
    parse_settings,
    with_absolute_paths,
)
from tprune.errors import UserError
from tprune.recipe import ModelSource, Recipe, Stage, check_read

if TYPE_CHECKING:
    from tprune.pipelines.grid import Choice
    from tprune.pipelines.search import Candidate, Goal, Search


@click.command("search")
@click.argument("family", type=click.Choice(list(FAMILY_DEFAULTS)))
@click.argument("model", required=False)
@click.option("--target-flops", type=float, metavar="F", help="At most this fraction of the dense FLOPs.")
@click.option("--target-latency", metavar="T", help="At most this long per timed call: 20ms, 1.5s.")
@click.option(
    "--max-drop", type=float, metavar="D", help="Lose at most D points of accuracy, or D % perplexity."
)
@click.option("--method", "methods", default="all", show_default=True, metavar="ID[,ID…]|all")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="For the methods that have it.")
@click.option("--try", "tries", multiple=True, metavar="NAME=A,B,C", help="Each of these, where it is one.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Timed calls of each.")
@model_options
@click.option("--out", metavar="FILE", help="Write the winning recipe here.")
@click.option("--force", is_flag=True, help="Replace an existing --out file.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--quiet", is_flag=True, help="Print no progress.")
def command(
    family: str,
    model: str | None,
    out: str | None,
    force: bool,
    rounds: int,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Find FAMILY's best method and budget for MODEL under one constraint.

    \b
      tprune search vit digits-vit --target-flops 0.5 --out best.yaml
      tprune search vit digits-vit --max-drop 1 --method tome,evit,zero-tprune
      tprune search vit deit_s --target-latency 20ms --try prop_attn=true,false

    Every method's budget is found by bisection; then half of the methods go on to twice the samples, until one is left.
    With --max-drop the winner is the cheapest (FLOPs of tokens, bytes of caches and weights), else the best.
    """
    goal = asked_goal(options)
    check_read([family], options)
    check_file(out, force)
    base, choices = planned(family, model, options)
    from tprune.pipelines.search import Search
    from tprune.pipelines.trials import Trials
    from tprune.progress import Progress

    progress = Progress(quiet or as_json)
    search = Search(Trials(base, progress), base, goal, rounds, progress)
    winner, candidates = search.run(choices)
    if not as_json:
        show(search, candidates, winner)
    times = search.verify(winner) if winner is not None and goal.kind == "latency" else None
    if winner is None:
        raise UserError(f"nothing meets {told(goal, family)}: {reasons(candidates)}")
    recipe = search.with_budget(winner, winner.left)
    if out is not None:
        words = f"# {told(goal, family)}: found by tprune search among {len(candidates)} candidates\n"
        Path(out).write_text(words + recipe.to_yaml(), encoding="utf-8")
    if as_json:
        best = {"method": winner.choice.method, "left": winner.left, **winner.figures}
        ended = [
            {"method": one.choice.method, "set": one.choice.settings, "left": one.left} for one in candidates
        ]
        for entry, one in zip(ended, candidates, strict=True):
            entry |= one.figures | {"reason": one.reason or None}
        from tprune.artifact import finite

        result = {"winner": best, "candidates": ended, "tried": search.tried, "recipe": recipe.to_yaml()}
        click.echo(json.dumps(finite(result | {"out": out, "verified": times})))
        return
    if times is not None:
        timed(goal, times)
    click.echo(f"\n{recipe.to_yaml()}", nl=False)
    if out is not None:
        click.echo(f"written: {out}  (tprune run {out})")


def asked_goal(options: dict[str, Any]) -> Goal:
    """The one constraint among the options.

    Raises:
        UserError: none or several, or one that means nothing.
    """
    from tprune.pipelines.search import Goal

    flops, latency, drop = (options.pop(name) for name in ("target_flops", "target_latency", "max_drop"))
    if sum(value is not None for value in (flops, latency, drop)) != 1:
        raise UserError("give one of --target-flops F, --target-latency T and --max-drop D")
    if flops is not None:
        if not 0 < flops < 1:
            raise UserError(f"--target-flops {flops:g}: expected a fraction between 0 and 1")
        return Goal("flops", flops)
    if latency is not None:
        read = re.fullmatch(r"\s*([0-9.]+)\s*(ms|s)\s*", latency)
        if read is None or not re.fullmatch(r"\d*\.?\d+|\d+\.", read[1]) or float(read[1]) == 0:
            raise UserError(f"--target-latency {latency}: expected a time such as 20ms or 1.5s")
        return Goal("latency", float(read[1]) * (1 if read[2] == "ms" else 1000))
    if drop <= 0:
        raise UserError(f"--max-drop {drop:g}: expected points or percent above 0")
    return Goal("drop", drop)


def planned(family: str, model: str | None, options: dict[str, Any]) -> tuple[Recipe, list[Choice]]:
    """The recipe that all trials share, and every method with every combination of what is tried; without a model
    on the built-in one that the methods run on."""
    from tprune.pipelines import grid

    take = options.pop
    methods, fixed = take("methods").split(","), parse_settings(take("settings"))
    lists = [[f"{name}={value}" for value in values.split(",")] for name, values in pairs(take("tries"))]
    choices: list[Choice] = []
    for values in itertools.product(*lists):
        for choice in grid.choose(family, methods, fixed | parse_settings(values), [{}]):
            if choice not in choices:
                choices.append(choice)
    names = [one.method for one in choices]
    source = ModelSource(
        model or default_model(family, *names), take("revision"), take("weights"), take("random_weights")
    )
    stage = Stage(family, grid.shared_method(family, names))
    base = with_absolute_paths(Recipe(source, (stage,), **options))
    grid.recipes(base, choices, 1)
    return base, choices


def pairs(tries: tuple[str, ...]) -> list[tuple[str, str]]:
    """The --try options as (name, values)."""
    for text in tries:
        if "=" not in text.strip("="):
            raise UserError(f"--try {text}: expected NAME=A,B,C")
    return [tuple(text.split("=", 1)) for text in tries]


def told(goal: Goal, family: str) -> str:
    """The constraint in words."""
    if goal.kind == "flops":
        return f"at most {goal.value:.0%} of the dense FLOPs"
    if goal.kind == "latency":
        return f"at most {goal.value:g} ms"
    unit = "percent of perplexity" if family.startswith("llm") else "points of accuracy"
    return f"a drop of at most {goal.value:g} {unit}"


def reasons(candidates: list[Candidate]) -> str:
    """Why each is out, one after the other."""
    return "; ".join(f"{one.choice.method}: {one.reason}" for one in candidates)


def show(search: Search, candidates: list[Candidate], winner: Candidate | None) -> None:
    """How far every candidate came, the winner first."""
    from tprune.evaluate.table import make_console, new_table, number, percent, quality

    console = make_console()
    metric, goal = search.metric, search.goal
    family = search.trials.base.family
    console.print(f"[bold]{family}[/bold] on {search.recipe.model.name}, {told(goal, family)}")
    unit = "% more" if metric == "perplexity" else "points lost"
    costs = {"vit": "FLOPs", "vlm": "FLOPs", "llm-context": "cache", "llm-weights": "weights"}
    cost = costs[family]
    target = {"flops": "FLOPs", "latency": "latency"}.get(goal.kind, cost)
    beside = [cost] if target != cost else []
    table = new_table(console, None, "method", "budget", "achieved", metric, unit, target, *beside, "")
    table.columns[-1].justify = "left"

    def place(one: Candidate) -> tuple:
        return one is not winner, bool(one.reason), -one.figures.get("samples", 0), one.figures.get("drop", 0)

    for one in sorted(candidates, key=place):
        found = one.figures
        kept = one.left if one.left is None or not search.weights else 1 - one.left
        lost = found.get("drop", math.inf)
        samples = f"on {found['samples']} samples" if "samples" in found else ""
        table.add_row(
            " ".join(
                [one.choice.method, *(f"{name}={value}" for name, value in one.choice.settings.items())]
            ),
            number(kept),
            number(found.get("achieved")),
            quality(metric, found.get(metric)) if metric else "-",
            f"{lost:.2f}" if math.isfinite(lost) else "-",
            percent(found.get("target_ratio", found.get("cost"))),
            *(percent(found.get("cost")) for _ in beside),
            ", ".join(filter(None, (one.reason or ("winner" if one is winner else ""), samples))),
        )
    console.print(table)
    if winner is not None:
        caution(search, candidates, winner)


def caution(search: Search, candidates: list[Candidate], winner: Candidate) -> None:
    """What chance does to an accuracy of so many samples: to the drop, or to the lead over the next best."""
    found = winner.figures
    count, accuracy = found["samples"], found.get("accuracy")
    rivals = [
        one.figures["drop"] - found["drop"]
        for one in candidates
        if one is not winner and not one.reason and one.figures.get("samples") == count
    ]
    if accuracy is None:
        return
    if search.goal.kind == "drop":
        # Only samples that are answered differently can move the difference to the dense model.
        error = 200 * math.sqrt((1 - found["agreement"]) / count)
        click.echo(f"on {count} samples its drop of {found['drop']:.2f} points is uncertain by {error:.1f}")
        return
    error = 200 * math.sqrt(accuracy * (1 - accuracy) / count)
    if rivals and min(rivals) < error:
        click.echo(
            f"its lead of {min(rivals):.2f} points is within what chance does on {count} samples (up to {error:.1f}): "
            "take a larger --limit to be sure"
        )


def timed(goal: Goal, times: dict[str, dict[str, float]]) -> None:
    """How long the winner took in the end, and whether that keeps the constraint."""
    dense, pruned = (
        f"{one['latency_ms']:.1f} ms (quartiles {one['latency_q1_ms']:.1f} to {one['latency_q3_ms']:.1f})"
        for one in (times["dense"], times["pruned"])
    )
    met = (
        "kept"
        if times["pruned"]["latency_ms"] <= goal.value
        else "MISSED: the machine is too noisy, or changed"
    )
    click.echo(f"timed again: {pruned}, dense {dense}; the limit of {goal.value:g} ms is {met}")
