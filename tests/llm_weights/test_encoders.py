"""Encoders as subjects: what can be removed of them, and how they are stored."""

import copy
import json
from dataclasses import replace

import pytest
import torch

from tests.decoders import decoder, tokens
from tests.encoders import NAMES, encoder, outputs, tokenizer
from tests.golden_values import golden
from tests.llm_weights.test_contract import _driver
from tests.llm_weights.test_structure import CHANNELS, silence
from tprune.core.representative import representativeness
from tprune.core.select import threshold_by_cost
from tprune.core.weights import StructureEdit
from tprune.errors import UserError
from tprune.methods import registry
from tprune.methods.weight_view import BlockView, UnitView
from tprune.methods.weights import WeightBudget
from tprune.models import shapes, units
from tprune.models.blocks import find_decoder
from tprune.models.calibrate import Stream
from tprune.models.gradients import sensitivities
from tprune.models.halves import masked
from tprune.pipelines import encoder_weights, prune_weights
from tprune.pipelines.journal import Journal
from tprune.pipelines.load import open_artifact
from tprune.pipelines.run import execute
from tprune.progress import Progress
from tprune.recipe import ModelSource, Recipe, Stage

HEADS = torch.tensor([1, 3])
EDITS = {
    "heads": [StructureEdit(0, keep={"heads": HEADS}), StructureEdit(2, keep={"heads": HEADS - 1})],
    "channels": [
        StructureEdit(0, keep={"channels": CHANNELS}),
        StructureEdit(1, keep={"channels": CHANNELS + 2}),
    ],
    "attention": [StructureEdit(1, halves=("attention",))],
    "mlp": [StructureEdit(0, halves=("mlp",)), StructureEdit(2, halves=("mlp",))],
    "both halves": [StructureEdit(1, halves=("attention", "mlp"))],
    "everything": [
        StructureEdit(0, halves=("attention",), keep={"channels": CHANNELS}),
        StructureEdit(2, keep={"heads": HEADS, "channels": CHANNELS + 1}),
    ],
}


def different(one, other):
    """The largest difference, as a part of the largest value."""
    return max((a - b).abs().max() / b.abs().max() for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", EDITS)
def test_silenced_masked_and_sliced_encoders_are_the_same_with_padding(name, kind):
    sliced, ids = encoder(name), tokens(2, 20)
    padding = torch.ones_like(ids)
    padding[1, 13:] = 0
    silent, dense = copy.deepcopy(sliced), copy.deepcopy(sliced)
    silence(find_decoder(silent), EDITS[kind])
    expected, before = outputs(silent, ids, padding), outputs(dense, ids, padding)
    assert different(before, expected) > 1e-3
    with masked(find_decoder(dense), EDITS[kind]):
        assert different(outputs(dense, ids, padding), expected) < 2e-5
    assert torch.equal(outputs(dense, ids, padding)[1], before[1])
    shapes.apply(find_decoder(sliced), EDITS[kind])
    assert sum(p.numel() for p in sliced.parameters()) < sum(p.numel() for p in silent.parameters())
    assert different(outputs(sliced, ids, padding), expected) < 2e-5
    assert len(find_decoder(sliced).blocks) == 3


@pytest.mark.parametrize("name", NAMES)
def test_a_block_taken_out_of_an_encoder_is_one_that_is_skipped(name):
    sliced, ids = encoder(name), tokens(2, 20)
    dense = copy.deepcopy(sliced)
    gone = [StructureEdit(1, removed=True)]
    shapes.apply(find_decoder(sliced), gone)
    with masked(find_decoder(dense), gone):
        assert torch.equal(outputs(sliced, ids)[0], outputs(dense, ids)[0])
    assert sliced.config.num_hidden_layers == 2


@pytest.mark.parametrize("name", NAMES)
def test_a_calibration_stream_through_all_blocks_equals_the_encoder(name):
    model, ids = encoder(name), tokens(3, 20)
    stream = Stream(find_decoder(model), ids, batch_size=2)
    for index in range(3):
        stream.advance(index)
    assert torch.allclose(stream.hidden, outputs(model, ids)[1], rtol=1e-4, atol=1e-5)


def driver_of(method, classes=None, **settings):
    """The driver of a method, for sequences of these classes."""
    driver = _driver(method)
    driver.method, driver.classes = registry.build(method, "llm-weights", settings), classes
    return driver


def prune(model, method, sparsity, ids, classes=None, **settings):
    """What a method makes of an encoder in memory."""
    driver = driver_of(method, classes, **settings)
    return prune_weights.prune(
        driver, find_decoder(model), WeightBudget(sparsity), ids, Journal(None, "test")
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "method", ["kcm", "mbert-heads", "optin", "flap", "wanda-sp", "llm-pruner", "shortgpt", "wanda"]
)
def test_methods_of_all_kinds_prune_every_encoder_near_the_budget(method, name):
    model, ids = encoder(name), tokens(4, 20)
    handle = prune(model, method, 0.34, ids, torch.tensor([0, 1, 2, 3]))
    assert handle.achieved().value == pytest.approx(0.34, abs=0.04)
    assert outputs(model, ids)[0].isfinite().all()


def test_mbert_heads_official_scores_are_the_authors():
    tensors, told = golden("llm-weights", "mbert-heads")
    found = find_decoder(encoder("bert", **told["settings"]))
    place = units.site(found, 0, "heads")
    dependence = sensitivities(found, tensors["tokens"], tensors["labels"], {place.reader_name: place.reader})
    method = registry.build("mbert-heads", "llm-weights", {"official": True})
    unit = UnitView("heads", torch.empty(32, 32), 8, 1, 1)
    for layer in range(3):
        behind = dependence[found.block_name(layer)]
        block = BlockView(layer, 0, {"heads": unit}, sensitivity=behind)
        assert torch.allclose(behind.view(4, 8).sum(1) / 36, tensors["squares"][layer], rtol=1e-4)
        assert torch.allclose(method.score(block), tensors["scores"][layer], atol=1e-4)


def test_mbert_heads_takes_the_head_that_nothing_reads_and_one_of_every_block_at_the_papers_share():
    model, ids, classes = encoder(), tokens(4, 20), torch.tensor([0, 1, 2, 3])
    for index, head in ((0, 2), (1, 0), (2, 3)):
        units.site(find_decoder(model), index, "heads").reader.weight[:, 8 * head : 8 * head + 8] = 0
    before = outputs(model, ids)
    handle = prune(model, "mbert-heads", 3 * 1024 / (3 * 7168), ids, classes)
    assert different(outputs(model, ids), before) < 2e-5
    assert [handle.edits[f"keep/{index}.heads"].tolist() for index in range(3)] == [
        [0, 1, 3],
        [1, 2, 3],
        [0, 1, 2],
    ]


def test_kcm_scores_are_the_paper_s_formula_written_down_plainly():
    generator = torch.Generator().manual_seed(2)
    weight, mean = torch.randn(6, 9, generator=generator), torch.rand(9, generator=generator)
    kernel = torch.tensor(
        [[(-(weight[:, i] - weight[:, j]).square().sum() / 4).exp() for j in range(9)] for i in range(9)]
    )
    mixture = torch.full((9, 9), 1 / 9)
    for _ in range(40):
        before = mixture.clone()
        for i in range(9):
            for j in range(9):
                mixture[i, j] = before[i, j] * (kernel[i, j] / (kernel[i] @ before[:, j])).sqrt()
        if abs(mixture.sum() - before.sum()) / before.sum() < 1e-3:
            break
    needed, scaled = mixture.diagonal(), []
    for values in (needed, mean):
        scaled.append((values - values.min()) / (values.max() - values.min()))
    method = registry.build("kcm", "llm-weights", {"width": 2.0, "tolerance": 1e-3})
    found = method.score(UnitView("channels", weight, 1, 1, 1, mean=mean))
    assert torch.allclose(found, scaled[0] * scaled[1], atol=1e-5)


def test_columns_that_stand_for_each_other_are_needed_less_than_one_alone():
    columns = torch.eye(6) * 4
    columns[5] = columns[4]
    needed = representativeness(columns, 1.0, 1e-4)
    assert needed[4:].max() < 0.6 * needed[:4].min()
    assert (needed >= 0).all()


def test_columns_far_from_all_others_are_needed_wholly():
    assert torch.allclose(representativeness(20 * torch.eye(6), 1.0, 1e-4), torch.ones(6), atol=1e-3)


def test_kcm_removes_channels_alone_and_the_same_number_of_each_block_for_stock_loaders():
    model, ids = encoder(), tokens(4, 20)
    driver = driver_of("kcm")
    driver.recipe = replace(driver.recipe, stages=(replace(driver.stage, loadable="plain"),))
    driver.stage = driver.recipe.stages[0]
    handle = prune_weights.prune(driver, find_decoder(model), WeightBudget(0.2), ids, Journal(None, "test"))
    assert handle.kind == "plain"
    assert len({len(handle.edits[f"keep/{index}.channels"]) for index in range(3)}) == 1
    assert model.config.intermediate_size == len(handle.edits["keep/0.channels"])
    assert not [name for name in handle.edits if name.endswith("heads")]


@pytest.mark.parametrize("case", ["default", "predictive", "untuned"])
def test_k_prune_keeps_the_authors_units_with_the_authors_weights(case):
    tensors, told = golden("llm-weights", "k-prune")
    setting, model = told["settings"]["cases"][case], encoder()
    handle = prune(
        model,
        "k-prune",
        setting["constraint"],
        tensors["tokens"],
        predictive=setting["lam_pred"],
        representational=setting["lam_rep"],
        heads=setting["mu"],
        temperature=setting["T"],
        tune=setting["tune"],
        batch=told["settings"]["batch"],
    )
    found = find_decoder(model)
    for index in range(3):
        for kind in ("heads", "channels"):
            assert torch.equal(
                handle.edits[f"keep/{index}.{kind}"], tensors[f"{case}.{kind}"][index].nonzero()[:, 0]
            )
            weight = units.site(found, index, kind).reader.weight
            # In the last block the authors' single-precision normal equations are singular but for their last digits.
            assert index == 2 or torch.allclose(weight, tensors[f"{case}.{index}.{kind}.weight"], atol=1e-3)
    assert different(outputs(model, tensors["tokens"])[:1], [tensors[f"{case}.logits"]]) < 2e-3
    assert setting["constraint"] <= handle.achieved().value < setting["constraint"] + 0.05


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["k-prune", "kcm", "optin"])
def test_what_is_stored_makes_an_encoder_the_same_again(method, name):
    model, ids = encoder(name), tokens(12, 20)
    dense = copy.deepcopy(model)
    handle = prune(model, method, 0.4, ids)
    prune_weights.reload(driver_of(method), find_decoder(dense), handle.tensors(by_reference=True))
    assert torch.equal(outputs(dense, ids)[0], outputs(model, ids)[0])


def test_k_prune_asked_for_nothing_changes_nothing():
    model, ids = encoder(), tokens(4, 20)
    before = outputs(model, ids)[0]
    assert prune(model, "k-prune", 0.0, ids).achieved().value == 0
    assert torch.equal(outputs(model, ids)[0], before)


def test_k_prune_leaves_the_norm_of_a_sublayer_without_units_and_fits_what_comes_after():
    model, ids = encoder(), tokens(12, 20)
    handle = prune(model, "k-prune", 0.6, ids, heads=1e-6)
    assert handle.edits["without.attention"].tolist() == [0, 1, 2]
    assert outputs(model, ids)[0].isfinite().all()
    plain = encoder()
    prune(plain, "k-prune", 0.6, ids, heads=1e-6, tune=False)
    dense = outputs(encoder(), ids)[1]
    tuned, untuned = ((outputs(one, ids)[1] - dense).norm() for one in (model, plain))
    assert tuned < 0.8 * untuned


def test_k_prune_refuses_decoders():
    with pytest.raises(
        UserError, match="k-prune prunes text encoders such as minilm-topics, and this is a llama"
    ):
        driver_of("k-prune").decoder(decoder())


def test_the_threshold_leaves_what_costs_less_than_the_budget():
    score, cost = torch.tensor([3.0, 1.0, 2.0, 2.0, 5.0]), torch.tensor([4, 1, 1, 1, 1])
    for budget, expected in ((9.0, 1.0), (8.0, 1.0), (7.0, 2.0), (5.0, 3.0), (1.0, 5.0)):
        assert threshold_by_cost(score, cost, budget) == expected


def test_methods_that_search_or_need_classes_say_so_of_an_encoder():
    recipe = Recipe(ModelSource("minilm"), (Stage("llm-weights", "sleb", sparsity=0.3),))
    with pytest.raises(
        UserError, match="sleb measures how well a language model foretells text, and minilm is"
    ):
        encoder_weights.check(recipe.stages[0], registry.build("sleb", "llm-weights", {}), recipe)
    stage = Stage("llm-weights", "kcm", sparsity=0.3, recover="lora")
    with pytest.raises(UserError, match="--recover lora: minilm is an encoder; leave it out"):
        encoder_weights.check(stage, registry.build("kcm", "llm-weights", {}), recipe)


def test_an_encoder_is_pruned_written_loaded_and_measured_again(tmp_path):
    rows = [
        {"text": " ".join(f"w{place}{label}" for place in range(20)), "label": label} for label in range(5)
    ] * 3
    (tmp_path / "texts.json").write_text(json.dumps(rows))
    encoder().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    for method in ("k-prune", "mbert-heads"):
        asked = Recipe(
            ModelSource(str(tmp_path / "model")),
            (Stage("llm-weights", method, sparsity=0.2),),
            data=str(tmp_path / "texts.json"),
            length=16,
            calibration=8,
        )
        report = execute(asked, Progress(quiet=True), out=str(tmp_path / method))
        assert report["kind"] == "wrapped"
        assert {"accuracy", "agreement", "flops"} <= report["pruned"].keys()
        opened = open_artifact(str(tmp_path / method), Progress(quiet=True), None)
        opened.driver.prepare(opened.subject)
        again = opened.driver.evaluate(opened.subject).metrics
        assert again["accuracy"] == report["pruned"]["accuracy"]
