"""Methods that prune a block as a whole, against a re-implementation on the same tiny model (see wanda-pp.json)."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.decoders import decoder, tokens
from tests.golden_values import golden
from tests.llm_weights.tiny import prune
from tprune.methods import registry
from tprune.methods.weights import WeightBudget
from tprune.models.blocks import find_decoder
from tprune.models.calibrate import Stream
from tprune.pipelines.journal import Journal
from tprune.pipelines.stream import BlockPruner
from tprune.progress import Progress


def pruned(model, ids, keep, seed=0, **settings):
    """The model after wanda-pp by `keep` weights of every four."""
    found = find_decoder(model)
    method = registry.build("wanda-pp", "llm-weights", settings)
    budget = WeightBudget(1 - keep / 4, (keep, 4))
    BlockPruner(found, method, budget, seed, Stream(found, ids, 2), Progress()).run(Journal(None, ""))
    return model


@pytest.mark.parametrize(
    ("case", "keep", "settings"),
    [
        ("rgs_2_4", 2, {"rounds": 0}),
        ("ro_2_4", 2, {"rounds": 3, "samples": 4, "rate": 1e-3}),
        ("ro_keep1_4", 1, {"rounds": 3, "samples": 4, "rate": 1e-3}),
    ],
)
def test_wanda_pp_gives_the_weights_of_the_public_port(case, keep, settings):
    tensors, told = golden("llm-weights", "wanda-pp")
    model = LlamaForCausalLM(LlamaConfig(**told["settings"]["config"])).eval()
    model.load_state_dict({key[6:]: value for key, value in tensors.items() if key.startswith("model/")})
    pruned(model, tensors["ids"], keep, told["settings"]["seed"], **settings)
    expected = {key[len(case) + 1 :]: value for key, value in tensors.items() if key.startswith(f"{case}/")}
    assert expected
    for name, weight in expected.items():
        found = model.get_parameter(name)
        assert torch.equal(found == 0, weight == 0)
        assert torch.allclose(found, weight, rtol=1e-4, atol=1e-5)


def test_regional_optimisation_brings_the_first_block_nearer_to_the_dense_one():
    model, ids = decoder(), tokens(6, 20)
    hidden = [copy.deepcopy(model)]
    hidden += [pruned(copy.deepcopy(model), ids, 2, rounds=rounds, rate=1e-3) for rounds in (0, 5)]
    dense, *ours = (_after_first_block(each, ids) for each in hidden)
    scored, trained = ((each - dense).square().sum() for each in ours)
    assert trained < 0.9 * scored


def _after_first_block(model, ids):
    stream = Stream(find_decoder(model), ids, 2)
    stream.advance(0)
    return stream.hidden


def test_without_gradients_and_rounds_the_first_matrices_go_by_wanda_s_rule(text):
    models = decoder(), decoder()
    prune(models[0], "wanda-pp", text, sparsity=0.5, alpha=0, rounds=0)
    prune(models[1], "wanda", text, sparsity=0.5)
    one, other = (model.model.layers[0].self_attn for model in models)
    for name in ("q_proj", "k_proj", "v_proj"):
        assert torch.equal(getattr(one, name).weight, getattr(other, name).weight)


@pytest.mark.parametrize("name", ["gpt2", "phi3", "mixtral", "gemma2", "opt", "gpt-neox"])
def test_blocks_of_every_build_are_pruned_as_a_whole_and_keep_their_dtype(name, text):
    model = decoder(name).bfloat16()
    handle = prune(model, "wanda-pp", text, pattern="2:4", rounds=1, samples=2)
    assert handle.achieved().value == 0.5
    assert handle.achieved().details["groups_within_pattern"] == 1
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in model.parameters())
