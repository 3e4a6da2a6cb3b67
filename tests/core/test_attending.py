from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tprune.core import attending
from tprune.methods.attention import Attention


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def full_attention(query, key, scale, causal, bias=None):
    """Softmaxed attention the plain way."""
    logits = query @ key.repeat_interleave(query.shape[1] // key.shape[1], dim=1).transpose(-1, -2) * scale
    if bias is not None:
        logits = logits + bias
    if causal:
        rows, keys = logits.shape[-2:]
        hidden = torch.ones(rows, keys).tril(keys - rows) == 0
        logits = logits.masked_fill(hidden, -torch.inf)
    return logits.softmax(-1)


@given(st.integers(0, 99), st.booleans(), st.sampled_from([1, 2, 4]), st.integers(0, 5))
def test_rows_equal_those_of_the_full_map(seed, causal, groups, past):
    query, key = drawn(seed, 2, 4, 7, 8), drawn(seed + 1, 2, groups, 7 + past, 8)
    expected = full_attention(query, key, 0.3, causal)
    assert torch.allclose(attending.attention_rows(query, key, 0.3, causal=causal), expected, atol=1e-6)
    some = attending.attention_rows(query, key, 0.3, rows=slice(-2, None), causal=causal)
    assert torch.allclose(some, expected[:, :, -2:], atol=1e-6)
    each = torch.tensor([[0], [6]])
    own = attending.attention_rows(query, key, 0.3, rows=each, causal=causal)
    assert torch.allclose(own, torch.stack([expected[0, :, :1], expected[1, :, 6:]]), atol=1e-6)


@given(st.integers(0, 99), st.booleans(), st.integers(1, 9))
def test_column_sums_equal_those_of_the_full_map_for_any_tile(seed, causal, tile):
    query, key = drawn(seed, 2, 4, 9, 8), drawn(seed + 1, 2, 2, 9, 8)
    bias = drawn(seed + 2, 2, 1, 9, 9)
    expected = full_attention(query, key, 0.3, causal, bias).sum(2)
    found = attending.attention_column_sums(query, key, 0.3, bias=bias, causal=causal, tile=tile)
    assert torch.allclose(found, expected, atol=1e-5)


HIDDEN = {
    "a mask for all queries": (torch.tensor([[False] * 5, [True] * 4 + [False]])[:, None, None], False),
    "the same, added": (torch.tensor([[-torch.inf] * 5, [0.0] * 4 + [-torch.inf]])[:, None, None], False),
    "a mask beside a causal one": (
        torch.tensor([[False, False, True, True, True], [True] * 5])[:, None, None],
        True,
    ),
    "a row of its own for each query": (
        torch.tensor([[True] * 5] * 4 + [[False] * 5]).expand(2, 1, 5, 5),
        True,
    ),
}


@pytest.mark.parametrize("case", HIDDEN)
@pytest.mark.parametrize("counts", [None, torch.tensor([[True] * 5, [True, True, True, False, True]])])
def test_blind_queries_add_nothing_to_column_sums_and_a_broken_one_shows(case, counts):
    query, key = drawn(3, 2, 4, 5, 8), drawn(4, 2, 2, 5, 8)
    bias, causal = HIDDEN[case]
    added = bias if bias.is_floating_point() else torch.zeros(bias.shape).masked_fill(~bias, -torch.inf)
    expected = full_attention(query, key, 0.3, causal, added).nan_to_num()
    if counts is not None:
        expected = expected * counts[:, None, :, None]

    def sums():
        return attending.attention_column_sums(
            query, key, 0.3, bias=bias, causal=causal, counted=counts, tile=2
        )

    assert torch.allclose(sums(), expected.sum(2), atol=1e-6)
    query[1, 2, 3] = torch.nan
    shown = counts is None
    assert sums()[1, 2].isnan().any() == shown
    assert not sums()[0].isnan().any()
    assert not sums()[1, :2].isnan().any()


def test_the_least_number_hides_as_minus_infinity_does():
    query, key = drawn(3, 2, 4, 5, 8), drawn(4, 2, 2, 5, 8)
    for bias in (
        HIDDEN["the same, added"][0],
        torch.zeros(2, 1, 5, 5).index_fill(2, torch.tensor(1), -torch.inf),
    ):
        least = bias.clamp_min(torch.finfo().min)
        sums = [attending.attention_column_sums(query, key, 0.3, bias=one, tile=2) for one in (bias, least)]
        assert torch.equal(*sums)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("added", [False, True])
def test_column_sums_have_the_gradient_of_those_of_the_full_map(causal, softcap, added):
    query, key = (drawn(seed, 2, 4, 5, 8).requires_grad_() for seed in (3, 4))
    visible = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    visible[0, :, 1] = False  # a blind query
    visible[:, :, 2, 0] = False
    bias = torch.zeros(visible.shape).masked_fill(~visible, -torch.inf) if added else visible
    sums = attending.attention_column_sums(query, key, 0.3, bias=bias, causal=causal, softcap=softcap, tile=2)
    logits = 0.3 * query @ key.mT
    logits = logits if softcap is None else softcap * (logits / softcap).tanh()
    shown = visible.tril() if causal else visible
    logits = logits.masked_fill(~shown, -1e9).softmax(3) * shown.any(3, keepdim=True)
    weight = drawn(5, *sums.shape)
    expected = torch.autograd.grad((logits.sum(2) * weight).sum(), (query, key))
    found = torch.autograd.grad((sums * weight).sum(), (query, key))
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("decay", [1.0, 0.9])
@pytest.mark.parametrize("some", [False, True])
def test_a_map_that_is_there_has_the_column_sums_that_are_computed_without_it(decay, some):
    query, key = drawn(1, 2, 4, 7, 4), drawn(2, 2, 2, 7, 4)
    counted = torch.ones(2, 7, dtype=torch.bool)
    counted[1, 5:] = False
    plain = Attention(query, key, key, 0.5, causal=True)
    known = replace(plain, query=None, key=None, map=plain.rows())
    asked = counted if some else None
    torch.testing.assert_close(known.column_sums(decay, asked), plain.column_sums(decay, asked))
