from random import Random

from hypothesis import given
from hypothesis import strategies as st

from tprune.core.levels import cross, fittest, offspring

RANGES = [(0, 6)] * 5


@given(st.integers(0, 2**16))
def test_a_child_keeps_the_sum_and_lies_between_its_parents(seed):
    random = Random(seed)
    one, two = offspring((3,) * 5, [""] * 5, RANGES, 2, 8, random)
    child = cross(one, two, random)
    assert sum(child) == sum(one)
    assert all(min(pair) <= level <= max(pair) for level, *pair in zip(child, one, two, strict=True))


def test_a_genetic_search_finds_what_is_best_and_tries_nothing_twice():
    wanted, tried = (6, 0, 4, 0, 5), []

    def fitness(levels):
        tried.append(levels)
        return sum(abs(level - best) for level, best in zip(levels, wanted, strict=True))

    found = fittest((3,) * 5, RANGES, fitness, population=12, generations=40, most=3, random=Random(0))
    assert found == wanted
    assert len(set(tried)) == len(tried) <= 12 + 40 * 6
    assert all(sum(levels) == 15 and min(levels) >= 0 and max(levels) <= 6 for levels in tried)


def test_a_search_among_one_possibility_ends_at_once():
    assert fittest((6, 6), [(0, 6)] * 2, lambda levels: 1.0, 4, 3, 2, Random(0)) == (6, 6)
