import torch

from tprune.core import graph


def test_of_equally_similar_tokens_the_lower_ones_are_neighbours_and_none_is_its_own():
    same = torch.ones(1, 4, 3)
    near = graph.similar_neighbours(same, 2)[0]
    assert near.int().tolist() == [[0, 1, 1, 0], [1, 0, 1, 0], [1, 1, 0, 0], [1, 1, 0, 0]]


def test_a_token_is_joined_to_the_most_similar_ones():
    angle = torch.tensor([0.0, 0.1, 1.0, 1.2])
    tokens = torch.stack([angle.cos(), angle.sin()], 1)[None]
    near = graph.similar_neighbours(tokens, 1)[0]
    assert near.int().argmax(1).tolist() == [1, 0, 3, 2]
    assert torch.equal(graph.similar_neighbours(tokens, 9)[0], ~torch.eye(4, dtype=torch.bool))
