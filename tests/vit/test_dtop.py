"""dtop: what leaves early, and the map that it leaves behind."""

import json

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import tprune
from tests.conftest import start, tiny_vit
from tests.golden_values import golden, under
from tests.test_cli import call
from tprune import artifact
from tprune.core import select
from tprune.errors import UserError
from tprune.evaluate.cost import flops
from tprune.methods.vit._dtop_heads import MaskHead
from tprune.models import load as loaders
from tprune.models.source import resolve
from tprune.pipelines import segmenting
from tprune.pipelines.run import pipeline
from tprune.progress import Progress
from tprune.recipe import ModelSource, Recipe, Stage


@pytest.fixture(scope="module")
def authors():
    tensors, told = golden("vit", "dtop")
    model = VisionTransformer(**told["settings"]["model"]).eval().requires_grad_(False)
    model.load_state_dict(under(tensors, "model."))
    return model, tensors, under(tensors, "heads."), tensors["image"].float()


def test_exits_and_map_are_the_authors(authors):
    model, tensors, state, images = authors
    with tprune.prune(model, "dtop", state=state, threshold=0.5) as handle:
        alone = torch.cat([(model(image[None]), handle.driver.memory["map"])[1] for image in images])
        handle.driver.record = True
        model(images)
        named, canvas = handle.driver.memory["map"], handle.driver.memory["canvas"][:, :-1]
        left = torch.arange(64).expand(3, -1)
        for number, (_, reduction) in enumerate(handle.driver.trace.reductions, 1):
            left = left.gather(1, reduction.index).where(reduction.valid, 64)
            finished = torch.ones(3, 65, dtype=torch.bool).scatter(1, left, False)[:, :64]
            assert torch.equal(finished, tensors[f"finished.{number}"])
    assert torch.allclose(canvas.transpose(1, 2), tensors["canvas"], atol=2e-4)
    assert torch.allclose(named.transpose(1, 2), tensors["pred"], atol=1e-4)
    assert torch.allclose(alone, named, atol=1e-5)


def test_the_loss_of_masks_is_the_authors(authors):
    _, tensors, _, _ = authors
    masks, present = (tensors[f"loss.{name}"].clone().requires_grad_() for name in ("masks", "present"))
    loss = MaskHead.loss(masks.transpose(1, 2), present, tensors["loss.name"])
    loss.backward()
    assert torch.allclose(loss, tensors["loss.total"][0])
    assert torch.allclose(masks.grad, tensors["loss.masks_grad"], atol=1e-7)
    assert torch.allclose(present.grad, tensors["loss.present_grad"], atol=1e-7)


def test_the_map_keeps_what_was_said_of_a_token_when_it_left(authors, monkeypatch):
    model, _, state, images = authors
    with tprune.prune(model, "dtop", state=state, threshold=0.5) as handle:
        kind, said = type(handle.driver.method), []
        name = kind.name

        def listen(method, place, view, memory):
            found = name(method, place, view, memory)
            said.append((view.position, view.prunable, memory["canvas"][:, :64]))
            return found

        monkeypatch.setattr(kind, "name", listen)
        features = model(images)
    (_, _, first), (position, there, second), _ = said
    went_on = torch.zeros(3, 65, dtype=torch.bool).scatter(1, position.where(there, 64), True)[:, :64]
    assert torch.equal((first != second).any(-1), went_on)
    assert features.shape == (3, 64, 16)


def test_nothing_is_surer_than_one(authors):
    model, _, state, images = authors
    dense = model(images)
    with tprune.prune(model, "dtop", state=state, threshold=1.0):
        assert torch.equal(model(images), dense)


def test_the_surest_of_every_group_stay():
    """Against a loop over groups."""
    generator = torch.Generator().manual_seed(0)
    score = torch.rand(3, 40, generator=generator).mul(8).round()
    group = torch.randint(0, 4, (3, 40), generator=generator)
    marked = torch.rand(3, 40, generator=generator) > 0.3
    expected = marked.clone()
    for row in range(3):
        for one in range(4):
            members = [i for i in range(40) if marked[row, i] and group[row, i] == one]
            for best in sorted(members, key=lambda i: (-score[row, i], i))[:5]:
                expected[row, best] = False
    assert torch.equal(select.all_but_best(score, group, marked, 5), expected)
    assert torch.equal(select.all_but_best(score, group, marked, 0), marked)


def test_a_model_too_shallow_for_its_exits_is_refused():
    with pytest.raises(UserError, match=r"1 blocks have no room for exits after \(5, 7\) of 12"):
        tprune.prune(tiny_vit(depth=1), "dtop", keep=0.9, state={})


def test_heads_that_average_over_patches_see_them_all(images):
    model = tiny_vit(class_token=False, global_pool="avg")
    with tprune.prune(model, "dtop", threshold=0.1, stay=1, **start("dtop", model)) as handle:
        together = model(images)
        alone = torch.cat([model(image[None]) for image in images])
        assert handle.achieved().value < 1
    assert torch.allclose(together, alone, atol=1e-5)


@pytest.fixture(scope="module")
def digits():
    source = resolve(ModelSource("digits-vit"), "vit")
    return loaders.load(source, "vit", device="cpu", dtype="float32", seed=0)


def quality(subject, stage, state=None):
    """Of the map, pruned and whole, on 32 test scenes."""
    recipe = Recipe(ModelSource("digits-vit"), (stage,), limit=32, batch_size=32)
    driver = pipeline(recipe, stage, Progress())
    with driver.apply(subject, None, state) as handle:
        return *segmenting.measured(driver, subject, handle), handle


def test_exits_are_timed_beside_the_same_heads_without_exits():
    """The heads that make masks cost several times what a small model does."""
    recipe = Recipe(
        ModelSource("vit_tiny_patch16_224", None, None, True),
        (Stage("vit", "dtop", keep=0.7, set={"channels": 48, "heads": 2}),),
        batch_size=1,
    )
    driver = pipeline(recipe, recipe.stage, Progress())
    subject = driver.load()
    plain = flops(lambda: subject.model(torch.zeros(1, 3, 224, 224)))
    found = driver.bench(subject, 1)["flops"]
    assert plain < found["pruned"] < 0.95 * found["dense"]


def test_fitted_heads_name_patches_that_unfitted_ones_do_not_and_exits_cost_little(digits, monkeypatch):
    monkeypatch.setattr("tprune.pipelines.fit.SETTLE_IMAGES", 32)
    stage = Stage(
        "vit", "dtop", keep=0.7, set={"epochs": 12 * 8 / 2048, "batch": 8, "lr": 2e-3}, fit="built-in"
    )
    fitted, whole, handle = quality(digits, stage)
    state = handle.driver.method.neutral_state(handle.driver.parts.shape, 0)
    unfitted, _, _ = quality(digits, Stage("vit", "dtop", keep=0.7), state)
    assert abs(handle.achieved().value - 0.7) < 0.05
    assert fitted["mean_iou"] > unfitted["mean_iou"] + 0.2
    assert fitted["patch_agreement"] > 0.95
    assert fitted["patch_accuracy"] > whole["patch_accuracy"] - 0.02
    assert whole["patch_agreement"] == 1.0


def test_the_report_tells_the_map_beside_the_one_without_exits(vit_folder, tmp_path):
    asked = ["--method", "dtop", "--keep", "0.7", "--fit", "built-in", "--set", f"epochs={48 / 2048}"]
    shown = call("vit", *asked, vit_folder, "--limit", 4, "--out", tmp_path / "out").output
    assert "patches named right" in shown
    report = json.loads((tmp_path / "out" / artifact.REPORT).read_text())
    assert report["dense"]["patch_agreement"] == 1.0
    assert report["pruned"]["flops"] < 0.8 * report["dense"]["flops"]
    assert {"patch_accuracy", "mean_iou", "accuracy"} <= set(report["pruned"])
    call("sweep", "vit", *asked, vit_folder, "--limit", 4, "--no-latency", "--out", tmp_path / "sweep")
    points = [json.loads(file.read_text()) for file in (tmp_path / "sweep" / "points").glob("*.json")]
    swept = next(point for point in points if point["method"] == "dtop")
    for model in ("dense", "pruned"):
        assert swept[model]["flops"] == report[model]["flops"]
