import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tprune.core import threshold
from tprune.core.ranks import rank
from tprune.core.threshold import LONG

ROWS = {
    "spread": lambda n, seed: np.random.default_rng(seed).standard_normal(n),
    "few values": lambda n, seed: np.random.default_rng(seed).integers(0, 3, n).astype(float),
    "skew": lambda n, seed: np.exp(4 * np.random.default_rng(seed).standard_normal(n)),
    "ascending": lambda n, seed: np.arange(n, dtype=float),
    "a sample that misleads": lambda n, seed: np.arange(n) % 32 + np.arange(n) / n,
    "infinite": lambda n, seed: np.where(np.arange(n) % 3, np.inf, -np.inf),
}


@pytest.mark.parametrize("kind", ROWS)
@given(seed=st.integers(0, 99), place=st.floats(0, 1), more=st.integers(0, 40))
def test_the_value_at_a_place_is_what_sorting_puts_there(kind, seed, place, more):
    row = torch.from_numpy(ROWS[kind](LONG + more, seed)).float()
    place = 1 + int(place * (len(row) - 1))
    assert threshold.kth_smallest(row, place).item() == row.sort().values[place - 1].item()


@given(st.lists(st.integers(-2, 2), min_size=1, max_size=9), st.integers(0, 9), st.booleans())
def test_every_row_marks_as_many_of_its_largest_as_it_says_of_equals_the_first(values, count, half):
    score = torch.tensor([values, values[::-1]], dtype=torch.bfloat16 if half else torch.float32)
    score = score.masked_fill(score == -2, -torch.inf)
    count = torch.tensor([[min(count, len(values))], [len(values) // 2]])
    assert torch.equal(threshold.largest_of_each(score, count), rank(score) < count)
    assert torch.equal(threshold.largest_of_each(score, count[:1]), rank(score) < count[0])


def test_rows_are_looked_at_one_by_one_and_what_is_no_number_comes_last():
    rows = torch.rand(2, 3, LONG, generator=torch.Generator().manual_seed(0))
    expected = rows.sort(dim=-1).values[..., 99:100]
    assert torch.equal(threshold.kth_smallest(rows, 100), expected)
    rows[0, 0, ::2] = torch.nan
    assert threshold.kth_smallest(rows, 100)[0, 0].item() == rows[0, 0].sort().values[99].item()
    assert threshold.kth_smallest(rows, LONG)[0, 0].isnan()


def test_a_sparse_map_keeps_its_largest_entries_as_they_are_and_lets_gradients_through():
    attention = torch.tensor([[[[0.1, 0.9], [0.6, 0.4]]]], requires_grad=True)
    sparse = threshold.keep_largest(attention, 0.25)  # the third smallest of four is what must be reached
    assert sparse.tolist() == [[[[0.0, attention[0, 0, 0, 1].item()], [attention[0, 0, 1, 0].item(), 0.0]]]]
    sparse.sum().backward()
    assert attention.grad.tolist() == [[[[0.0, 1.0], [1.0, 0.0]]]]


@pytest.mark.parametrize("wanted", [False, True])
def test_the_largest_entries_of_maps_stay_the_same_with_and_without_a_gradient(wanted):
    attention = torch.rand(3, 2, 5, 5, generator=torch.Generator().manual_seed(0)).softmax(-1)
    least = attention.flatten(2).sort(dim=2).values[:, :, 9]
    expected = torch.where(attention >= least[..., None, None], attention, 0.0)
    assert torch.equal(threshold.keep_largest(attention.clone().requires_grad_(wanted), 0.6), expected)
