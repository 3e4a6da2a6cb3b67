"""Genetic programming over expressions: random trees, selection by tournament, crossover and mutation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from tprune.core.expression import BINARY, UNARY, Expression, simplify

ATTEMPTS = 100
"""So many children in a row that are known or too large, and a random expression takes their place."""


@dataclass(frozen=True)
class Evolution:
    """How expressions over `leaves` are bred.

    Attributes:
        leaves: names of tensors.
        population: how many are alive; the worst makes room for a better one.
        depths: of random expressions: they are at least so deep, and at most.
        largest: an expression has at most so many nodes.
        tournament: the best of so many drawn becomes a parent.
        crossover, mutation: how likely a child has two parents, and a node of it is replaced at random.
    """

    leaves: tuple[str, ...]
    population: int = 40
    depths: tuple[int, int] = (2, 4)
    largest: int = 15
    tournament: int = 5
    crossover: float = 0.8
    mutation: float = 0.2

    def run(
        self, fitness: Callable[[Expression], float], evaluations: int, random: Random
    ) -> Iterator[tuple[Expression, float]]:
        """Every expression that is tried, each once, with its fitness, of which less is better.

        Args:
            fitness: infinite for what cannot be used.
            evaluations: how many are tried; fewer where no others are found.
            random: decides everything.
        """
        alive: list[tuple[Expression, float]] = []
        known: set[str] = set()
        for _ in range(evaluations):
            child = self._new(alive, known, random)
            if child is None:
                return
            known.add(str(child))
            found = child, fitness(child)
            yield found
            alive = sorted([*alive, found], key=lambda one: one[1])[: self.population]

    def _new(
        self, alive: list[tuple[Expression, float]], known: set[str], random: Random
    ) -> Expression | None:
        """An expression that was not tried before: random ones at first, then children."""
        for attempt in range(2 * ATTEMPTS):
            if len(alive) < self.population or attempt >= ATTEMPTS:
                child = self.fresh(random, grow=random.random() < 0.5)
            else:
                child = self._child(alive, random)
            child = simplify(child)
            if str(child) not in known and sum(1 for _ in child.nodes()) <= self.largest:
                return child
        return None

    def fresh(self, random: Random, grow: bool, depth: int = 0, deepest: int | None = None) -> Expression:
        """A random expression: full down to the largest depth, or (`grow`) with leaves from the least depth on."""
        deepest = self.depths[1] if deepest is None else deepest
        leaf = depth >= deepest or (grow and depth >= self.depths[0] and random.random() > 0.5)
        if leaf:
            return Expression(random.choice(self.leaves))
        name = random.choice([*UNARY, *BINARY])
        parts = 2 if name in BINARY else 1
        return Expression(name, tuple(self.fresh(random, grow, depth + 1, deepest) for _ in range(parts)))

    def _child(self, alive: list[tuple[Expression, float]], random: Random) -> Expression:
        child = self._parent(alive, random)
        if random.random() < self.crossover:
            place, _ = random.choice(list(child.nodes()))
            _, gift = random.choice(list(self._parent(alive, random).nodes()))
            child = child.put(place, gift)
        return self._mutated(child, random)

    def _parent(self, alive: list[tuple[Expression, float]], random: Random) -> Expression:
        """The best of some drawn from those alive, which are in order."""
        return alive[min(random.randrange(len(alive)) for _ in range(self.tournament))][0]

    def _mutated(self, expression: Expression, random: Random) -> Expression:
        """From the outside inwards, the first node that is hit becomes a small random expression."""
        if random.random() < self.mutation:
            return self.fresh(random, grow=True, deepest=self.depths[0])
        return Expression(expression.name, tuple(self._mutated(part, random) for part in expression.parts))
