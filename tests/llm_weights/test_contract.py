"""What every method of the family must do, whatever its paper says."""

import copy

import pytest
import torch

from tests.decoders import decoder, tokens
from tests.llm_weights.tiny import fitting, logits, prune
from tprune.errors import UserError
from tprune.methods import registry
from tprune.models.blocks import find_decoder
from tprune.pipelines import prune_weights
from tprune.pipelines.stream import grouped_axis

NAMED = [fact.id for fact in registry.facts("llm-weights") if fact.learns == "no"]
METHODS = [name for name in NAMED if registry.load(name, "llm-weights").runs_on != ("encoder",)]
"""But those that are trained, of which test_movement.py tells: they change all that they may, at any sparsity."""
MASKING = [name for name in METHODS if registry.load(name, "llm-weights").scope == "block"]
STRUCTURED = [name for name in METHODS if registry.load(name, "llm-weights").scope == "model"]
TRAINING = [name for name in METHODS if registry.load(name, "llm-weights").regularised is not None]
"""Those that train before structure leaves, which they refuse to do in low precision."""
WHOLE = [name for name in METHODS if registry.load(name, "llm-weights").scope == "whole"]
PATTERNED = [name for name in METHODS if registry.load(name, "llm-weights").patterns]


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("method", METHODS)
def test_sparsity_zero_leaves_the_outputs_bitwise_equal(method, text):
    model, ids = fitting(method), tokens(2, 20)
    before = logits(model, ids)
    handle = prune(model, method, text, sparsity=0.0)
    assert torch.equal(logits(model, ids), before)
    assert handle.achieved().value == 0


@pytest.mark.parametrize("method", MASKING)
@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.75])
def test_the_count_of_removed_weights_is_exact(method, sparsity, text):
    model = decoder()
    assert prune(model, method, text, sparsity=sparsity).achieved().value == sparsity
    found = _driver(method).decoder(model)
    for index in range(len(found.blocks)):
        for matrix in found.matrices(index):
            assert (matrix.read() == 0).sum() == sparsity * matrix.shape[0] * matrix.shape[1]


@pytest.mark.parametrize("method", [name for name in WHOLE if name in PATTERNED])
def test_matrices_that_are_chosen_together_lose_the_count_together(method, text):
    model = decoder()
    assert prune(model, method, text, sparsity=0.5).achieved().value == 0.5
    found = find_decoder(model)
    matrices = [matrix.read() for index in range(len(found.blocks)) for matrix in found.matrices(index)]
    shares = [(matrix == 0).double().mean().item() for matrix in matrices]
    assert sum((matrix == 0).sum() for matrix in matrices) == sum(matrix.numel() for matrix in matrices) / 2
    assert max(shares) > min(shares) + 0.05


@pytest.mark.parametrize("method", PATTERNED)
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4"])
def test_a_pattern_holds_in_every_group(method, pattern, text):
    model = decoder()
    handle = prune(model, method, text, pattern=pattern)
    keep, group = map(int, pattern.split(":"))
    assert handle.achieved().value == 1 - keep / group
    assert handle.achieved().details["groups_within_pattern"] == 1
    driver = _driver(method)
    found = driver.decoder(model)
    for index in range(len(found.blocks)):
        for matrix in found.matrices(index):
            axis = grouped_axis(matrix, driver.method.groups_outputs)
            assert ((matrix.read() != 0).unflatten(axis, (-1, group)).sum(axis + 1) == keep).all()


@pytest.mark.parametrize("method", STRUCTURED)
def test_structure_removed_is_near_what_was_asked_and_is_really_gone(method, text):
    model = fitting(method)
    before = sum(parameter.numel() for parameter in model.parameters())
    handle = prune(model, method, text, sparsity=0.34)
    # Half of an MLP, or of a key-value group.
    step = 0.1 if "halves" in registry.load(method, "llm-weights").units else 0.04
    assert abs(handle.achieved().value - 0.34) < step
    assert sum(parameter.numel() for parameter in model.parameters()) < before


@pytest.mark.parametrize("method", STRUCTURED)
def test_structured_methods_refuse_patterns_by_name(method, text):
    with pytest.raises(UserError, match="--pattern 2:4"):
        prune(fitting(method), method, text, pattern="2:4")


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_weights_and_the_global_generator_is_untouched(method, text):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    models = fitting(method), fitting(method)
    torch.set_rng_state(before)
    for model in models:
        prune(model, method, text, sparsity=0.4)
    assert torch.equal(torch.get_rng_state(), before)
    assert same(state(models[0]), state(models[1]))


@pytest.mark.parametrize("method", METHODS)
def test_the_batch_size_of_calibration_changes_no_choice(method, text):
    models = fitting(method), fitting(method)
    for model, batch in zip(models, (1, 4), strict=True):
        prune(model, method, text, sparsity=0.4, batch_size=batch)
    one, other = state(models[0]), state(models[1])
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name] == 0, other[name] == 0)
        assert torch.allclose(one[name], other[name], atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_embeddings_head_and_norms_are_not_touched_and_tied_weights_stay_tied(method, text):
    model = fitting(method, tie_word_embeddings=True)
    before = state(model)
    prune(model, method, text, sparsity=0.4)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(model.state_dict()[name], before[name])


@pytest.mark.parametrize("method", METHODS)
def test_what_is_stored_makes_the_same_edit_on_the_dense_model_and_none_on_the_pruned_one(method, text):
    model, ids = fitting(method), tokens(2, 20)
    dense = copy.deepcopy(model)
    handle = prune(model, method, text, sparsity=0.4)
    driver = _driver(method)
    prune_weights.reload(driver, driver.decoder(dense), handle.tensors(by_reference=True))
    assert torch.equal(logits(dense, ids), logits(model, ids))
    prune_weights.reload(driver, driver.decoder(model), handle.tensors(by_reference=False))
    assert torch.equal(logits(dense, ids), logits(model, ids))


def _driver(method):
    from tprune.pipelines.run import pipeline
    from tprune.progress import Progress
    from tprune.recipe import ModelSource, Recipe, Stage

    stage = Stage("llm-weights", method, sparsity=0.4)
    return pipeline(Recipe(ModelSource("tiny"), (stage,)), stage, Progress())


def test_a_model_in_training_is_calibrated_without_dropout_and_stays_in_training(text):
    model, other = decoder("gpt2").train(), decoder("gpt2")
    model.requires_grad_(True)
    prune(model, "flap", text, sparsity=0.3)
    prune(other, "flap", text, sparsity=0.3)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert same(state(model), state(other))


@pytest.mark.parametrize(
    "method", [name for name in METHODS if not registry.build(name, "llm-weights").varies()]
)
def test_a_method_without_a_budget_says_what_to_give(method, text):
    with pytest.raises(UserError, match="--sparsity"):
        prune(fitting(method), method, text)


@pytest.mark.parametrize("method", METHODS)
def test_a_budget_that_rounds_to_nothing_is_refused(method, text):
    with pytest.raises(UserError, match="--sparsity"):
        prune(fitting(method), method, text, sparsity=1e-5)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in TRAINING])
def test_low_precision_weights_stay_in_their_dtype(method, text):
    model = fitting(method).bfloat16()
    prune(model, method, text, sparsity=0.4)
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    assert logits(model, tokens(1, 9)).isfinite().all()
