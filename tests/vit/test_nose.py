"""NOSE: attention sublayers that are chosen by entropy, skipped, and faded out by a fit."""

import json

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from transformers import ViTConfig, ViTForImageClassification

import tprune
from tests.conftest import tiny_vit
from tests.golden_values import golden, under
from tests.test_cli import call
from tests.vit.test_accuracy import accuracy
from tprune.core.budget import Site, Stage, counts_entering, mean_leaving
from tprune.core.statistics import gaussian_entropy
from tprune.data import images as pictures
from tprune.errors import UserError
from tprune.methods import registry
from tprune.models import load as loaders
from tprune.models.anatomy import anatomy
from tprune.models.relaxed import FitDriver
from tprune.models.source import resolve
from tprune.recipe import ModelSource

TENSORS, TOLD = golden("vit", "nose")
SETTINGS = TOLD["settings"]
IMAGE = TENSORS["image"].float()


def golden_model():
    """The authors' model as timm's."""
    model = VisionTransformer(**SETTINGS["model"]).eval().requires_grad_(False)
    model.load_state_dict(under(TENSORS, "model."))
    return model


def state(order, scale):
    return {"order": torch.tensor(order), "scale": torch.tensor(scale)}


@pytest.mark.parametrize("epoch", [0, 100, 299])
def test_fading_attention_gives_the_authors_logits(epoch):
    model = golden_model()
    parts = anatomy(model)
    method = registry.build("nose", "vit", {"fade": 1.0}).bind(state(SETTINGS["layers"], 1.0))
    fit = method.fit(parts.shape, None, 0)
    if epoch:
        fit.settle(epoch / 299)
    driver = FitDriver(parts, method, fit, 0)
    assert torch.allclose(model(IMAGE), TENSORS[f"epoch.{epoch}"], atol=1e-5)
    driver.remove()


def test_a_model_without_the_attention_it_faded_out_gives_the_authors_logits():
    model = golden_model()
    with tprune.prune(model, "nose", state=state(SETTINGS["layers"], 2.0), ratio=0.5):
        assert torch.allclose(model(IMAGE), TENSORS["removed"], atol=1e-5)


@pytest.mark.parametrize("named", SETTINGS["entropy"])
def test_the_entropy_without_some_attention_is_the_authors(named):
    model = golden_model()
    layers = [int(layer) for layer in named.split(",") if layer]
    with tprune.prune(model, "nose", state=state([*layers, 9], 1.0), ratio=len(layers) / 4):
        assert abs(gaussian_entropy(model(IMAGE)) - SETTINGS["entropy"][named]) < 1e-4


def test_attention_is_chosen_greedily_by_the_authors_entropies():
    asked = []

    def outputs(layers):
        """Two outputs whose entropy is the recorded one."""
        asked.append(len(layers))
        half = 2 ** SETTINGS["entropy"][",".join(map(str, sorted(layers)))] / 2**0.5
        return torch.tensor([[-half], [half]], dtype=torch.float64)

    shape = anatomy(golden_model()).shape
    method = registry.build("nose", "vit")
    assert method.calibrate(shape, 0.625, outputs)["order"].tolist() == [1, 3, 2]
    assert asked == [0, 1, 1, 1, 1, 2, 2, 2, 3, 3]
    assert method.calibrate(shape, None, outputs)["order"].tolist() == [1, 3]
    assert method.calibrate(shape, 1.0, outputs)["order"].tolist() == []


def test_an_output_that_never_changes_cancels_in_the_entropy():
    outputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    still = torch.cat([outputs, torch.zeros(8, 1, dtype=torch.float64)], 1)
    gap = gaussian_entropy(2 * still) - gaussian_entropy(still)
    assert abs(gap - 3) < 1e-9


def test_no_token_enters_an_attention_that_is_skipped_and_all_enter_and_leave_the_rest():
    stages = [Stage(Site(0), 16, skips=True), Stage(Site(2), 16, skips=True)]
    assert counts_entering(stages, 16, 3) == [0, 16, 16, 16, 0, 16]
    assert mean_leaving(stages, 16, 3) == 1


def test_keep_counts_every_sublayer_and_one_attention_stays(vit):
    for keep, removed in ((0.625, 3), (0.7, 2), (0.75, 2), (0.8, 2), (0.9, 1)):
        with tprune.prune(vit, "nose", keep=keep, calibration=16) as handle:
            found = handle.achieved()
            assert found.value == 1 - removed / 8
            assert found.details["tokens_leaving_mean"] == 16
            assert sum(row["tokens_attention"] == 0 for row in handle.per_layer()) == removed
    with pytest.raises(UserError, match=r"nose reaches 0\.625 to 1"):
        tprune.prune(vit, "nose", keep=0.5)


def test_named_blocks_scale_with_the_depth_and_ask_for_no_images(vit, monkeypatch):
    monkeypatch.setattr("tprune.pipelines.skipping.read", None)
    with tprune.prune(vit, "nose", layers=(0, 3, 6)) as handle:
        assert handle.tensors(False)["order"].tolist() == [0, 1, 2]
    with pytest.raises(UserError, match="are both budgets of nose"):
        tprune.prune(vit, "nose", keep=0.8, layers=(0,))


def test_without_a_fit_a_skipped_block_is_its_mlp(vit, images):
    block = vit.blocks[1]
    seen = []
    hook = block.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    with tprune.prune(vit, "nose", layers=(3,)):
        vit(images)
    hook.remove()
    before, after = seen[0]
    assert torch.equal(after, before + block.mlp(block.norm2(before)))


def test_a_model_of_transformers_skips_as_well(images):
    config = ViTConfig(
        hidden_size=24,
        num_hidden_layers=4,
        num_attention_heads=3,
        intermediate_size=48,
        image_size=32,
        patch_size=8,
        num_labels=5,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ViTForImageClassification(config).eval().requires_grad_(False)
    dense, called = model(images).logits, []
    parts = anatomy(model)
    for layer, attention in enumerate(parts.attentions):
        attention.register_forward_hook(lambda *_, layer=layer: called.append(layer))
    with tprune.prune(model, "nose", layers=(0, 6)):
        pruned = model(images).logits
        assert called == [1, 3]
    assert not torch.equal(pruned, dense)
    assert torch.equal(model(images).logits, dense)


def test_fitting_beats_not_fitting_at_the_same_budget():
    source = resolve(ModelSource("digits-vit"), "vit")
    subject = loaders.load(source, "vit", device="cpu", dtype="float32", seed=0)
    scenes, model = pictures.built_in(200), subject.model
    pixels = torch.stack([subject.processor(scenes.open(place)) for place in range(200)])
    layers = (0, 1, 2, 3, 5, 6, 8, 9, 11)
    with tprune.prune(model, "nose", layers=layers):
        unfitted = accuracy(model, pixels, torch.tensor(scenes.labels))
    short = {"batch": 8, "epochs": 20 * 8 / 2048}
    with tprune.prune(model, "nose", layers=layers, fit="built-in", **short) as handle:
        assert handle.fitted["steps"] == 20
        assert accuracy(model, pixels, torch.tensor(scenes.labels)) > unfitted + 0.05


def test_a_fit_without_anything_to_fade_is_refused():
    with pytest.raises(UserError, match="nose removes nothing at this budget"):
        tprune.prune(tiny_vit(num_classes=10), "nose", keep=1.0, fit="built-in")


def test_the_choice_is_calibrated_and_stored_and_costs_fewer_flops(vit_folder, tmp_path):
    out = tmp_path / "out"
    asked = ["vit", "--method", "nose", "--keep", "0.75", "--calibration", 24, vit_folder, "--limit", 8]
    report = json.loads(call(*asked, "--out", out, "--json").stdout)
    assert report["budget"]["achieved"] == 0.75
    assert report["pruned"]["flops"] < report["dense"]["flops"]
    model = tprune.load(out)
    skipped = [row["block"] for row in report["per_layer"] if row["tokens_attention"] == 0]
    assert sorted(model.tprune_handle.tensors(False)["order"].tolist()) == skipped


def test_speed_alone_is_measured_without_calibration(vit_folder, monkeypatch):
    monkeypatch.delattr("tprune.pipelines.skipping.read")
    words = ["bench", vit_folder, "--method", "nose", "--keep", "0.7", "--rounds", "1", "--json"]
    result = json.loads(call(*words).stdout)["results"][0]
    assert result["flops"]["pruned"] < result["flops"]["dense"]
