import torch
from hypothesis import given
from hypothesis import strategies as st

from tprune.core import statistics
from tprune.core.select import keep_by_cost


@given(st.integers(0, 99), st.sampled_from([1, 2, 5]))
def test_statistics_do_not_depend_on_how_sequences_are_batched(seed, batch):
    x = torch.randn(5, 6, 9, generator=torch.Generator().manual_seed(seed)) + 3
    for kind in statistics.KINDS.values():
        whole, parts = kind(), kind()
        whole.add(x)
        for chunk in x.split(batch):
            parts.add(chunk)
        for name, value in whole.result().items():
            assert torch.allclose(parts.result()[name], value, rtol=1e-3, atol=1e-4)


@given(st.integers(0, 99))
def test_statistics_are_their_definitions(seed):
    x = torch.randn(4, 7, 10, generator=torch.Generator().manual_seed(seed)) + 1
    flat = x.flatten(0, 1)
    seen = statistics.Inputs(("norm", "gram", "moments"))
    seen.add(x)
    found = seen.result()
    assert seen.tokens == 28
    assert torch.allclose(found["norm"], flat.norm(dim=0))
    assert torch.allclose(found["gram"], flat.T @ flat / 2, rtol=1e-4, atol=1e-4)
    assert torch.allclose(found["mean"], flat.mean(0), atol=1e-6)
    assert torch.allclose(found["variance"], flat.var(0), rtol=1e-4)


def test_a_wide_gram_matrix_is_mirrored_right(monkeypatch):
    monkeypatch.setattr(statistics.Gram, "strip", 4)
    x = torch.randn(2, 30, 10)
    made = statistics.Gram()
    made.add(x)
    assert torch.allclose(made.result()["gram"], torch.einsum("nlc,nld->cd", x, x), rtol=1e-4, atol=1e-4)


def test_low_precision_inputs_are_accumulated_in_float32():
    x = torch.full((1, 4000, 2), 1.001).bfloat16()
    for kind in ("norm", "gram", "moments"):
        seen = statistics.Inputs((kind,))
        seen.add(x)
        assert all(value.dtype == torch.float32 for value in seen.result().values())
    norm = statistics.Norm()
    norm.add(x)
    assert abs(norm.result()["norm"][0].item() - 4000**0.5) < 1e-3


def test_a_zero_token_is_halfway_similar():
    assert statistics.token_cosine(torch.zeros(3), torch.ones(3)) == 0.5


@given(st.integers(0, 999), st.floats(0, 1))
def test_units_kept_by_cost_are_the_best_and_within_half_a_unit_of_the_budget(seed, share):
    generator = torch.Generator().manual_seed(seed)
    score = torch.randint(0, 5, (12,), generator=generator).float()
    cost = torch.randint(1, 9, (12,), generator=generator)
    budget = share * cost.sum().item()
    keep = keep_by_cost(score, cost, budget)
    assert abs(cost[keep].sum().item() - budget) <= cost.max() / 2
    if keep.any() and not keep.all():
        assert score[keep].min() >= score[~keep].max()
