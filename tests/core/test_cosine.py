import torch

from tprune.core import cosine


def test_cosines_are_those_of_every_pair_whatever_the_strips():
    draw = torch.Generator().manual_seed(0)
    rows, columns = torch.randn(2, 5, 7, generator=draw), torch.randn(2, 200, 7, generator=draw)
    expected = torch.cosine_similarity(rows.unsqueeze(2), columns.unsqueeze(1), dim=-1)
    assert torch.allclose(cosine.between(rows, columns), expected, atol=1e-6)
    own = cosine.among(columns)
    expected = torch.cosine_similarity(columns.unsqueeze(2), columns.unsqueeze(1), dim=-1)
    assert torch.allclose(own, expected, atol=1e-6)


def test_a_vector_of_zeros_resembles_nothing():
    x = torch.tensor([[[0.0, 0.0], [3.0, 4.0]]])
    assert torch.allclose(cosine.among(x), torch.tensor([[[0.0, 0.0], [0.0, 1.0]]]))
    assert torch.allclose(cosine.between(x, x), cosine.among(x))
