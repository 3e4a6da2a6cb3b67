"""`tprune bench`: speed alone, dense and pruned in turn, so that a noisy machine does not decide."""

import json
import os
import statistics
from typing import Any

import click

from tprune.cli import THREADING
from tprune.commands.common import FAMILY_DEFAULTS, default_model, model_options, parse_settings
from tprune.errors import UserError
from tprune.methods import registry
from tprune.recipe import ModelSource, Recipe, Stage, check_read


@click.command("bench")
@click.argument("what", nargs=-1, metavar="[FAMILY] [MODEL]")
@click.option("--method", "methods", required=True, metavar="ID[,ID…]", help="One or several methods.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="A hyperparameter.")
@click.option("--keep", type=float, metavar="R", help="Fraction of tokens or entries kept.")
@click.option("--sparsity", type=float, metavar="S", help="Fraction of weights removed.")
@click.option("--pattern", metavar="N:M", help="N weights kept of every M.")
@click.option(
    "--max-memory", metavar="SIZE", help="Weights: read the model block by block and keep to so much."
)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Timed calls of each.")
@model_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    what: tuple[str, ...],
    methods: str,
    settings: tuple[str, ...],
    keep: float | None,
    sparsity: float | None,
    pattern: str | None,
    rounds: int,
    as_json: bool,
    **options: Any,
) -> None:
    """Time methods on MODEL beside the dense model, and print medians and ratios.

    \b
      tprune bench deit_s --random-weights --method tome,evit --keep 0.65
      tprune bench llm-context --method snapkv,random --keep 0.25

    FAMILY is needed where a method, such as random, is in several.
    """
    family, model = placed(what, methods.split(","))
    check_read([family], options)
    source = ModelSource(
        model or default_model(family, *methods.split(",")),
        options.pop("revision"),
        options.pop("weights"),
        options.pop("random_weights"),
    )
    results = []
    for method in methods.split(","):
        stage = Stage(family, method, keep, sparsity, pattern, parse_settings(settings))
        results.append(measure(Recipe(source, (stage,), **options), rounds))
    if as_json:
        click.echo(json.dumps({"results": results}))
        return
    for result in results:
        show(result)


def placed(what: tuple[str, ...], methods: list[str]) -> tuple[str, str | None]:
    """The family and the model that the arguments name; a family left out is that of the methods.

    Raises:
        UserError: too many arguments, or methods that do not tell the family.
    """
    if what and what[0] in FAMILY_DEFAULTS:
        family, rest = what[0], what[1:]
    else:
        owners = [{fact.family for fact in registry.facts() if fact.id == method} for method in methods]
        families = set.intersection(*owners)
        if len(families) != 1:
            raise UserError(
                f"--method {','.join(methods)} does not tell the family; write tprune bench FAMILY with one of "
                f"{', '.join(FAMILY_DEFAULTS)}"
            )
        family, rest = families.pop(), what
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]}; expected [FAMILY] [MODEL]")
    return family, rest[0] if rest else None


def measure(recipe: Recipe, rounds: int) -> dict[str, Any]:
    """The record of one method: medians and quartiles of every timed part, their ratios, and the protocol."""
    from tprune.evaluate.protocol import protocol
    from tprune.pipelines.run import check_device, check_paged, pipeline
    from tprune.progress import Progress

    check_device(recipe)
    check_paged(recipe)
    driver = pipeline(recipe, recipe.stage, Progress())
    subject = driver.load()
    record = protocol(recipe, subject, {"source": "noise drawn from the seed"})
    found = driver.bench(subject, rounds)
    times = found.pop("times")
    summary = {name: quartiles(taken) for name, taken in times.items()}
    for name, peak in found.pop("memory", {}).items():
        found[f"peak_memory_mb_{name}"] = peak
    return {
        "family": recipe.stage.family,
        "method": recipe.stage.method,
        "model": recipe.model.name,
        "asked": recipe.stage.keep or recipe.stage.sparsity or recipe.stage.pattern,
        "seconds": summary,
        **ratios(found, summary, times),
        "rounds": rounds,
        "threading": {name: os.environ.get(name) for name in THREADING},
        "protocol": record,
    }


def quartiles(times: list[float]) -> dict[str, float]:
    """Median, quartiles and minimum."""
    cuts = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else [times[0]] * 3
    return {"median": cuts[1], "q1": cuts[0], "q3": cuts[2], "min": min(times)}


def ratios(
    found: dict[str, Any], seconds: dict[str, dict[str, float]], times: dict[str, list[float]]
) -> dict[str, Any]:
    """Measured and theoretical speed-up, and what the family adds of its own (`ratios`: name -> [over, under]).

    Each is a ratio of medians; `within_rounds` has the quartiles of the same ratio formed within every round, which a
    machine that gets slower or faster on the way does not change.
    """
    told: dict[str, Any] = {name: found[name] for name in found if name not in ("ratios", "flops")}
    parts = {name: (over, under, 1.0) for name, (over, under) in found.get("ratios", {}).items()}
    if "flops" in found:
        theory = found["flops"]["dense"] / found["flops"]["pruned"]
        measured = seconds["dense"]["median"] / seconds["pruned"]["median"]
        told |= {"flops": found["flops"], "speedup_flops": theory, "speedup_measured": measured}
        parts["speedup_ratio"] = ("dense", "pruned", theory)
    told["within_rounds"] = {}
    for name, (over, under, unit) in parts.items():
        told[name] = seconds[over]["median"] / seconds[under]["median"] / unit
        paired = zip(times[over], times[under], strict=True)
        told["within_rounds"][name] = quartiles([one / other / unit for one, other in paired])
    return told


def show(result: dict[str, Any]) -> None:
    """The record as text."""
    click.echo(f"{result['family']} {result['method']} on {result['model']}, asked {result['asked']}")
    for name, value in result["seconds"].items():
        click.echo(
            f"  {name:<24} {1000 * value['median']:10.2f} ms  "
            f"(quartiles {1000 * value['q1']:.2f} to {1000 * value['q3']:.2f}, min {1000 * value['min']:.2f})"
        )
    for name, value in result.items():
        if isinstance(value, float) and name != "asked":
            click.echo(f"  {name.replace('_', ' '):<24} {value:10.3f}{_within(result, name)}")
        elif name == "workers":
            click.echo(f"  {name:<24} {value:10}")
    protocol = result["protocol"]
    click.echo(
        f"  {protocol['device']}, {protocol['hardware']['threads']} threads, {protocol['dtype']}, "
        f"{protocol['attention'] or 'no'} attention, batch {protocol['batch_size']}, "
        f"torch {protocol['software']['torch']}, "
        f"median of {result['rounds']} rounds in turn"
    )


def _within(result: dict[str, Any], name: str) -> str:
    """What a ratio was within the rounds; nothing for other figures."""
    found = result["within_rounds"].get(name)
    if found is None:
        return ""
    return f"     (within rounds {found['median']:.3f}, quartiles {found['q1']:.3f} to {found['q3']:.3f})"
