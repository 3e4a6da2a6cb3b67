"""A function that gives way to another comes back, whosever it was."""

import itertools

import pytest
import torch
from torch import nn

import tprune
from tests.conftest import tiny_vit
from tests.vlm.tiny import tiny
from tprune.models.replaced import replaced


@pytest.mark.parametrize("own", [False, True])
def test_the_function_comes_back_also_after_an_error(own):
    module, before = nn.Linear(2, 2), lambda x: x + 1
    if own:
        module.forward = before
    with pytest.raises(ZeroDivisionError), replaced(module, lambda x: x / 0 if x is None else x):
        assert module(torch.ones(1)).item() == 1
        raise ZeroDivisionError
    assert vars(module).get("forward") is (before if own else None)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_several_that_stand_in_one_place_may_leave_in_any_order(own, order):
    module, before = nn.Linear(2, 2), lambda x: x
    if own:
        module.forward = before
    found = set(vars(module))
    standing = [replaced(module, lambda x, place=place: place) for place in range(3)]
    for one in standing:
        one.__enter__()
    left = [0, 1, 2]
    for place in order:
        standing[place].__exit__(None, None, None)
        left.remove(place)
        if 2 in left:
            assert module(None) == 2
    assert vars(module).get("forward") is (before if own else None)
    assert set(vars(module)) == found


def test_two_methods_in_one_model_may_leave_in_any_order():
    model = tiny("llava")
    before = [set(vars(module)) for module in model.modules()]
    first, second = (tprune.prune(model, method, keep=0.5) for method in ("visionzip", "divprune"))
    first.remove()
    second.remove()
    assert [set(vars(module)) for module in model.modules()] == before


def test_a_token_method_gives_a_block_back_the_forward_that_it_had(images):
    model = tiny_vit()
    block, calls = model.blocks[1], []

    def own(*args, **kwargs):
        calls.append(args)
        return type(block).forward(block, *args, **kwargs)

    block.forward = own
    dense = model(images)
    with tprune.prune(model, "tome", keep=0.7):
        model(images)
    assert len(calls) == 1
    assert torch.equal(model(images), dense)
    assert len(calls) == 2
