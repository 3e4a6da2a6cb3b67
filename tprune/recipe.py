"""The recipe: what was asked, in one YAML file that can be read, checked and run again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from tprune.errors import UserError

VERSION = 1
UNREAD = {
    "vit": {"length": "images have their own number of tokens"},
    "vlm": {
        "length": "images and questions have their own number of tokens",
        "calibration": "no method is calibrated",
    },
    "llm-context": {"calibration": "no method is calibrated"},
}
"""What of a recipe says nothing to a family, and why; its own command does not take it."""


@dataclass(frozen=True)
class ModelSource:
    """Which model.

    Attributes:
        name: a built-in model, an alias, a timm name, a hub id or a folder.
        revision: of a hub model.
        weights: a safetensors file that replaces the named model's own weights.
        random_weights: initialise at random from the seed, download nothing.
        sha256: of the weights, where a by-reference artifact must find the same again.
    """

    name: str
    revision: str | None = None
    weights: str | None = None
    random_weights: bool = False
    sha256: str | None = None


@dataclass(frozen=True)
class Stage:
    """One method at one budget.

    Attributes:
        family, method: which method.
        keep: fraction of tokens or cache entries kept.
        sparsity: fraction of weights removed.
        pattern: "n:m", n weights kept of every m.
        set: the method's own hyperparameters where they differ from the paper's.
        positions: "original" or "compact", for vlm also "gap"; None for the paper's own.
        loadable: "plain" for shapes that stock transformers loads, "any" otherwise.
        fit: what a method that learns is fitted on: "built-in", or a folder (of class folders, or of questions).
        allocate: how the sparsity is shared out among matrices: "uniform", "owl", "owl:spread=0.1" …
        recover: how the pruned model is trained afterwards: "lora", "lora:rank=16,epochs=2", "full" …
        recover_data: the text for it; the calibration part of `data` by default.
    """

    family: str
    method: str
    keep: float | None = None
    sparsity: float | None = None
    pattern: str | None = None
    set: dict[str, Any] = field(default_factory=dict)
    positions: str | None = None
    loadable: str = "any"
    fit: str | None = None
    allocate: str = "uniform"
    recover: str | None = None
    recover_data: str | None = None


@dataclass(frozen=True)
class Recipe:
    """A model, a list of stages and everything else that decides the result.

    Attributes:
        model: which model.
        stages: what is done to it, in order.
        data: evaluation (and calibration) data; None for the built-in.
        limit: how many evaluation samples; None for the family's default.
        calibration: how many calibration sequences; None for the method's default.
        length: tokens per text sequence; None for the family's default.
        batch_size: samples per batch.
        device, dtype: where and in which precision.
        seed: of everything random.
        max_memory: for weights: the model is read block by block, and calibration keeps to so much, "8GB".
        paper: the paper's setting and its reported numbers, for reproductions; not read by any code.
    """

    model: ModelSource
    stages: tuple[Stage, ...]
    data: str | None = None
    limit: int | None = None
    calibration: int | None = None
    length: int | None = None
    batch_size: int = 16
    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0
    max_memory: str | None = None
    paper: dict[str, Any] = field(default_factory=dict)

    @property
    def stage(self) -> Stage:
        """The only stage of a recipe that has one."""
        return self.stages[0]

    def to_yaml(self) -> str:
        """The recipe as YAML; fields at their defaults are left out."""
        import yaml

        return yaml.safe_dump({"tprune": VERSION, **_plain(self)}, sort_keys=False, allow_unicode=True)

    def key(self) -> str:
        """sha256 of what decides the result (not of the `paper` block)."""
        content = _plain(replace(self, paper={}))
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """Nested dataclasses as dictionaries of plain values, without the fields that are at their defaults."""
    if isinstance(value, Recipe | Stage | ModelSource):
        shown = {}
        for entry in fields(value):
            content = getattr(value, entry.name)
            if content in (None, {}, ()) or content == entry.default and entry.name != "seed":
                continue
            shown[entry.name] = _plain(content)
        if isinstance(value, ModelSource) and set(shown) == {"name"}:
            return value.name
        return shown
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return asdict(value) if hasattr(value, "__dataclass_fields__") else value


def read(path: str | Path) -> Recipe:
    """The recipe in a YAML file.

    Raises:
        UserError: the file is missing, is not YAML, has an unknown key or a version from the future.
    """
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read recipe {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path} is not valid YAML: {' '.join(str(error).split())}") from None
    return parse(content, str(path))


def parse(content: Any, where: str = "recipe") -> Recipe:
    """The recipe in nested dictionaries; `where` names it in errors."""
    if not isinstance(content, dict):
        raise UserError(f"{where}: expected a mapping with the keys tprune, model, stages")
    content = dict(content)
    version = content.pop("tprune", None)
    if version is None:
        raise UserError(f"{where}: no 'tprune: {VERSION}' line; is this a tprune recipe?")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise UserError(f"{where}: version {version!r} is none; write 'tprune: {VERSION}'")
    if version > VERSION:
        raise UserError(
            f"{where}: version {version} is newer than this tprune reads ({VERSION}); upgrade with "
            "pip install -U tprune"
        )
    if "model" not in content or "stages" not in content:
        raise UserError(f"{where}: 'model' and 'stages' are required")
    model = content.pop("model")
    model = {"name": model} if isinstance(model, str) else model
    stages = content.pop("stages")
    _check_counts(content, where)
    if not isinstance(stages, list) or not stages:
        raise UserError(f"{where}: 'stages' must be a list of at least one stage")
    return _fill(
        Recipe,
        {
            **content,
            "model": _fill(ModelSource, model, f"{where}: model"),
            "stages": tuple(_fill(Stage, stage, f"{where}: stage {i + 1}") for i, stage in enumerate(stages)),
        },
        where,
    )


def _check_counts(content: dict[str, Any], where: str) -> None:
    """What is counted is at least one, as the options of the same names say."""
    for name in ("limit", "calibration", "length", "batch_size"):
        value = content.get(name)
        if isinstance(value, int) and value < 1:
            raise UserError(f"{where}: {name}: {value}: expected 1 or more")


TYPES = {"str": str, "int": int, "float": (int, float), "bool": bool, "dict[str, Any]": dict}


def _fill(kind: type, content: Any, where: str) -> Any:
    """An instance of the dataclass `kind` with `content`, its keys and plain types checked."""
    if not isinstance(content, dict):
        raise UserError(f"{where}: expected a mapping")
    known = {entry.name: entry for entry in fields(kind)}
    for name, value in content.items():
        if name not in known:
            raise UserError(f"{where}: unknown key '{name}'; known: {', '.join(known)}")
        expected = TYPES.get(str(known[name].type).removesuffix(" | None"))
        wrong = expected and (
            not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool)
        )
        if wrong and not (value is None and str(known[name].type).endswith("None")):
            raise UserError(f"{where}: {name}: {value!r} is not of type {known[name].type}")
    try:
        return kind(**content)
    except TypeError as error:
        missing = str(error).rpartition(": ")[2].replace("'", "")
        raise UserError(f"{where}: missing {missing}") from None


def check_read(families: Sequence[str], given: Mapping[str, Any]) -> None:
    """Refuse what was given of a recipe's fields, `given`, and says nothing to any of its stages' families.

    Raises:
        UserError: naming the option.
    """
    for name in {name: None for family in families for name in UNREAD.get(family, {})}:
        if given[name] is not None and all(name in UNREAD.get(family, {}) for family in families):
            why = UNREAD[families[-1]][name]
            raise UserError(f"--{name} {given[name]}: {why} in {families[-1]}; leave it out")


def check_budget(stage: Stage) -> None:
    """Refuse budgets out of range or of the wrong kind for the family.

    Raises:
        UserError: with the option, the value and the mend.
    """
    weights = stage.family == "llm-weights"
    if weights and stage.keep is not None:
        raise UserError("--keep is for tokens and caches; weights take --sparsity S or --pattern N:M")
    if not weights and (stage.sparsity is not None or stage.pattern is not None):
        raise UserError("--sparsity and --pattern are for weights; tokens and caches take --keep R")
    if stage.keep is not None and not 0 < stage.keep <= 1:
        raise UserError(f"--keep {stage.keep:g}: expected a fraction above 0 and up to 1")
    if stage.sparsity is not None and not 0 <= stage.sparsity < 1:
        raise UserError(f"--sparsity {stage.sparsity:g}: expected a fraction from 0 to below 1")
    if stage.pattern is not None:
        if stage.sparsity is not None:
            raise UserError("--sparsity and --pattern exclude each other: a pattern fixes the sparsity")
        pattern(stage.pattern)
    if not weights and stage.allocate != "uniform":
        raise UserError(f"--allocate {stage.allocate}: only budgets of weights are shared out; leave it out")
    if not weights and stage.recover is not None:
        raise UserError(
            f"--recover {stage.recover}: only pruned weights are trained to recover; leave it out"
        )
    if stage.recover is None and stage.recover_data is not None:
        raise UserError(f"--recover-data {stage.recover_data}: give --recover lora or full with it")
    policies = ("original", "compact", "gap") if stage.family == "vlm" else ("original", "compact")
    if stage.positions not in (None, *policies):
        raise UserError(f"--positions {stage.positions}: expected {' or '.join(policies)}")
    if stage.loadable not in ("any", "plain"):
        raise UserError(f"--loadable {stage.loadable}: expected any or plain")


def pattern(text: str) -> tuple[int, int]:
    """(n, m) of "n:m", n kept of m.

    Raises:
        UserError: not two whole numbers with 0 < n <= m.
    """
    parts = text.split(":")
    if len(parts) != 2 or not all(part.isdigit() for part in parts) or not 0 < int(parts[0]) <= int(parts[1]):
        raise UserError(f"--pattern {text}: expected N:M, N weights kept of every M, such as 2:4")
    return int(parts[0]), int(parts[1])


def size(text: str) -> int:
    """Bytes of "500MB" or "8GB", in powers of 1,024.

    Raises:
        UserError: no such size.
    """
    number, unit = text[:-2], text[-2:].upper()
    scale = {"MB": 2**20, "GB": 2**30}.get(unit)
    try:
        found = float(number)
    except ValueError:
        found = 0.0
    if scale is None or not 0 < found < float("inf"):
        raise UserError(f"--max-memory {text}: expected a size such as 500MB or 8GB")
    return int(found * scale)
