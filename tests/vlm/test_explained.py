"""What an answer came from, and the network that foretells it."""

import pytest
import torch
from torch import nn

from tests.vlm.test_fit import course
from tests.vlm.test_learned import prompt
from tprune.core.explain import attention_relevance
from tprune.methods import registry
from tprune.methods.tokens import Shape
from tprune.methods.vlm.explain_compress import foretold


def test_relevance_is_the_mean_row_of_the_product_over_all_layers():
    generator = torch.Generator().manual_seed(0)
    maps = [torch.rand(2, 3, 6, 6, generator=generator).tril() for _ in range(4)]
    gradients = [torch.randn(2, 3, 6, 6, generator=generator) for _ in range(4)]
    start = torch.tensor([[False, False, False, True, True, False], [False] * 5 + [True]])
    found = attention_relevance(maps, gradients, start)
    for row in range(2):
        assert torch.allclose(found[row], plainly(maps, gradients, row)[start[row]].mean(0), atol=1e-5)


def plainly(maps, gradients, row):
    """The product over all layers, of one prompt: [N, N]."""
    whole = torch.eye(maps[0].shape[-1])
    for attention, gradient in zip(maps, gradients, strict=True):
        whole = whole + (attention[row] * gradient[row]).clamp(min=0).mean(0) @ whole
    return whole


def network(inner):
    return nn.Sequential(nn.Conv2d(inner, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 1, 3, padding=1))


def test_the_network_reads_every_crop_by_itself_and_newlines_have_no_relevance():
    view, layers = prompt(), network(2)
    cells = view.signal("cells").clone()
    # The second prompt has a crop of two rows and three columns, a newline, and one of two cells.
    places = [
        (1, 0, 0),
        (1, 0, 1),
        (1, 0, 2),
        (1, 1, 0),
        (1, 1, 1),
        (1, 1, 2),
        (-1, -1, -1),
        (2, 0, 0),
        (2, 1, 0),
    ]
    cells[1, 2:11] = torch.tensor(places)
    attention = view.attention
    view.signals = {"cells": lambda: cells, "next_attention": lambda: attention}
    found = foretold(view, [layers[0].weight, layers[2].weight], [layers[0].bias, layers[2].bias])
    rows = attention.rows().nan_to_num()
    for row, crops in enumerate([[((3, 3), slice(2, 11))], [((2, 3), slice(2, 8)), ((2, 1), slice(9, 11))]]):
        paid = rows[row, :, 11:].sum(1)
        paid = paid / paid[:, 2:11].mean(1, keepdim=True)
        for size, own in crops:
            expected = layers(paid[:, own].reshape(1, 2, *size)).flatten()
            assert torch.allclose(found[row, own], expected, atol=1e-5)
    assert found[1, 8] == -torch.inf
    assert (found[:, :2] == -torch.inf).all()


def test_it_learns_what_the_answers_came_from():
    built = registry.build("explain-compress", "vlm")
    found, (inputs, labels) = course("explain-compress")
    fit = built.fit(found.shape, 0.5, 0)
    training = found.driver(built, fit, 0)
    outputs = found.outputs(inputs)
    memory = training.memory | {"inputs": inputs}
    maps = [memory["attention"][layer] for layer in range(found.shape.depth)]
    gradients = torch.autograd.grad(
        outputs.log_softmax(-1).gather(1, labels[:, None]).sum(), maps, retain_graph=True
    )
    loss = fit.losses(outputs, labels, memory, None)["relevance"]
    training.remove()
    answers, image = inputs["answers"], memory["image"]
    expected = 0
    for row in range(len(answers)):
        told = plainly(maps, gradients, row)[answers[row].nonzero().squeeze(1) - 1].mean(0)[image[row]]
        told, said = told / told.sum(), memory["said"][row][image[row]].log_softmax(0)
        expected -= (told * said).sum() / len(answers)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    loss.backward()
    assert all(weight.grad.abs().sum() > 0 for weight in fit.weights)


def test_the_network_is_as_deep_as_asked():
    built = registry.build("explain-compress", "vlm", {"layers": 1})
    state = built.neutral_state(Shape(4, 16, heads=4, width=32), 0)
    assert {name: tuple(part.shape) for name, part in state.items()} == {
        "0.weight": (1, 4, 3, 3),
        "0.bias": (1,),
    }
