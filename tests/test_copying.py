"""A model with a method at work in it refuses to be copied, whatever the family; before and behind it is copied."""

import copy

import pytest
import torch
from torch import nn

import tprune
from tests.conftest import tiny_vit
from tests.decoders import decoder
from tests.encoders import encoder
from tests.vlm.tiny import tiny
from tprune.errors import UserError
from tprune.models.subject import twin

FAMILIES = [
    ("vit/tome", tiny_vit),
    ("vit/zero-tprune", tiny_vit),
    ("vlm/visionzip", lambda: tiny("llava")),
    ("vlm/fastv", lambda: tiny("llava")),
    ("vlm/plphp", lambda: tiny("llava")),
    ("llm-context/snapkv", decoder),
    ("llm-context/lazyllm", decoder),
    ("llm-context/spatten", decoder),
    ("llm-context/infinitehip", decoder),
    ("llm-context/ltp", encoder),
]
"""Before and inside a decoder; in caches, in heads, in what queries read, and in a text encoder."""


@pytest.mark.parametrize("at", ["itself", "inside another", "beside others"])
@pytest.mark.parametrize(("method", "make"), FAMILIES, ids=[method for method, _ in FAMILIES])
def test_a_model_at_work_refuses_to_be_copied_and_is_as_it_was_behind(method, make, at):
    model = make()
    asked = {"itself": model, "inside another": nn.Sequential(model), "beside others": [model]}[at]
    before = [set(vars(module)) for module in model.modules()]
    message = f"^{method.partition('/')[2]} is at work in this model, which cannot be copied"
    budget = {"final_threshold": 0.02} if method == "llm-context/ltp" else {"keep": 0.75}
    with tprune.prune(model, method, **budget) as handle:
        with pytest.raises(UserError, match=message):
            copy.deepcopy(asked)
        with pytest.raises(UserError, match=message):
            twin(model)
    assert [set(vars(module)) for module in model.modules()] == before
    # What `tprune.load` leaves on a model does not keep it from being copied either.
    model.tprune_handle = handle
    again = copy.deepcopy(model)
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    shared = {id(one) for one in model.parameters()}
    assert shared.isdisjoint(map(id, again.parameters()))
    assert shared == set(map(id, twin(model).parameters()))


@pytest.mark.parametrize("first", [0, 1])
def test_of_two_methods_the_one_that_stays_keeps_the_model_from_being_copied(first):
    model, names = tiny("llava"), ("visionzip", "divprune")
    handles = [tprune.prune(model, f"vlm/{name}", keep=0.5) for name in names]
    handles[first].remove()
    with pytest.raises(UserError, match="is at work in this model"):
        copy.deepcopy(model)
    handles[1 - first].remove()
    copy.deepcopy(model)
