"""What every method declares: its paper, its hyperparameters, its state.

A method is a frozen dataclass: its fields are the paper's hyperparameters with the paper's defaults, each
made by `param` with one line of help. It names its `paper` and composes functions of `tprune.core`; it never
reaches into a model. This module imports no torch, so that methods can be listed at once.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from tprune.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Paper:
    """Where a method comes from and how it was checked.

    Attributes:
        title, venue, year: of the paper; a baseline without one says what it is.
        arxiv: identifier without prefix, or None.
        code: the authors' repository, or None where none is public.
        checked: "code" (golden values from the authors' code), "port" (from a public re-implementation),
            "paper" (from the formulas alone) or "abstract" (a reconstruction of what the abstract commits to).
        notes: where this implementation differs, in one or two sentences.
    """

    title: str
    venue: str
    year: int
    arxiv: str | None = None
    code: str | None = None
    checked: str = "paper"
    notes: str = ""


def param(
    default: Any,
    help: str,
    *,
    choices: Sequence[Any] | None = None,
    low: float | None = None,
    high: float | None = None,
    length: int | None = None,
    kw_only: bool = False,
) -> Any:
    """A hyperparameter: its default, one line of help, the values it may take (inclusive bounds), and how many."""
    metadata = {"help": help, "choices": choices, "low": low, "high": high, "length": length}
    return dataclasses.field(default=default, metadata=metadata, kw_only=kw_only)


class State(dict[str, Any]):
    """Learned tensors by name; equal only to itself, so that methods that learned differently differ."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__


@dataclass(frozen=True)
class Method:
    """Every method: hyperparameters and where it comes from.

    Attributes:
        state: what was learned, for methods that learn (`bind`); None before.
    """

    paper: ClassVar[Paper]
    kind: ClassVar[str] = "training-free"
    id: ClassVar[str] = ""
    family: ClassVar[str] = ""
    learns: ClassVar[str] = "no"
    """Whether there is something to fit: "no", "optional" (it runs without) or "required"."""
    labels: ClassVar[str] = "classes"
    """What a fit learns from: the "classes" of images, what their "patches" show, or questions with "boxes" in which
    answers are read, or of all the "foreground"."""
    runs_on: ClassVar[tuple[str, ...]] = ("plain",)
    """The kinds of model it works in: of vision models those of `tokens.Shape.kind`, of language models "plain" (a
    decoder with attention), "state-space" and "encoder". A method that takes structure out of language models says
    "vision" where it does so of vision transformers, too."""
    built_in: ClassVar[dict[str, Any]] = {}
    """Training hyperparameters for `--fit built-in`, where the paper's need more images than there are."""

    state: State | None = dataclasses.field(default=None, kw_only=True, repr=False)

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in self.hyperparameters():
            value = _typed(field.name, getattr(self, field.name), hints[field.name], field.metadata)
            object.__setattr__(self, field.name, value)

    @classmethod
    def build(cls, settings: dict[str, Any]) -> Method:
        """The method with these hyperparameters; values may be strings, as from a command line.

        Raises:
            UserError: an unknown name, or a value of the wrong type or out of bounds.
        """
        known = [field.name for field in cls.hyperparameters()]
        for name in settings:
            if name.replace("-", "_") not in known:
                offer = ", ".join(known) or "none"
                raise UserError(f"{cls.id} has no hyperparameter '{name}'; it has: {offer}")
        return cls(**{name.replace("-", "_"): value for name, value in settings.items()})

    def settings(self) -> dict[str, Any]:
        """The hyperparameters and their values, as a recipe stores them."""
        values = {field.name: getattr(self, field.name) for field in self.hyperparameters()}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def hyperparameters(cls) -> list[dataclasses.Field]:
        """The fields that a recipe stores."""
        return [field for field in dataclasses.fields(cls) if field.name != "state"]

    def bind(self, tensors: typing.Mapping[str, Tensor]) -> typing.Self:
        """The same method with what was learned."""
        return dataclasses.replace(self, state=State(tensors))

    def counted(self) -> typing.Self:
        """The method as it runs under --keep: itself, unless without it the data decides how many stay."""
        return self

    def varies(self) -> bool:
        """Whether the data decides how many stay."""
        return False

    def check_pairs(self, one: str, other: str) -> None:
        """Raise UserError where two hyperparameters that go together in pairs are not of one length."""
        first, second = len(getattr(self, one)), len(getattr(self, other))
        if first != second:
            raise UserError(f"{self.id}: {first} {one} and {second} {other}; give as many of each")

    def check_fit(self, fit: str | None) -> None:
        """Refuse to fit what learns nothing, and to run unfitted what must learn first."""
        if fit is not None and self.learns == "no":
            raise UserError(f"--fit {fit}: {self.id} learns nothing; leave it out")
        if fit is None and self.state is None and self.learns == "required":
            raise UserError(
                f"{self.id} must be trained: add --fit DATA (--fit built-in for data that is always there), or run a "
                "folder that was fitted"
            )


BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a word", type(None): "none"}


def _typed(name: str, value: Any, hint: Any, limits: typing.Mapping[str, Any]) -> Any:
    """`value` as the type of the annotation `hint`, within `limits`, or a UserError that says what it may be."""
    try:
        value = _convert(value, hint)
    except (TypeError, ValueError, KeyError):
        raise UserError(f"--set {name}={value}: expected {_in_words(hint)}") from None
    choices, low, high = limits.get("choices"), limits.get("low"), limits.get("high")
    if choices is not None and value not in choices:
        raise UserError(f"--set {name}={value}: expected one of {', '.join(map(str, choices))}")
    length = limits.get("length")
    if length is not None and len(value) != length:
        raise UserError(f"--set {name}={','.join(map(str, value))}: expected {length} values")
    low, high = (-math.inf if low is None else low), (math.inf if high is None else high)
    for number in value if isinstance(value, tuple) else (value,):
        is_number = isinstance(number, int | float) and not isinstance(number, bool)
        if is_number and not low <= number <= high:
            raise UserError(f"--set {name}={value}: expected {low} to {high}")
    return value


def _in_words(hint: Any) -> str:
    """What may be given where the annotation is `hint`."""
    arguments = [kind for kind in typing.get_args(hint) if kind is not Ellipsis]
    if type(None) in arguments:
        return " or ".join(_in_words(kind) for kind in arguments)
    if arguments:
        return f"{_in_words(arguments[0])}, or several with commas between"
    return WORDS.get(hint) or getattr(hint, "__name__", str(hint))


def _convert(value: Any, hint: Any) -> Any:
    """`value` as `hint`: bool, int, float, str, `tuple[T, ...]` or `T | None`; strings are parsed."""
    arguments = typing.get_args(hint)
    if type(None) in arguments:
        if value is None or value == "none":
            return None
        return _convert(value, next(kind for kind in arguments if kind is not type(None)))
    if typing.get_origin(hint) is tuple:
        items = (
            value.split(",")
            if isinstance(value, str)
            else value
            if isinstance(value, tuple | list)
            else (value,)
        )
        return tuple(_convert(item, arguments[0]) for item in items)
    if hint is bool:
        return value if isinstance(value, bool) else BOOLEANS[str(value).lower()]
    if hint is int and (isinstance(value, bool) or (isinstance(value, float) and value != int(value))):
        raise ValueError
    return hint(value)
