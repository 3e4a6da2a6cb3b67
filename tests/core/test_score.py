import torch
from hypothesis import given
from hypothesis import strategies as st

from tprune.core import score


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stochastic(seed, size):
    return drawn(seed, 1, 1, size, size).softmax(-1)


def test_page_rank_of_a_uniform_map_is_uniform():
    rank = score.page_rank(torch.full((1, 1, 5, 5), 0.2), torch.rand(1, 1, 5), 3)
    assert torch.allclose(rank, rank.mean().expand_as(rank))


def test_page_rank_puts_first_whom_everyone_attends_to():
    attention = torch.full((1, 1, 4, 4), 0.1)
    attention[..., 2] = 0.7
    assert score.page_rank(attention, torch.full((1, 1, 4), 0.25), 5).argmax() == 2


@given(st.integers(0, 99))
def test_page_rank_moves_with_a_permutation_of_the_tokens(seed):
    attention, order = stochastic(seed, 6), torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    start = torch.full((1, 1, 6), 1 / 6)
    moved = score.page_rank(attention[..., order, :][..., order], start, 4)
    assert torch.allclose(moved, score.page_rank(attention, start, 4)[..., order], atol=1e-6)


@given(st.integers(0, 99))
def test_page_rank_without_some_tokens_equals_that_of_the_smaller_graph(seed):
    attention = stochastic(seed, 6)
    left = torch.tensor([0, 2, 3, 5])
    present = torch.zeros(1, 1, 6).index_fill_(2, left, 1.0)
    small = attention[..., left, :][..., left]
    small = small / small.sum(-1, keepdim=True)
    expected = score.page_rank(small, torch.full((1, 1, 4), 0.25), 4)
    found = score.page_rank(attention, present / 4, 4, present)
    assert torch.allclose(found[..., left], expected, atol=1e-6)
    assert (found[..., [1, 4]] == 0).all()


def test_noise_depends_on_the_seed_of_the_sample_alone():
    both = score.uniform((5,), torch.tensor([3, 4]))
    assert torch.equal(both[1:], score.uniform((5,), torch.tensor([4])))
    assert not torch.equal(both[0], both[1])


def test_scaling_to_one_reads_only_what_is_there():
    x = torch.tensor([[2.0, 9.0, 4.0, 3.0], [5.0, 5.0, 1.0, 1.0], [1.0, 2.0, 3.0, 4.0]])
    there = torch.tensor([[1, 0, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]]).bool()
    expected = torch.tensor([[0, 0, 1, 0.5], [0, 0, 0, 0], [0, 0, 0, 0]])
    assert torch.equal(score.min_max(x, there), expected)
    assert torch.equal(score.min_max(x[:1, [0, 2, 3]]), expected[:1, [0, 2, 3]])
