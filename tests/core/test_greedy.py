"""Greedy sets against the plain loops that define them."""

import pytest
import torch
from torch.nn.functional import normalize

from tprune.core import greedy


@pytest.fixture
def features():
    return torch.randn(3, 12, 5, generator=torch.Generator().manual_seed(0))


def allowed_of(features):
    return torch.rand(features.shape[:2], generator=torch.Generator().manual_seed(1)) > 0.3


def cosines(row):
    unit = normalize(row, dim=-1)
    return unit @ unit.T


def picked(score, count, allowed, first=None):
    """What `score(chosen, token)` picks, one by one; tokens that are not allowed come last."""
    chosen = [] if first is None else [first]
    while len(chosen) < count:
        left = [place for place in range(len(allowed)) if place not in chosen]
        some = [place for place in left if allowed[place]] or left
        chosen.append(max(some, key=lambda place: (float(score(chosen, place)), -place)))
    return chosen


def test_weighted_max_min_weighs_each_token_by_its_distance_to_the_nearest_pick(features):
    weight, allowed = torch.rand(3, 12, generator=torch.Generator().manual_seed(2)), allowed_of(features)
    order = greedy.weighted_max_min(features, weight, 6, allowed)
    for row in range(3):
        near = cosines(features[row])

        def score(chosen, place, near=near, row=row):
            return weight[row, place] * (1 - near[place, chosen].max() if chosen else 1)

        assert order[row].tolist() == picked(score, 6, allowed[row])


def test_max_sum_picks_the_token_least_like_all_picks_together(features):
    first = torch.tensor([3, 0, 11])
    order = greedy.max_sum(features, first, 8)
    for row in range(3):
        near = cosines(features[row])

        def score(chosen, place, near=near):
            return -near[place, chosen].sum()

        assert order[row].tolist() == picked(score, 8, [True] * 12, int(first[row]))


def test_max_sum_takes_no_copy_before_all_directions_are_there():
    basis = torch.eye(4).repeat_interleave(2, 0)[None]
    order = greedy.max_sum(basis, torch.tensor([0]), 4)
    assert sorted(basis[0, order[0]].argmax(1).tolist()) == [0, 1, 2, 3]


def test_coverage_picks_the_token_that_adds_most_and_its_gains_never_rise():
    gains = torch.rand(2, 9, 12, generator=torch.Generator().manual_seed(3))
    allowed = torch.ones(2, 12, dtype=torch.bool)
    allowed[1, ::3] = False
    order = greedy.coverage(gains, 7, allowed)
    for row in range(2):

        def score(chosen, place, row=row):
            return gains[row, :, [*chosen, place]].amax(1).double().sum()

        assert order[row].tolist() == picked(score, 7, allowed[row])
        reached = [gains[row, :, order[row, : n + 1]].amax(1).sum() for n in range(7)]
        steps = torch.stack(reached).diff()
        assert (steps.diff() <= 1e-6).all()


def test_coverage_takes_the_first_of_equals():
    gains = torch.rand(2, 30, 20, generator=torch.Generator().manual_seed(6))
    gains[0, :, 11:] = gains[0, :, 2:11]
    gains[1] = gains[1, :, :1]
    order = greedy.coverage(gains, 20)
    assert not set(order[0, :5].tolist()) & set(range(11, 20))
    assert order[1].tolist() == list(range(20))


@pytest.mark.parametrize(("rows", "tokens", "count"), [(30, 20, 12), (90, 70, 40), (1, 5, 3)])
def test_coverage_of_all_samples_at_once_is_that_of_each(rows, tokens, count):
    gains = torch.rand(3, rows, tokens, generator=torch.Generator().manual_seed(8))
    allowed = torch.ones(3, tokens, dtype=torch.bool)
    allowed[1, ::2] = False
    bar = greedy._barred((3, tokens), allowed, gains)
    assert torch.equal(greedy._cover_together(gains, bar, count), greedy.coverage(gains, count, allowed))


def test_determinant_picks_the_token_that_raises_it_most(features):
    weight = torch.rand(3, 12, 1, generator=torch.Generator().manual_seed(4)) + 0.1
    root = features * weight
    kernel = root @ root.transpose(1, 2)
    allowed = allowed_of(features)
    order = greedy.determinant(kernel, 5, allowed)
    for row in range(3):

        def score(chosen, place, row=row):
            picks = [*chosen, place]
            return torch.linalg.det(kernel[row][picks][:, picks].double())

        assert order[row].tolist() == picked(score, 5, allowed[row])


def test_determinant_goes_on_where_the_rank_of_the_kernel_is_used_up():
    root = torch.randn(1, 8, 2, generator=torch.Generator().manual_seed(5))
    order = greedy.determinant(root @ root.transpose(1, 2), 8)
    assert sorted(order[0].tolist()) == list(range(8))
