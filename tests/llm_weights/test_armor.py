"""A sparse core between block-diagonal matrices: factors against the authors' code, and the layers that hold them."""

import pytest
import torch

from tests.decoders import decoder, tokens
from tests.golden_values import golden
from tests.llm_weights.tiny import logits, prune
from tprune.core.factorise import (
    Factors,
    between,
    choose_groups,
    fit_factors,
    largest_divisor,
    relative_error,
    unit_norms,
)
from tprune.core.mask import weight_mask
from tprune.core.statistics import Norm
from tprune.errors import UserError
from tprune.methods import registry
from tprune.methods.weight_view import LinearView
from tprune.methods.weights import WeightBudget
from tprune.models.blocks import find_decoder
from tprune.models.factored import is_wrapped

CASES = golden("llm-weights", "armor")[1]["settings"]["cases"]


def inputs():
    """The authors' weights and inputs as the method sees them, and what they found."""
    tensors, told = golden("llm-weights", "armor")
    made = Norm()
    made.add(tensors["X"])
    tokens = tensors["X"].shape[0] * tensors["X"].shape[1]
    view = LinearView("w", 0, tensors["W"], norm=made.result()["norm"], tokens=tokens)
    return tensors, told["settings"], view


@pytest.mark.parametrize("case", CASES)
def test_the_factors_are_the_authors(case):
    tensors, settings, view = inputs()
    setting = settings["cases"][case]
    importance = registry.build("armor", "llm-weights").importance(view)
    assert torch.allclose(importance, tensors["hessian_diagonal"], rtol=1e-5)
    weight, rows, columns = unit_norms(view.weight)
    gone = weight_mask(weight.square() * importance, 0.5, setting["pattern"], "layer")
    factors = Factors.start(weight, ~gone, setting["blocks"])
    generator = torch.Generator().manual_seed(settings["torch.manual_seed before each run"])
    pattern, iterations = setting["pattern"], setting["iterations"]
    fit_factors(factors, weight, importance, pattern, iterations, settings["rate"], generator)
    assert torch.equal(factors.stays, tensors[f"{case}.mask"])
    # What Adam makes of rounding: at most some of its steps.
    slack = settings["rate"] * (1 + iterations / 4)
    assert torch.allclose(factors.outward, tensors[f"{case}.A"], atol=slack)
    assert torch.allclose(factors.inward, tensors[f"{case}.B"], atol=slack)
    found = between(factors.outward, factors.sparse(), factors.inward) * rows.unsqueeze(1) * columns
    assert torch.allclose(found, tensors[f"{case}.W"], atol=0.03)


@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (4, 8)])
def test_a_step_of_the_core_never_makes_the_error_grow_and_keeps_the_pattern(pattern):
    _, _, view = inputs()
    importance = registry.build("armor", "llm-weights").importance(view)
    weight, _, _ = unit_norms(view.weight)
    factors = Factors.start(weight, ~weight_mask(weight.square(), 0.5, pattern), (8, 8))
    generator = torch.Generator().manual_seed(0)
    factors.outward += 0.1 * torch.randn(factors.outward.shape, generator=generator)
    errors = []
    for _ in range(12):
        choose_groups(factors, weight, importance, pattern, generator)
        errors.append(relative_error(factors, factors.sparse(), weight, importance).item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0]
    assert (factors.stays.unflatten(1, (-1, pattern[1])).sum(2) == pattern[0]).all()


def test_without_iterations_the_product_is_the_masked_weight_and_with_them_it_is_nearer():
    tensors, _, view = inputs()
    budget = WeightBudget(0.5, (2, 4))
    losses = []
    for iterations in (0, 60):
        method = registry.build("armor", "llm-weights", {"iterations": iterations, "block": 8, "rate": 1e-3})
        edit = method.prune(view, budget, torch.Generator().manual_seed(0))
        found = between(edit.around[0], edit.weight, edit.around[1])
        losses.append(((found - view.weight).square() * tensors["hessian_diagonal"]).sum())
        if not iterations:
            assert torch.allclose(found, view.weight.masked_fill(edit.mask, 0), atol=1e-5)
    assert losses[1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    ("width", "most", "multiple", "size"), [(576, 128, 4, 96), (48, 128, 1, 48), (12, 2, 4, 4)]
)
def test_blocks_are_the_largest_divisors_that_a_group_fits_into(width, most, multiple, size):
    assert largest_divisor(width, most, multiple) == size


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_a_wrapped_layer_computes_the_product_of_its_factors_with_its_bias_outside(name, text):
    model = decoder(name)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.normal_(generator=torch.Generator().manual_seed(0))
    prune(model, "armor", text, pattern="2:4")
    found = find_decoder(model)
    for module in found.inputs(1).values():
        assert is_wrapped(module)
        x = torch.randn(5, module.in_features, generator=torch.Generator().manual_seed(1))
        merged = between(module.outward, module.weight, module.inward)
        assert torch.allclose(module(x), torch.nn.functional.linear(x, merged, module.bias), atol=1e-4)
    assert logits(model, tokens(2, 9)).isfinite().all()


def test_more_weights_can_go_from_the_cores_but_nothing_is_put_around_them_again(text):
    model = decoder()
    prune(model, "armor", text, pattern="2:4")
    prune(model, "wanda", text, sparsity=0.75)
    cores = [matrix.read() for index in range(3) for matrix in find_decoder(model).matrices(index)]
    assert all((core == 0).sum() == 0.75 * core.numel() for core in cores)
    for method in ("armor", "shortgpt", "llm-surgeon"):
        with pytest.raises(UserError, match=method):
            prune(model, method, text, sparsity=0.34)


def test_fused_matrices_and_plain_artifacts_are_refused(text):
    with pytest.raises(UserError, match="fused"):
        prune(decoder("phi3"), "armor", text, pattern="2:4")
    with pytest.raises(UserError, match="--loadable plain"):
        prune(decoder(), "armor", text, pattern="2:4", loadable="plain")
