"""Which methods there are: the folders of this package, and other packages' entry points.

Static facts are read from the source with `ast`, so that listing imports neither torch nor a method.
"""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tprune.errors import UserError
from tprune.methods.answer import NotAMethod
from tprune.methods.base import Method, Paper
from tprune.methods.cache import CacheMethod
from tprune.methods.tokens import TokenMethod
from tprune.methods.trained import TrainedMethod
from tprune.methods.weights import WeightMethod

FAMILIES = ("vit", "vlm", "llm-context", "llm-weights")
ENTRY_POINTS = "tprune.methods"
KINDS = {kind.__name__: kind for kind in (TokenMethod, CacheMethod, WeightMethod, TrainedMethod)}


@dataclass(frozen=True)
class Parameter:
    """A hyperparameter as its source states it."""

    name: str
    type: str
    default: Any
    help: str


@dataclass(frozen=True)
class Facts:
    """What is known of a method without importing it."""

    id: str
    family: str
    module: str
    paper: Paper
    kind: str
    summary: str
    parameters: tuple[Parameter, ...]
    learns: str
    built_in: dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """What is known of a paper that is no method (`answer.NotAMethod`)."""

    id: str
    family: str
    module: str
    paper: Paper
    kind: str
    summary: str
    why: str
    piece: str

    def __str__(self) -> str:
        return f"{self.family}/{self.id} is not a method: {self.why}; what can be used of it is {self.piece}"


def folder(family: str) -> str:
    """The folder and module name of a family: llm-weights -> llm_weights."""
    return family.replace("-", "_")


def facts(family: str | None = None) -> list[Facts]:
    """All methods, or those of one family, sorted by family and id.

    Raises:
        UserError: no such family.
    """
    return [entry for entry in entries(family) if isinstance(entry, Facts)]


def entries(family: str | None = None) -> list[Facts | Answer]:
    """All methods, and the papers that are none, or those of one family; sorted by family and id.

    Raises:
        UserError: no such family.
    """
    if family is not None and family not in FAMILIES:
        raise UserError(f"no family '{family}'; there are {', '.join(FAMILIES)}")
    found = [_read(*place) for place in _sources() if family in (None, place[0])]
    return sorted(found, key=lambda entry: (FAMILIES.index(entry.family), entry.id))


def find(name: str, family: str | None = None) -> Facts:
    """The facts of `name`: an id, or "family/id" where several families have it.

    Raises:
        UserError: no such method, one that is not a method, or an id that several families have.
    """
    entry = ask(name, family)
    if isinstance(entry, Answer):
        raise UserError(str(entry))
    return entry


def ask(name: str, family: str | None = None) -> Facts | Answer:
    """What there is to say of `name`, a method or not; as `find`, which takes methods only.

    Raises:
        UserError: nothing of this name, or an id that several families have.
    """
    if "/" in name:
        family, name = name.split("/", 1)
    places = [place for place in _sources() if place[1] == name and family in (None, place[0])]
    if len(places) > 1:
        offer = ", ".join(f"{place[0]}/{name}" for place in places)
        raise UserError(f"several families have '{name}'; say which: {offer}")
    if not places:
        offer = ", ".join(fact.id for fact in facts(family))
        where = f" in {family}" if family else ""
        raise UserError(f"no method '{name}'{where}; there are: {offer}")
    return _read(*places[0])


def load(name: str, family: str | None = None) -> type[Method]:
    """The class of a method, imported."""
    fact = find(name, family)
    module = importlib.import_module(fact.module)
    kinds = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Method) and value.__module__ == module.__name__
    ]
    if len(kinds) != 1:
        raise UserError(f"{fact.module} defines {len(kinds)} methods; a method's file defines exactly one")
    kinds[0].id, kinds[0].family = fact.id, fact.family
    return kinds[0]


def build(
    name: str, family: str | None = None, settings: dict[str, Any] | None = None, fit: str | None = None
) -> Method:
    """A method with the given hyperparameters, the others at the paper's values.

    Those that `fit`, what it is fitted on, asks for stand between both.
    """
    method, settings = load(name, family), settings or {}
    return method.build({**method.built_in, **settings} if fit == "built-in" else settings)


def running_on(kind: str, family: str = "vit") -> list[str]:
    """The ids of the family's methods that work in this kind of model (`Method.runs_on`)."""
    return [entry.id for entry in facts(family) if kind in load(entry.id, family).runs_on]


@cache
def _sources() -> tuple[tuple[str, str, str, Path], ...]:
    """(family, id, module, file) of every method."""
    return tuple(_found())


def _found() -> Iterator[tuple[str, str, str, Path]]:
    here = Path(__file__).parent
    for family in FAMILIES:
        for file in sorted((here / folder(family)).glob("*.py")):
            if not file.stem.startswith("_"):
                yield family, file.stem.replace("_", "-"), f"{__package__}.{folder(family)}.{file.stem}", file
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        family, _, name = entry.name.partition("/")
        spec = importlib.util.find_spec(entry.value)
        if family not in FAMILIES or not name or spec is None or spec.origin is None:
            raise UserError(
                f"entry point '{entry.name} = {entry.value}' is not of the form FAMILY/ID = MODULE"
            )
        yield family, name, entry.value, Path(spec.origin)


@cache
def _read(family: str, name: str, module: str, file: Path) -> Facts | Answer:
    """The facts in a method's source: its class with its `paper` of literals and its `param` fields.

    The paper is `Paper(...)`, or `replace(PAPER, ...)` where the method shares a PAPER of a module that it imports.

    Of a class that derives from `NotAMethod`, what it answers.
    """
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in tree.body:
        if not isinstance(node, ast.ClassDef):
            continue
        constants = dict(_constants(node))
        if "paper" not in constants:
            continue
        paper = Paper(**_told(tree, constants["paper"]))
        summary = (ast.get_docstring(tree) or "").split("\n\n")[0].replace("\n", " ")
        if any(isinstance(base, ast.Name) and base.id == NotAMethod.__name__ for base in node.bases):
            why, piece = (ast.literal_eval(constants[part]) for part in ("why", "piece"))
            return Answer(name, family, module, paper, NotAMethod.kind, summary, why, piece)
        kind, learns, fast = (
            ast.literal_eval(constants[word]) if word in constants else getattr(Method, word)
            for word in ("kind", "learns", "built_in")
        )
        parameters = (*_inherited(node), *_parameters(node))
        return Facts(name, family, module, paper, kind, summary, parameters, learns, fast)
    raise UserError(f"{file} has no class with a paper = Paper(...)")


def _told(tree: ast.Module, call: ast.Call) -> dict[str, Any]:
    """What is said of a paper by a call of literals, and by the shared one that it begins with."""
    told: dict[str, Any] = {}
    for shared in call.args:
        imports = (node for node in tree.body if isinstance(node, ast.ImportFrom))
        module = next(node.module for node in imports if shared.id in (alias.name for alias in node.names))
        there = ast.parse(Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8"))
        told |= _told(there, dict(_constants(there))[shared.id])
    return told | {word.arg: ast.literal_eval(word.value) for word in call.keywords}


def _constants(node: ast.ClassDef | ast.Module) -> Iterator[tuple[str, ast.expr]]:
    """What a class or module gives names to, annotated or not."""
    for statement in node.body:
        targets = (
            statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        )
        for target in targets:
            if isinstance(target, ast.Name) and statement.value is not None:
                yield target.id, statement.value


def _inherited(node: ast.ClassDef) -> Iterator[Parameter]:
    """The hyperparameters that every method of the kind has."""
    for name in node.bases:
        kind = KINDS.get(name.id) if isinstance(name, ast.Name) else None
        for field in kind.hyperparameters() if kind else ():
            yield Parameter(field.name, field.type, field.default, field.metadata["help"])


def _parameters(node: ast.ClassDef) -> Iterator[Parameter]:
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.value, ast.Call):
            default, help_text = (ast.literal_eval(argument) for argument in statement.value.args[:2])
            yield Parameter(statement.target.id, ast.unparse(statement.annotation), default, help_text)
