"""Sharing a budget out."""

import pytest
import torch

from tprune.core.allocate import erk, share_out, smallest_of_all, spread_by_outliers


@pytest.mark.parametrize("count", [0, 1, 37, 250, 519, 520])
def test_the_smallest_of_all_are_counted_where_a_sort_finds_them(count):
    seeded = torch.Generator().manual_seed(count)
    parts = [torch.randn(*shape, generator=seeded) for shape in ((20, 10), (4, 30), (200, 1))]
    parts[1][0, :7], parts[2][:9] = -0.0, 0.0  # ties: those of the earlier part go first
    owner = torch.cat([torch.full((part.numel(),), place) for place, part in enumerate(parts)])
    order = torch.cat([part.flatten() for part in parts]).argsort(stable=True)
    expected = owner[order[:count]].bincount(minlength=3).tolist()
    assert smallest_of_all(lambda: iter(parts), count) == expected


def test_erk_densities_are_in_the_proportion_of_outputs_and_inputs_and_the_total_is_met():
    shapes = [(100, 100), (400, 100), (100, 400)]
    density = [1 - share for share in erk(shapes, 0.6)]
    assert density[0] / density[1] == pytest.approx((200 / 100**2) / (500 / (400 * 100)))
    sizes = [rows * columns for rows, columns in shapes]
    kept = sum(part * size for part, size in zip(density, sizes, strict=True))
    assert kept == pytest.approx(0.4 * sum(sizes))


def test_erk_leaves_what_would_be_denser_than_dense_dense():
    shapes = [(4, 4), (64, 64), (256, 64)]
    shares = erk(shapes, 0.5)
    assert shares[0] == 0
    assert sum(share * rows * columns for share, (rows, columns) in zip(shares, shapes, strict=True)) == (
        pytest.approx(0.5 * sum(rows * columns for rows, columns in shapes))
    )


def test_even_outliers_get_even_sparsities():
    assert spread_by_outliers([2.0, 2.0], 0.7, 0.08) == [0.7, 0.7]


def test_more_outliers_mean_less_sparsity_around_the_same_mean():
    shares = spread_by_outliers([1.0, 5.0, 2.0], 0.7, 0.08)
    assert shares[1] < shares[2] < shares[0]
    assert sum(shares) / 3 == pytest.approx(0.7)
    assert max(shares) - min(shares) == pytest.approx(0.16)


@pytest.mark.parametrize("total", [0, 1, 17, 29, 30])
def test_shares_sum_to_the_total_and_keep_their_distances_within_bounds(total):
    offset = torch.tensor([[3.0], [0.0], [-3.0]], dtype=torch.float64)
    shares = share_out(offset, torch.tensor([10]), torch.tensor([total])).flatten()
    assert shares.sum() == total
    assert (shares.diff() <= 0).all()
    assert 0 <= shares.min() <= shares.max() <= 10
    if total == 17:
        assert shares.tolist() == [9, 5, 3]
