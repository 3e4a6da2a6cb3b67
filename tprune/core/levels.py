"""Levels of sites whose sum stays as it is: one site goes a level down where another of its kind goes one up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

ATTEMPTS = 100
"""So many mutations in a row that are known, and no further one is looked for."""


def spread(total: int, sizes: Sequence[int]) -> list[int]:
    """Whole numbers that sum to `total`, in proportion to `sizes`, what rounding leaves spread over all of them."""
    ends, behind = [0], 0
    for size in sizes:
        behind += size
        ends.append(round(total * behind / sum(sizes)))
    return [end - start for start, end in zip(ends, ends[1:], strict=False)]


def mutate(
    levels: Sequence[int],
    kinds: Sequence[str],
    ranges: Sequence[tuple[int, int]],
    most: int,
    random: Random,
) -> tuple[int, ...]:
    """The levels after a few random exchanges, fewer being likelier: the smaller of two draws from 1 to `most`.

    In each, a kind is drawn in proportion to its sites, one of them goes down a level and one goes up, both within
    their ranges; nothing happens where the kind has no such two. They may be the same.

    Args:
        levels: of every site.
        kinds: of every site.
        ranges: the lowest and the highest level of every site.
        most: exchanges.
        random: decides everything.
    """
    found = list(levels)
    for _ in range(min(random.randint(1, most), random.randint(1, most))):
        kind = random.choice(list(kinds))
        own = [site for site, name in enumerate(kinds) if name == kind]
        down = [site for site in own if found[site] > ranges[site][0]]
        up = [site for site in own if found[site] < ranges[site][1]]
        if down and up:
            found[random.choice(down)] -= 1
            found[random.choice(up)] += 1
    return tuple(found)


def offspring(
    parent: tuple[int, ...],
    kinds: Sequence[str],
    ranges: Sequence[tuple[int, int]],
    count: int,
    most: int,
    random: Random,
) -> list[tuple[int, ...]]:
    """`count` different mutations of `parent`, none of them itself; fewer where no others are found."""
    known, failed = {parent: None}, 0
    while len(known) <= count and failed < ATTEMPTS:
        child = mutate(parent, kinds, ranges, most, random)
        failed = failed + 1 if child in known else 0
        known[child] = None
    return [levels for levels in known if levels != parent]


def cross(one: Sequence[int], two: Sequence[int], random: Random) -> tuple[int, ...]:
    """A child of two of the same sum: each level is from either, or between both where the sum wants it."""
    found = [random.choice(pair) for pair in zip(one, two, strict=True)]
    due = sum(one) - sum(found)
    step = 1 if due > 0 else -1
    for _ in range(abs(due)):
        pairs = zip(found, one, two, strict=True)
        free = [site for site, (own, *both) in enumerate(pairs) if min(both) <= own + step <= max(both)]
        found[random.choice(free)] += step
    return tuple(found)


def fittest(
    first: tuple[int, ...],
    ranges: Sequence[tuple[int, int]],
    fitness: Callable[[tuple[int, ...]], float],
    population: int,
    generations: int,
    most: int,
    random: Random,
) -> tuple[int, ...]:
    """The best levels that a genetic search meets, of the sum that `first` has.

    At first there are `first` and mutations of it. In every generation the better half stays, and mutated children of
    two of them take the place of the others. No levels are tried twice.

    Args:
        first, ranges: levels of every site, and the lowest and the highest of each.
        fitness: less is better.
        population: how many are alive.
        generations: how often.
        most: exchanges of a mutation.
        random: decides everything.
    """
    kinds = [""] * len(first)
    others = offspring(first, kinds, ranges, population - 1, most, random)
    alive = {levels: fitness(levels) for levels in (first, *others)}
    known = dict(alive)
    for _ in range(generations):
        parents = sorted(alive, key=alive.get)[: max(2, population // 2)]
        if len(parents) < 2:
            break
        alive = {levels: alive[levels] for levels in parents}
        for _ in range(population - len(parents)):
            child = mutate(cross(*random.sample(parents, 2), random), kinds, ranges, most, random)
            if child not in known:
                known[child] = fitness(child)
            alive[child] = known[child]
    return min(alive, key=alive.get)
