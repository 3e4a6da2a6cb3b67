"""Experts as removable units, and what becomes of their neurons."""

import copy

import pytest
import torch
import transformers

from tests.decoders import decoder, tokens
from tests.llm_weights.tiny import EXPERTS, logits, prune, stepwise_logits
from tprune.core.recombine import recombine
from tprune.core.weights import StructureEdit
from tprune.errors import UserError
from tprune.models import shapes
from tprune.models.blocks import find_decoder
from tprune.models.experts import mixture
from tprune.models.halves import masked

KEEP = torch.tensor([0, 2, 3])


def edits(keep, blocks=3):
    return [StructureEdit(block, keep={"experts": keep}) for block in range(blocks)]


def barred(model, keep):
    """The model whose routers give experts that are not in `keep` no weight at all, written down plainly."""
    for index in range(3):
        router = mixture(find_decoder(model), index).router

        def route(hidden, router=router):
            scores = hidden.reshape(-1, hidden.shape[-1]) @ router.weight.T
            hidden_from = torch.ones(scores.shape[1], dtype=torch.bool).index_fill(0, keep, False)
            value, chosen = scores.masked_fill(hidden_from, -torch.inf).float().softmax(-1).topk(router.top_k)
            if getattr(router, "norm_topk_prob", True):
                value = value / value.sum(-1, keepdim=True)
            return scores, value, chosen

        router.forward = route
    return model


@pytest.mark.parametrize("name", EXPERTS)
def test_barred_masked_and_sliced_experts_are_the_same_also_through_the_cache(name):
    sliced, ids = decoder(name), tokens(2, 20)
    dense, before = copy.deepcopy(sliced), logits(sliced, ids)
    expected = logits(barred(copy.deepcopy(sliced), KEEP), ids)
    scale = expected.abs().max()
    assert (before - expected).abs().max() > 1e-3 * scale
    with masked(find_decoder(dense), edits(KEEP)):
        assert (logits(dense, ids) - expected).abs().max() < 2e-5 * scale
    assert torch.equal(logits(dense, ids), before)
    shapes.apply(find_decoder(sliced), edits(KEEP))
    for index in range(3):
        own = mixture(find_decoder(sliced), index)
        assert own.count == len(own.router.weight) == len(own.experts.down_proj) == 3
    assert (logits(sliced, ids) - expected).abs().max() < 2e-5 * scale
    assert (stepwise_logits(sliced, ids) - expected).abs().max() < 2e-5 * scale


@pytest.mark.parametrize("name", EXPERTS)
def test_stock_transformers_loads_a_model_with_one_expert_left(name, tmp_path):
    model, ids = decoder(name), tokens(2, 12)
    shapes.apply(find_decoder(model), edits(torch.tensor([1])))
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.num_experts_per_tok == 1
    assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_blocks_that_would_keep_different_numbers_of_experts_are_refused():
    with pytest.raises(UserError, match="as many experts, not 3, 4"):
        shapes.apply(find_decoder(decoder("mixtral")), edits(KEEP, blocks=2))


def test_neurons_join_the_one_most_like_them_by_the_worth_of_their_experts():
    generator = torch.Generator().manual_seed(3)
    kept, leaving = (torch.randn(2, 5, 9, generator=generator) for _ in range(2))
    worth, gone = torch.tensor([3.0, 2.0]), torch.tensor([1.0, 0.5])
    found = recombine(kept, worth, leaving, gone, 0.6, by_part=False).flatten(0, 1)
    joined = 0
    for place, own in enumerate(kept.flatten(0, 1)):
        total, weight = worth[place // 5] * own, worth[place // 5]
        for neurons, share in zip(leaving, gone, strict=True):
            for neuron in neurons:
                cosine = torch.cosine_similarity(neuron[None], kept.flatten(0, 1))
                if cosine.argmax() == place and cosine[place] >= 0.6:
                    total, weight, joined = total + share * neuron, weight + share, joined + 1
        assert torch.allclose(found[place], total / weight, atol=1e-6)
    assert 0 < joined < 10


def test_neurons_of_another_scale_match_by_their_parts():
    neuron, other = torch.tensor([1.0, 0, 0, 1, 1, 0]), torch.tensor([0.0, 1, 1, 0, 0, 1])
    scaled = torch.tensor([100.0, 0, 0, 0.01, 0.01, 0])
    turned = torch.cat([scaled[:1], scaled[1:]])
    kept = torch.stack([other + torch.tensor([3.0, 0, 0, 0, 0, 0]), neuron])[None]
    whole, parts = (
        recombine(kept, torch.ones(1), [turned[None]], torch.ones(1), 0.9, by_part)
        for by_part in (False, True)
    )
    assert torch.equal(parts[0, 0], kept[0, 0])
    assert torch.equal(parts[0, 1], (kept[0, 1] + turned) / 2)
    assert not torch.equal(whole, parts)


def test_an_expert_that_takes_in_its_own_neurons_in_another_order_stays_as_it_is(text):
    model = decoder("mixtral")
    own = mixture(find_decoder(model), 0)
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    for expert in (1, 2, 3):
        own.write(expert, own.neurons(0)[order])
    before = own.neurons(0)
    prune(model, "dern", text, sparsity=0.2)
    left = mixture(find_decoder(model), 0)
    for expert in range(left.count):
        same = (left.neurons(expert).unsqueeze(1) - before).norm(dim=2).min(1).values
        assert same.max() < 1e-4


def test_with_an_unreachable_threshold_the_experts_left_are_those_of_the_dense_model(text):
    model = decoder("qwen-moe")
    dense = copy.deepcopy(model)
    handle = prune(model, "dern", text, sparsity=0.4, least=2.0)
    for index in range(3):
        own, was = (mixture(find_decoder(one), index) for one in (model, dense))
        for place, expert in enumerate(handle.edits[f"keep/{index}.experts"].tolist()):
            assert torch.equal(own.neurons(place), was.neurons(expert))
            assert torch.equal(own.router.weight[place], was.router.weight[expert])


def test_the_experts_that_stay_are_those_that_get_most_tokens(text):
    model = decoder("mixtral")
    routed = torch.zeros(3, 4)
    for index in range(3):

        def note(module, arguments, index=index):
            routed[index] += arguments[1].flatten().bincount(minlength=4)

        mixture(find_decoder(model), index).experts.register_forward_pre_hook(note)
    handle = prune(model, "dern", text, sparsity=0.43, usage="uses")
    assert handle.kind == "plain"
    for index in range(3):
        best = routed[index].topk(2).indices.sort().values
        assert torch.equal(handle.edits[f"keep/{index}.experts"], best)


def test_dern_says_what_it_needs_and_what_it_can_remove(text):
    with pytest.raises(UserError, match="this model has none; choose a mixture"):
        prune(decoder(), "dern", text, sparsity=0.3)
    with pytest.raises(UserError, match=r"can lose at most 0\.6429 \(an expert of each block stays\)"):
        prune(decoder("mixtral"), "dern", text, sparsity=0.9)


def test_merged_experts_wait_in_the_models_own_precision(text):
    model = decoder("mixtral").bfloat16()
    handle = prune(model, "dern", text, sparsity=0.2)
    merged = [tensor for name, tensor in handle.edits.items() if name.startswith("weight/")]
    assert {tensor.dtype for tensor in merged} == {torch.bfloat16}
    assert logits(model, tokens(1, 9)).isfinite().all()
