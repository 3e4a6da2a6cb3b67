import torch
from hypothesis import given
from hypothesis import strategies as st

from tprune.core.reduction import Reduction, gather_tokens


def numbers(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def reductions(draw):
    batch, length = draw(st.integers(1, 3)), draw(st.integers(2, 9))
    seed = draw(st.integers(0, 999))
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(length, generator=generator) for _ in range(batch)])
    kept = draw(st.integers(1, length))
    index, rest = order[:, :kept], order[:, kept:]
    if draw(st.booleans()):
        return Reduction.keep(index, length), seed
    into = torch.randint(kept, rest.shape, generator=generator)
    if draw(st.booleans()):
        weight = torch.rand(batch, kept, length - kept, generator=generator)
        return Reduction.spread(index, length, rest, weight * (weight > 0.5)), seed
    if draw(st.booleans()):
        nowhere = torch.rand(rest.shape, generator=generator) < 0.3
        return Reduction.average(index, length, rest, into.masked_fill(nowhere, -1)), seed
    return Reduction.merge(index, length, rest, into, torch.rand(rest.shape, generator=generator)), seed


@given(reductions())
def test_apply_equals_its_matrix(case):
    reduction, seed = case
    x = numbers(seed, reduction.index.shape[0], reduction.length, 4)
    assert torch.allclose(reduction.apply(x), reduction.matrix() @ x, atol=1e-5)


@given(reductions())
def test_owner_says_where_every_token_went(case):
    reduction, _ = case
    owner, matrix = reduction.owner(), reduction.matrix()
    for sample in range(len(owner)):
        for token, slot in enumerate(owner[sample].tolist()):
            column = matrix[sample, :, token]
            assert (column == 0).all() if slot < 0 else column.abs().argmax() == slot or column[slot] == 0


@given(reductions())
def test_sizes_count_every_token_that_is_not_dropped(case):
    reduction, _ = case
    ones = torch.ones(reduction.index.shape[0], reduction.length)
    if reduction.resized is not None:
        assert torch.allclose(reduction.size(ones), reduction.matrix().sum(2), atol=1e-5)
        return
    assert torch.equal(reduction.size(ones).sum(1), (reduction.owner() >= 0).sum(1).float())


@given(reductions(), st.integers(0, 99))
def test_composition_is_one_after_the_other(case, other):
    first, seed = case
    generator = torch.Generator().manual_seed(other)
    index = torch.stack([torch.randperm(first.count, generator=generator) for _ in first.index])
    second = Reduction.keep(index[:, : max(1, first.count // 2)], first.count)
    x = numbers(seed, len(index), first.length, 3)
    both = first.compose(second)
    assert torch.allclose(both.apply(x), second.apply(first.apply(x)), atol=1e-5)


def test_an_average_keeps_the_mass_of_what_it_merges():
    size = torch.tensor([[1.0, 2.0, 3.0, 1.0]])
    x = numbers(0, 1, 4, 5)
    reduction = Reduction.average(
        torch.tensor([[0, 2]]), 4, torch.tensor([[1, 3]]), torch.tensor([[1, 1]]), size
    )
    after = reduction.apply(x) * reduction.size(size).unsqueeze(-1)
    assert torch.allclose(after.sum(1), (x * size.unsqueeze(-1)).sum(1), atol=1e-5)


def test_identity_is_bitwise():
    x = numbers(0, 2, 5, 3)
    assert torch.equal(Reduction.identity(2, 5).apply(x), x)


def test_restore_gives_survivors_their_slot_and_dropped_tokens_the_fill():
    reduction = Reduction.keep(torch.tensor([[2, 0]]), 3)
    y, fill = numbers(1, 1, 2, 4), numbers(2, 1, 3, 4)
    full = reduction.restore(y, fill)
    assert torch.equal(full[0], torch.stack([y[0, 1], fill[0, 1], y[0, 0]]))
    assert torch.equal(reduction.restore(y)[0, 1], torch.zeros(4))


def test_padding_slots_own_no_token():
    reduction = Reduction.keep(
        torch.tensor([[0, 1, 2], [0, 0, 2]]), 3, torch.tensor([[True] * 3, [False, True, True]])
    )
    assert reduction.owner().tolist() == [[0, 1, 2], [1, -1, 2]]


def test_tokens_are_gathered_alike_in_every_layout():
    x, index = numbers(0, 3, 5, 8), torch.tensor([[4, 0], [1, 1], [3, 2]])
    expected = torch.stack([row[place] for row, place in zip(x, index, strict=True)])
    for laid in (x, x.mT.contiguous().mT, torch.cat([x, x], dim=2)[:, :, :8]):
        assert torch.equal(gather_tokens(laid, index), expected)
    assert torch.equal(gather_tokens(x.unflatten(2, (2, 4)), index), expected.unflatten(2, (2, 4)))
    assert torch.equal(gather_tokens(x[..., 0], index), expected[..., 0])
    assert gather_tokens(x[:, :0], index[:, :0]).shape == (3, 0, 8)
