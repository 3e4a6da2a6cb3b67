"""Gradient statistics, and the methods that read them, against the authors' code on the same tiny model."""

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.decoders import decoder, tokens
from tests.golden_values import golden
from tests.llm_weights.tiny import prune
from tprune.methods import registry
from tprune.methods.weight_view import LinearView
from tprune.methods.weights import WeightBudget
from tprune.models.blocks import find_decoder
from tprune.models.calibrate import Stream
from tprune.models.gradients import gradient_norms
from tprune.pipelines.journal import Journal
from tprune.pipelines.stream import BlockPruner
from tprune.progress import Progress

BUDGETS = {"s50": (0.5, None), "s30": (0.3, None), "2_4": (0.5, (2, 4)), "4_8": (0.5, (4, 8))}


def recorded(name):
    """The tiny model of the golden values, its tokens and the authors' gradients (100 times ours)."""
    tensors, told = golden("llm-weights", name)
    model = LlamaForCausalLM(LlamaConfig(**told["settings"]["config"])).eval()
    model.load_state_dict({key[6:]: value for key, value in tensors.items() if key.startswith("model/")})
    gradients = {key[9:]: value for key, value in tensors.items() if key.startswith("gradient/")}
    return SimpleNamespace(
        tensors=tensors, decoder=find_decoder(model), ids=tensors["ids"], gradients=gradients
    )


def removed(given, method, case, settings):
    """What is zero after a run over all blocks, by parameter."""
    built = registry.build(method, "llm-weights", settings)
    gradients = {"gradient": {name: value / 100 for name, value in given.gradients.items()}}
    stream = Stream(given.decoder, given.ids, 2) if "norm" in built.stats else None
    budget = WeightBudget(*BUDGETS[case])
    BlockPruner(given.decoder, built, budget, 0, stream, Progress(quiet=True), None, gradients).run(
        Journal(None, "")
    )
    return {name: given.decoder.model.get_parameter(name) == 0 for name in given.gradients}


def test_gradients_are_the_authors_sequence_by_sequence():
    given = recorded("gblm")
    found = gradient_norms(given.decoder, given.ids)
    assert found.keys() == given.gradients.keys()
    for name, expected in given.gradients.items():
        assert torch.allclose(100 * found[name], expected, rtol=1e-3, atol=1e-5 * expected.max())


@pytest.mark.parametrize(
    ("method", "name", "case", "settings"),
    [
        *(("gblm", case, case, {}) for case in BUDGETS),
        ("gblm", "variant_s50", "s50", {"variant": True}),
        ("gblm", "inverse_s50", "s50", {"metric": "inverse"}),
        ("gblm", "gradient_s50", "s50", {"metric": "gradient"}),
        *(("pruner-zero", case, case, {}) for case in ("s50", "s30", "2_4")),
        ("pruner-zero", "variant_s50", "s50", {"variant": True}),
    ],
)
def test_the_authors_weights_go_block_after_block(method, name, case, settings):
    given = recorded(method)
    for parameter, gone in removed(given, method, case, settings).items():
        assert torch.equal(gone, given.tensors[f"{name}/{parameter}"])


def test_without_its_gradient_term_gblm_is_wanda(text):
    models = decoder(), decoder()
    prune(models[0], "gblm", text, sparsity=0.5, scale=0)
    prune(models[1], "wanda", text, sparsity=0.5)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)


def test_where_all_gradients_are_equal_pruner_zero_goes_by_magnitude():
    weight = torch.tensor([[4.0, -1.0, 2.0, 3.0]])
    method = registry.build("pruner-zero", "llm-weights")
    edit = method.prune(LinearView("w", 0, weight, gradient=torch.ones(1, 4)), WeightBudget(0.5), None)
    assert edit.mask.tolist() == [[False, True, True, False]]


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "mixtral"])
def test_every_prunable_parameter_gets_a_gradient_and_the_model_keeps_its_own(name):
    model = decoder(name)
    kept = next(model.parameters())
    kept.requires_grad_(True)
    kept.grad = torch.ones_like(kept)
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    found = find_decoder(copy.deepcopy(model))
    gradients = gradient_norms(find_decoder(model), tokens(2, 12))
    assert wanted == [parameter.requires_grad for parameter in model.parameters()]
    assert torch.equal(kept.grad, torch.ones_like(kept))
    for index in range(len(found.blocks)):
        for matrix in found.matrices(index):
            assert matrix.cut(gradients[matrix.parameter_name]).shape == matrix.shape
    assert all(gradient.any() for gradient in gradients.values())
