import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tprune.core import solve
from tprune.core.mask import layer_mask, nm_mask
from tprune.core.weights import pack_bits, unpack_bits


def gram(width, seed, tokens=None):
    x = torch.randn(tokens or 3 * width, width, generator=torch.Generator().manual_seed(seed))
    return x.T @ x


@given(st.integers(1, 70), st.integers(0, 99))
def test_the_factor_s_square_is_the_damped_inverse(width, seed):
    matrix = gram(width, seed)
    factor = solve.inverse_factor(matrix, 0.01)
    damped = matrix + 0.01 * matrix.diagonal().mean() * torch.eye(width)
    assert torch.equal(factor, factor.triu())
    assert torch.allclose(factor.T @ factor @ damped, torch.eye(width), atol=1e-3)
    replacing = solve.inverse_factor(matrix, 0.01, replace=True)
    assert torch.equal(replacing, factor)
    assert replacing.data_ptr() == matrix.data_ptr()


@given(st.integers(1, 40), st.integers(0, 99))
def test_a_triangular_inverse_by_halves_is_the_inverse(width, seed):
    upper = torch.linalg.cholesky(gram(width, seed) + torch.eye(width)).T
    inverse = upper.clone()
    solve.invert_upper(inverse, leaf=4)
    assert torch.allclose(inverse @ upper, torch.eye(width), atol=1e-4)


def test_a_singular_gram_matrix_is_damped_until_it_factors():
    matrix = gram(40, 0, tokens=5)
    assert solve.inverse_factor(matrix, 0.0).isfinite().all()


def test_a_gram_matrix_with_nan_is_refused():
    with pytest.raises(ValueError, match="not finite"):
        solve.inverse_factor(torch.full((4, 4), torch.nan), 0.01)


@given(st.integers(0, 99), st.sampled_from([8, 16, 128]))
def test_white_inputs_select_by_magnitude_in_every_block_and_update_nothing(seed, block):
    weight = torch.randn(6, 48, generator=torch.Generator().manual_seed(seed))
    factor = solve.inverse_factor(torch.eye(48), 0.01)
    new, mask = solve.obs_prune(weight, factor, lambda s: layer_mask(s, s.numel() // 2), block=block)
    expected = torch.cat([layer_mask(p.abs(), p.numel() // 2) for p in weight.split(block, dim=1)], 1)
    assert torch.equal(mask, expected)
    assert torch.equal(new, weight.masked_fill(mask, 0))


@given(st.integers(0, 99))
def test_the_strip_width_changes_nothing_but_rounding(seed):
    weight = torch.randn(5, 60, generator=torch.Generator().manual_seed(seed)).double()
    factor = solve.inverse_factor(gram(60, seed), 0.01).double()
    results = []
    whole = solve.STRIP
    for strip in (1, 7, 32, 128):
        solve.STRIP = strip
        results.append(solve.obs_prune(weight, factor, lambda s: layer_mask(s, s.numel() // 2)))
    solve.STRIP = whole
    for new, mask in results[1:]:
        assert torch.equal(mask, results[0][1])
        assert torch.allclose(new, results[0][0])


def test_the_last_removed_column_of_a_row_is_solved_exactly():
    """With the mask fixed, the sweep gives the least-squares optimum of the columns behind each removed one."""
    weight, matrix = (
        torch.randn(1, 6, generator=torch.Generator().manual_seed(0)).double(),
        gram(6, 1).double(),
    )
    factor = solve.inverse_factor(matrix, 0.0)
    new, _ = solve.obs_prune(weight, factor, lambda s: torch.tensor([[True] + [False] * 5]))
    solved = weight[:, 1:] + weight[:, :1] @ matrix[:1, 1:] @ torch.linalg.inv(matrix[1:, 1:])
    assert torch.allclose(new[:, 1:], solved, atol=1e-5)


@given(st.integers(0, 99), st.sampled_from([(2, 4), (4, 8), (1, 4)]))
def test_every_group_keeps_its_n_of_m(seed, pattern):
    weight = torch.randn(6, 24, generator=torch.Generator().manual_seed(seed))
    factor = solve.inverse_factor(gram(24, seed), 0.01)
    new, _ = solve.obs_prune(weight, factor, lambda s: nm_mask(s, *pattern), group=pattern[1])
    assert ((new != 0).unflatten(1, (-1, pattern[1])).sum(-1) == pattern[0]).all()


def test_a_block_that_cuts_groups_is_refused():
    with pytest.raises(ValueError, match="groups of 3"):
        solve.obs_prune(torch.ones(2, 12), torch.eye(12), lambda s: s > 0, group=3, block=8)


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_packed_masks_come_back(bits):
    mask = torch.tensor(bits)
    assert torch.equal(unpack_bits(pack_bits(mask), tuple(mask.shape)), mask)
    assert len(pack_bits(mask)) == (len(bits) + 7) // 8


@pytest.mark.parametrize("tokens", [60, 7])
def test_least_squares_are_those_of_the_pseudo_inverse_also_where_it_is_singular(tokens):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(tokens, 20, dtype=torch.float64, generator=generator)
    wanted = torch.randn(tokens, 3, dtype=torch.float64, generator=generator)
    found = solve.least_squares(inputs.T @ inputs, inputs.T @ wanted)
    assert torch.allclose(found, torch.linalg.pinv(inputs) @ wanted, atol=1e-9)
