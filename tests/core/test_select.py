import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tprune.core import mask as masks
from tprune.core import select

scores = st.lists(st.integers(-3, 3), min_size=1, max_size=12).map(lambda row: torch.tensor([row]).float())


@given(scores, st.integers(0, 12))
def test_top_keeps_exactly_the_best_in_ascending_order_with_ties_to_the_left(score, count):
    count = min(count, score.shape[1])
    kept = select.top(score, count)[0].tolist()
    values = score[0].tolist()
    expected = sorted(sorted(range(len(values)), key=lambda i: (-values[i], i))[:count])
    assert kept == expected


@given(scores, st.integers(0, 12))
def test_smallest_mask_marks_exactly_count_with_ties_to_the_left(score, count):
    count = min(count, score.shape[1])
    mask = masks.smallest_mask(score, count)[0].tolist()
    values = score[0].tolist()
    expected = sorted(range(len(values)), key=lambda i: (values[i], i))[:count]
    assert [i for i, marked in enumerate(mask) if marked] == sorted(expected)


def test_wanda_card_example():
    score = torch.tensor([[1.0, 2.0, -3.0, 4.0]]).abs() * torch.tensor([4.0, 1.0, 1.0, 0.5])
    assert masks.smallest_mask(score, 2).tolist() == [[False, True, False, True]]


@given(st.integers(0, 999), st.sampled_from([(2, 4), (4, 8), (1, 4), (4, 4)]))
def test_nm_leaves_exactly_n_of_every_m(seed, pattern):
    keep, group = pattern
    score = torch.randint(0, 3, (5, 24), generator=torch.Generator().manual_seed(seed)).float()
    kept = (~masks.nm_mask(score, keep, group)).unflatten(-1, (-1, group)).sum(-1)
    assert (kept == keep).all()


def test_nm_refuses_a_ragged_axis():
    with pytest.raises(ValueError, match="groups of 4"):
        masks.nm_mask(torch.rand(2, 6), 2, 4)


def test_inclusive_rule_removes_one_more():
    score = torch.tensor([[4.0, 1.0], [2.0, 3.0]])
    assert masks.inclusive_mask(score, 2).sum() == 3


@given(st.integers(0, 99))
def test_protected_tokens_stay_and_every_row_loses_its_own_count(seed):
    generator = torch.Generator().manual_seed(seed)
    prunable = torch.rand(3, 10, generator=generator) < 0.6
    drop = torch.stack([torch.randint(int(row.sum()) + 1, (), generator=generator) for row in prunable])
    index, valid = select.keep_protected_and_top(torch.rand(3, 10, generator=generator), drop, prunable)
    valid = torch.ones_like(index, dtype=torch.bool) if valid is None else valid
    for row in range(3):
        kept = index[row][valid[row]].tolist()
        assert kept == sorted(set(kept))
        assert len(kept) == 10 - drop[row]
        assert set((~prunable[row]).nonzero()[:, 0].tolist()) <= set(kept)


def test_prefix_survives_whatever_the_scores():
    index = select.keep_prefix_and_top(torch.tensor([[0.1, 0.9, 0.5]]), 1, prefix=2)
    assert index.tolist() == [[0, 1, 3]]


@given(st.integers(0, 999), st.sampled_from([(2, 4), (4, 8), (1, 3), (5, 6)]))
def test_nm_takes_the_smallest_of_every_group_with_ties_to_the_left(seed, pattern):
    keep, group = pattern
    score = torch.randint(0, 3, (4, 4 * group), generator=torch.Generator().manual_seed(seed)).float()
    order = score.unflatten(-1, (-1, group)).argsort(dim=-1, stable=True)[..., : group - keep]
    expected = torch.zeros(4, 4, group, dtype=torch.bool).scatter_(-1, order, True).flatten(-2)
    assert torch.equal(masks.nm_mask(score, keep, group), expected)


@given(
    st.integers(0, 999), st.integers(0, 40), st.sampled_from([torch.float32, torch.float64, torch.bfloat16])
)
def test_a_layer_loses_exactly_its_count_in_any_precision_with_ties_to_the_left(seed, count, dtype):
    score = torch.randint(0, 4, (5, 8), generator=torch.Generator().manual_seed(seed)).to(dtype)
    order = score.flatten().argsort(stable=True)[:count]
    expected = torch.zeros(40, dtype=torch.bool).index_fill_(0, order, True).view(5, 8)
    assert torch.equal(masks.layer_mask(score, count), expected)


def test_counts_round_down_but_not_because_of_binary_fractions():
    assert select.floor_count(100, 0.29) == 29
    assert select.floor_count(24, 0.3) == 7


@given(st.integers(0, 99), st.floats(0.1, 0.7))
def test_the_cumulative_mask_comes_near_its_fraction_and_spares_rows_with_one_giant(seed, fraction):
    score = torch.rand(40, 60, generator=torch.Generator().manual_seed(seed))
    assert abs(masks.cumulative_mask(score, fraction).double().mean().item() - fraction) < 0.02
    one_giant = torch.cat([torch.full((1, 60), 1e-3), score])
    one_giant[0, 0] = 1e6
    assert not masks.cumulative_mask(one_giant, fraction)[0, 0]


def test_marking_undoes_places_whatever_shorter_rows_repeat():
    marked = torch.tensor([[True, False, True, True], [False, True, False, False], [False] * 4])
    assert torch.equal(select.mark(*select.places(marked), 4), marked)


def test_a_pick_that_comes_twice_counts_by_its_first():
    order = torch.tensor([[2, 0, 2, 2]])
    assert select.keep_first(order, 1, torch.ones(1, 3, dtype=torch.bool))[0].tolist() == [[2]]


def test_those_above_a_threshold_stay_within_a_least_and_a_most():
    score = torch.tensor([[0.9, 0.8, 0.7, 0.1], [0.2, 0.3, 0.1, 0.9]])
    group = torch.tensor([[True] * 4, [True, True, True, False]])

    def found(*limits):
        return [row.nonzero().squeeze(1).tolist() for row in select.above(score, group, 0.5, *limits)]

    assert found() == [[0, 1, 2], [1]]
    assert found(2) == [[0, 1, 2], [0, 1]]
    assert found(4) == [[0, 1, 2, 3], [0, 1, 2]]
    assert found(1, torch.tensor([2, 0])) == [[0, 1], [1]]
