"""TAMP: which tokens count, and what its allocation sees of images and text."""

import copy
from dataclasses import replace

import pytest
import torch

from tests.decoders import decoder, tokens
from tests.golden_values import golden, under
from tests.llm_weights.test_contract import _driver
from tests.llm_weights.test_questions import prompts
from tests.llm_weights.test_vision import classifier
from tests.llm_weights.tiny import prune
from tests.vlm import tiny
from tprune.core import cosine
from tprune.core.adaptive import likenesses, representative
from tprune.core.statistics import Norm
from tprune.errors import UserError
from tprune.methods import allocate, registry
from tprune.methods.weight_view import LinearView
from tprune.methods.weights import WeightBudget
from tprune.models import pieces
from tprune.models.blocks import find_decoder
from tprune.models.calibrate import Stream
from tprune.models.outputs import gather_selected, likeness_and_advance
from tprune.pipelines import prune_weights
from tprune.pipelines.journal import Journal

TAMP = registry.build("tamp", "llm-weights")


def recorded():
    """The weight, and of three prompts: inputs, outputs, the attention, what shows images, what is selected."""
    tensors = under(golden("llm-weights", "tamp")[0], "amia.")
    rows = []
    for place in range(3):
        x, p, visual, selected = (tensors[f"{name}{place}"] for name in ("x", "p", "visual", "selected"))
        rows.append((x, (x @ tensors["W"].T)[None], p[None], visual[None].bool(), selected.bool()))
    return tensors, rows


def test_the_authors_tokens_are_selected_and_wanda_s_masks_follow():
    tensors, rows = recorded()
    norm, count = Norm(), 0
    for x, y, attention, visual, selected in rows:
        found = TAMP.select(y, attention, visual)[0]
        assert torch.equal(found, selected)
        norm.add(x[found])
        count += int(found.sum())
    norm = norm.result()["norm"]
    assert torch.allclose(norm.square() / count, tensors["scaler"], rtol=1e-5)
    edit = TAMP.prune(LinearView("W", 0, tensors["W"], norm), WeightBudget(0.5), None)
    assert torch.equal(edit.mask, tensors["mask"].bool())


def test_the_allocation_s_terms_are_the_authors():
    tensors, rows = recorded()
    terms = torch.cat([likenesses(cosine.among(y), visual) for _, y, _, visual, _ in rows]).mean(0)
    assert torch.allclose(terms, tensors["terms"], atol=1e-5)
    view = LinearView("W", 0, tensors["W"], likeness=tuple(terms.tolist()))
    importance = tensors["importance"].item()
    as_much, less = (
        LinearView("V", 0, tensors["W"], likeness=(1.0, 1 - part)) for part in (importance, importance / 3)
    )
    found = allocate.parse("tamp-das").sparsities(lambda: [view, as_much, less], TAMP, 0.5)
    assert found[0] == pytest.approx(found[1], abs=0.02)
    assert found[0] < found[2]


def test_a_kind_of_token_that_is_not_there_has_no_term():
    alike = cosine.among(torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(1)))
    found = likenesses(alike, torch.tensor([[False] * 6, [True] * 3 + [False] * 3]))
    assert found[0].isnan().tolist() == [True, False, True]
    assert found[1].isfinite().all()
    assert torch.equal(found[0, 1:2], likenesses(alike)[0])


def test_selection_of_several_samples_is_that_of_each():
    generator = torch.Generator().manual_seed(2)
    alike = cosine.among(torch.randn(3, 40, 6, generator=generator))
    attention = torch.rand(3, 40, generator=generator)
    bound = torch.tensor([0.01, 0.05, 0.0])
    together = representative(alike, attention, bound, 3, 0.2)
    for place in range(3):
        one = slice(place, place + 1)
        assert torch.equal(together[one], representative(alike[one], attention[one], bound[one], 3, 0.2))
    assert together[1].sum() < together[0].sum() < 40
    assert together[2].all()


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "phi3", "gemma2"])
def test_each_matrix_s_norms_are_over_the_tokens_selected_by_its_outputs(name):
    model, ids = decoder(name), tokens(3, 20)
    found = find_decoder(model)
    stream = Stream(found, ids, batch_size=2)
    gathered = gather_selected(stream, 0, TAMP)
    matrix = found.matrices(0)[1]
    seen = {}
    hook = matrix.module.register_forward_pre_hook(lambda module, given: seen.update(x=given[0]))
    model.config._attn_implementation = "eager"
    with torch.no_grad():
        weights = model(input_ids=ids, output_attentions=True).attentions[0]
    hook.remove()
    y = seen["x"] @ matrix.read().T
    if matrix.module.bias is not None:
        bias = matrix.module.bias
        y = y + (bias if matrix.rows is None else bias[matrix.rows])
    chosen = TAMP.select(y, weights[:, :, -1].mean(1), None)
    assert chosen.sum() < chosen.numel()
    assert gathered[matrix.name].tokens == chosen.sum()
    assert torch.allclose(
        gathered[matrix.name].result()["norm"], seen["x"][chosen].norm(dim=0), rtol=1e-4, atol=1e-5
    )


def test_all_tokens_selected_is_wanda(text):
    models = decoder(), decoder()
    prune(models[0], "tamp", text, sparsity=0.5, tolerance=0.0)
    prune(models[1], "wanda", text, sparsity=0.5)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["llava", "qwen2-vl", "llava-next"])
def test_prompts_with_images_are_pruned_with_and_without_the_allocation(name):
    for rule in ("uniform", "tamp-das"):
        model, driver = copy.deepcopy(tiny.tiny(name)), _driver("tamp")
        driver.stage = replace(driver.stage, allocate=rule)
        handle = prune_weights.prune(
            driver, driver.decoder(model), WeightBudget(0.5), prompts(model), Journal(None, "test")
        )
        assert handle.achieved().value == pytest.approx(0.5, abs=0.03)


def test_the_allocation_sees_three_terms_of_prompts_and_one_of_text():
    model = tiny.tiny("llava")
    found = find_decoder(model)
    for samples, terms in ((prompts(model), 3), (tokens(3, 20), 1)):
        stream = Stream(found, samples, batch_size=2)
        assert {len(seen) for seen in likeness_and_advance(stream, 0).values()} == {terms}


def test_several_workers_see_whole_prompts_and_texts(monkeypatch):
    monkeypatch.setattr(pieces, "TOKENS_IN_PIECE", 8)
    llava = tiny.tiny("llava")
    for model, samples in ((llava, prompts(llava)), (decoder(), tokens(3, 20))):
        found = []
        for workers in (1, 2):
            stream = Stream(find_decoder(model), samples, batch_size=1)
            stream.workers = workers
            found.append(likeness_and_advance(stream, 0))
        assert found[0] == found[1]


def test_models_that_read_both_ways_are_refused_by_name(text):
    with pytest.raises(UserError, match="tamp looks at the attention of a decoder's last token"):
        prune(classifier(), "tamp", text, sparsity=0.5)
    with pytest.raises(UserError, match="tamp: the outputs of"):
        prune(decoder("mixtral"), "tamp", text, sparsity=0.5)
