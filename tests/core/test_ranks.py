import torch
from hypothesis import given
from hypothesis import strategies as st

from tprune.core import ranks


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(1, 64))
def test_a_total_is_shared_out_whole_within_one_of_its_proportions(weights, total):
    weight = torch.tensor([weights]).float()
    shares = ranks.apportion(weight, torch.tensor([total]))[0]
    if not any(weights):
        return
    assert int(shares.sum()) == total
    exact = total * weight[0] / weight.sum()
    assert bool(((shares - exact).abs() <= 1 + 1e-3).all())


def test_leftovers_go_to_the_largest_weights():
    shares = ranks.apportion(torch.tensor([[1.0, 3.0, 1.0], [1.0, 1.0, 1.0]]), torch.tensor([4, 4]))
    assert shares.tolist() == [[1, 3, 0], [2, 1, 1]]
