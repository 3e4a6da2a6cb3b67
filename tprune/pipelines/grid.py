"""Which points a sweep has: methods, their hyperparameters, budgets and seeds, from options or a YAML file."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tprune.errors import UserError
from tprune.evaluate.points import FLOOR
from tprune.methods import registry
from tprune.methods.base import Method
from tprune.methods.tokens import TokenMethod
from tprune.recipe import Recipe, Stage, check_budget

BUDGETS = ("keep", "sparsity", "pattern")


@dataclass(frozen=True)
class Choice:
    """A method, the hyperparameters it is tried with, and a budget such as {"keep": 0.5}."""

    method: str
    settings: dict[str, Any]
    budget: dict[str, Any]


def budgets(**given: str | None) -> list[dict[str, Any]]:
    """The budgets of comma-separated options: keep="0.9,0.5" -> [{"keep": 0.9}, {"keep": 0.5}]; [{}] without any.

    Raises:
        UserError: not numbers.
    """
    found = []
    for name, text in given.items():
        for word in (text or "").split(",") if text is not None else []:
            found.append({name: word if name == "pattern" else _number(name, word)})
    return found or [{}]


def _number(name: str, word: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise UserError(f"--{name} {word}: expected numbers with commas between them") from None


def choose(
    family: str, names: Iterable[str], settings: dict[str, Any], asked: Sequence[dict[str, Any]]
) -> list[Choice]:
    """The methods called `names` ("all": every one of the family), each once, at every budget.

    `settings` go to the methods that have hyperparameters of these names.

    Raises:
        UserError: no such method, or a hyperparameter that none of them has.
    """
    known = [fact.id for fact in registry.facts(family)]
    wanted = dict.fromkeys(one for name in names for one in (known if name == "all" else [name]))
    owned = {name: {one.name for one in registry.find(name, family).parameters} for name in wanted}
    for name in settings:
        if not any(name.replace("-", "_") in has for has in owned.values()):
            raise UserError(f"--set {name}: none of {', '.join(owned)} has this hyperparameter")
    chosen = []
    for budget, (name, has) in itertools.product(asked, owned.items()):
        own = {one: value for one, value in settings.items() if one.replace("-", "_") in has}
        chosen.append(Choice(name, own, budget))
    return chosen


def read(path: str, family: str) -> list[Choice]:
    """The points of a grid file.

    `methods` lists ids, or mappings with `method`, `set` and budgets of their own; `keep`, `sparsity` and `pattern`
    beside it are the budgets of the others. Every value of a list under `set` is tried, with all of the next.

    Raises:
        UserError: the file is missing or says something else.
    """
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--grid {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--grid {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or not isinstance(content.get("methods"), list):
        raise UserError(f"--grid {path}: expected a mapping with 'methods', a list, and budgets")
    _only(path, content, ("methods", *BUDGETS))
    chosen = []
    for entry in content["methods"]:
        entry = {"method": entry} if isinstance(entry, str) else entry
        if not isinstance(entry, dict) or not isinstance(entry.get("method"), str):
            raise UserError(
                f"--grid {path}: {entry!r} is no method; expected an id or a mapping with 'method'"
            )
        _only(path, entry, ("method", "set", *BUDGETS))
        own = [name for name in BUDGETS if name in entry]
        asked = _budgets(path, entry if own else content)
        names = [entry["method"]] if entry["method"] != "all" else [f.id for f in registry.facts(family)]
        for name, settings in itertools.product(names, _combinations(entry.get("set") or {})):
            chosen += choose(family, [name], settings, asked)
    return chosen


def _only(path: str, content: dict[str, Any], known: Sequence[str]) -> None:
    for name in content:
        if name not in known:
            raise UserError(f"--grid {path}: unknown key '{name}'; known: {', '.join(known)}")


def _budgets(path: str, content: dict[str, Any]) -> list[dict[str, Any]]:
    """One budget per value of the lists in `content`."""
    found = []
    for name in BUDGETS:
        values = content.get(name, [])
        for value in values if isinstance(values, list) else [values]:
            if name == "pattern":
                found.append({name: str(value)})
            elif isinstance(value, bool) or not isinstance(value, int | float):
                raise UserError(f"--grid {path}: {name}: {value!r} is no number")
            else:
                found.append({name: float(value)})
    return found or [{}]


def _combinations(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Every value of every list with every other; what is no list is a value itself."""
    lists = [value if isinstance(value, list) else [value] for value in settings.values()]
    return [dict(zip(settings, values, strict=True)) for values in itertools.product(*lists)]


def has_floor(family: str, names: Iterable[str]) -> bool:
    """Whether there is a floor beside methods of these names: not where all drop tokens inside text encoders."""
    return family != "llm-context" or any(
        registry.load(name, family).runs_on != ("encoder",) for name in names
    )


def shared_method(family: str, names: Sequence[str]) -> str:
    """The method of the recipe that all points share: the floor, or the first where there is none."""
    return FLOOR if has_floor(family, names) else names[0]


def with_floor(chosen: list[Choice]) -> list[Choice]:
    """The floor at every budget beside the others, budget by budget."""
    asked = list({str(one.budget): one.budget for one in chosen}.values())
    return [
        one
        for budget in asked
        for one in [*(each for each in chosen if each.budget == budget), Choice(FLOOR, {}, budget)]
    ]


def recipes(base: Recipe, chosen: list[Choice], seeds: int, fit: str | None = None) -> list[Recipe]:
    """A recipe per choice and seed, each once; what cannot be built is refused before anything runs.

    Methods to which a seed makes no difference get one.

    Args:
        base: everything but the method, its settings and its budget; its seed is the first.
        fit: what the methods that learn are fitted on, with every seed.

    Raises:
        UserError: `fit`, and none of them learns.
    """
    made = {}
    for choice in chosen:
        blank = dict.fromkeys(BUDGETS)
        learns = registry.load(choice.method, base.stage.family).learns != "no"
        stage = replace(
            base.stage,
            method=choice.method,
            set=choice.settings,
            fit=fit if learns else None,
            **blank | choice.budget,
        )
        check_budget(stage)
        method = registry.build(stage.method, stage.family, stage.set, stage.fit)
        for seed in range(base.seed, base.seed + (seeds if draws(method, stage) else 1)):
            recipe = replace(base, stages=(stage,), seed=seed)
            made[recipe.key()] = recipe
    if fit is not None and all(recipe.stage.fit is None for recipe in made.values()):
        raise UserError(f"--fit {fit}: none of these methods learns; leave it out")
    return list(made.values())


def draws(method: Method, stage: Stage) -> bool:
    """Whether the seed may change what the method does: it draws, is fitted, or is calibrated on drawn sequences."""
    return not isinstance(method, TokenMethod) or "seeds" in method.reads or stage.fit is not None
