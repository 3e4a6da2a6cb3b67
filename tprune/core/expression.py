"""Expressions over tensors, small enough to be evolved: their text, their value, their simplification.

The operators are those of Pruner-Zero (arXiv 2406.02924), as its code computes them: `div` divides by the norm of the
whole divisor, `log`, `sqrt` and `exp` are guarded so that they take any number.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


def min_max(x: Tensor) -> Tensor:
    """`x` scaled to 0 to 1 over all its entries; 1 where they are equal."""
    low, high = x.aminmax()
    return torch.where(high > low, (x - low) / (high - low), 1.0)


UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "sqr": lambda x: x * x,
    "neg": torch.neg,
    "abs": torch.abs,
    "log": lambda x: torch.log(x.abs() + 0.001),
    "exp": lambda x: torch.exp(x.clamp(max=100)),
    "sqrt": lambda x: x.abs().sqrt(),
    "tanh": torch.tanh,
    "pow": torch.square,
    "skp": lambda x: x,
    "mms": min_max,
    "zsn": lambda x: (x - x.mean()) / x.std(),
}
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": lambda x, y: x / y.norm(),
}
UNDOES = {
    "exp": ("log",),
    "log": ("exp",),
    "sqr": ("sqrt",),
    "pow": ("sqrt",),
    "sqrt": ("sqr", "pow"),
    "neg": ("neg",),
}
"""Operators that cancel those under them; what the guards change is let go."""
NEVER_NEGATIVE = ("abs", "sqr", "pow", "sqrt", "exp", "mms")


@dataclass(frozen=True)
class Expression:
    """An operator with its one or two parts, or the name of a tensor."""

    name: str
    parts: tuple[Expression, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}({', '.join(map(str, self.parts))})" if self.parts else self.name

    def nodes(self, place: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], Expression]]:
        """All expressions in this one with their places: which part of which part, from the outside."""
        yield place, self
        for index, part in enumerate(self.parts):
            yield from part.nodes((*place, index))

    def leaves(self) -> set[str]:
        """The names of tensors in it."""
        return {node.name for _, node in self.nodes() if not node.parts}

    def put(self, place: tuple[int, ...], other: Expression) -> Expression:
        """This expression with `other` at a place."""
        if not place:
            return other
        parts = list(self.parts)
        parts[place[0]] = parts[place[0]].put(place[1:], other)
        return Expression(self.name, tuple(parts))

    def value(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """What it comes to, given the tensors by name; they broadcast."""
        if not self.parts:
            return tensors[self.name]
        operator = UNARY[self.name] if len(self.parts) == 1 else BINARY[self.name]
        return operator(*(part.value(tensors) for part in self.parts))


def parse(text: str, leaves: tuple[str, ...]) -> Expression:
    """The expression that a text such as "mul(sqr(W), mms(G))" says, over tensors named `leaves`.

    Raises:
        ValueError: with what is wrong.
    """
    words = re.findall(r"\w+|[(),]|\S", text)[::-1]

    def take(expected: str | None = None) -> str:
        word = words.pop() if words else "its end"
        if expected is not None and word != expected:
            raise ValueError(f"'{expected}' expected, not {word}")
        return word

    def read() -> Expression:
        name = take()
        if name in leaves:
            return Expression(name)
        if name not in UNARY and name not in BINARY:
            offer = ", ".join([*leaves, *UNARY, *BINARY])
            raise ValueError(f"{name} is none of {offer}")
        take("(")
        parts = [read()]
        if name in BINARY:
            take(",")
            parts.append(read())
        take(")")
        return Expression(name, tuple(parts))

    found = read()
    if words:
        raise ValueError(f"{words[-1]} is too much")
    return found


def simplify(expression: Expression) -> Expression:
    """The expression without operators that cancel each other (opposing operations) or change nothing."""
    parts = tuple(map(simplify, expression.parts))
    name = expression.name
    inner = parts[0] if parts else None
    if name == "skp" or (name == "abs" and inner.name in NEVER_NEGATIVE):
        return inner
    if name in ("mms", "zsn") and inner.name == name:
        return inner
    if inner is not None and inner.name in UNDOES.get(name, ()):
        return inner.parts[0]
    opposite = {"add": "sub", "sub": "add"}.get(name)
    if opposite is not None and inner.name == opposite and inner.parts[1] == parts[1]:
        return inner.parts[0]
    return Expression(name, parts)
