"""Grids of tokens cut into cells."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from tprune.core.grid import even_cells


@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_even_cells_are_as_many_as_asked_for_and_none_is_empty_or_split(rows, columns, data):
    count = data.draw(st.integers(1, rows * columns))
    owner = even_cells((rows, columns), count)
    assert owner.unique().tolist() == list(range(count))
    for cell in range(count):
        inside = (owner.view(rows, columns) == cell).nonzero()
        low, high = inside.amin(0), inside.amax(0)
        assert len(inside) == int((high - low + 1).prod())


@given(st.integers(1, 4), st.integers(1, 4))
def test_a_square_number_of_cells_that_divides_a_square_grid_gives_its_squares(side, size):
    owner = even_cells((side * size, side * size), side * side).view(side * size, -1)
    place = torch.arange(side * size) // size
    assert torch.equal(owner, place.unsqueeze(1) * side + place)
