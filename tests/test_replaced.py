"""A function that gives way to another comes back, whosever it was."""

import pytest
import torch
from torch import nn

import tprune
from tests.conftest import tiny_vit
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
