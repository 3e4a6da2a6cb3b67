"""Detectors: the queries at the end of the sequence are never pruned, positions are added between the blocks."""

import json

import pytest
import torch
from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessor

import tprune
from tests.conftest import start
from tests.test_cli import call
from tprune import artifact
from tprune.core.reduction import Reduction
from tprune.data.regions import Covering, SceneRegions
from tprune.errors import UserError
from tprune.methods import registry
from tprune.models.anatomy import anatomy

METHODS = [name for name in registry.running_on("plain") if not registry.load(name, "vit").sees]


def tiny_yolos(**changes):
    """A detector of four blocks, 16 patches and five queries."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        arguments = {
            "hidden_size": 24,
            "num_hidden_layers": 4,
            "num_attention_heads": 3,
            "intermediate_size": 48,
            "image_size": [32, 32],
            "patch_size": 8,
            "num_detection_tokens": 5,
            "num_labels": 4,
            "use_mid_position_embeddings": True,
        } | changes
        model = YolosForObjectDetection(YolosConfig(**arguments)).eval().requires_grad_(False)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model


def found(model, images):
    outputs = model(images)
    return torch.cat([outputs.logits, outputs.pred_boxes], -1)


def with_only(model, images, left):
    """What the detector finds when its encoder is given only the tokens `left` [B, K], by hand."""
    x = model.vit.embeddings(images)
    row = torch.arange(len(x)).unsqueeze(1)
    between = model.vit.encoder.interpolation(images.shape[-2:])  # [L - 1, 1, N, D]
    x = x[row, left]
    for place, layer in enumerate(model.vit.encoder.layer):
        x = layer(x)
        if place < len(between):
            x = x + between[place, 0][left]
    x = model.vit.layernorm(x)[:, -5:]
    return torch.cat([model.class_labels_classifier(x), model.bbox_predictor(x).sigmoid()], -1)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_prunes_a_detector_and_never_its_queries(method, images):
    model = tiny_yolos()
    dense, given = found(model, images), start(method, model)
    with tprune.prune(model, f"vit/{method}", keep=1.0, **given):
        assert torch.equal(found(model, images), dense)
    with tprune.prune(model, f"vit/{method}", keep=0.6, **given) as handle:
        handle.driver.record = True
        pruned = found(model, images)
        assert abs(handle.achieved().value - 0.6) < 0.06
        for _, reduction in handle.driver.trace.reductions:
            ends = reduction.index[:, -5:] - reduction.length
            assert torch.equal(ends, torch.arange(-5, 0).expand(3, 5))
            assert reduction.index[:, 0].eq(0).all()
        assert torch.allclose(found(model, images[1:2]), pruned[1:2], atol=1e-5)
    assert not torch.equal(pruned, dense)
    assert torch.equal(found(model, images), dense)


def test_positions_between_the_blocks_are_those_of_the_tokens_that_are_left(images):
    model = tiny_yolos()
    with tprune.prune(model, "vit/random", keep=0.5, layers=(0,)) as handle:
        pruned, left = found(model, images), handle.driver.position
    assert left.shape == (3, 1 + 8 + 5)
    assert torch.allclose(pruned, with_only(model, images, left), atol=1e-5)


def forms(generator):
    """A reduction of 7 tokens to 5 in every form."""
    index = torch.tensor([[0, 2, 3, 5, 6]])
    source, into = torch.tensor([[1, 4]]), torch.tensor([[3, -1]])
    yield Reduction.keep(index, 7)
    yield Reduction.average(index, 7, source, into)
    yield Reduction.spread(index, 7, source, torch.rand(1, 5, 2, generator=generator))
    yield Reduction.mix(torch.rand(1, 5, 7, generator=generator))


def test_a_reduction_in_another_order_is_the_same_map():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 7, 3, generator=generator)
    given, wanted = torch.randperm(7, generator=generator), torch.randperm(5, generator=generator)
    shown = x[:, given]
    for reduction in forms(generator):
        other = reduction.reordered(given, wanted)
        assert torch.allclose(other.apply(x), reduction.apply(shown)[:, wanted], atol=1e-6)
        ones = torch.ones(1, 7)
        assert torch.equal(other.size(ones), reduction.size(ones)[:, wanted])


def test_a_method_that_changes_what_tokens_see_is_refused():
    with pytest.raises(UserError, match="stvit does not work in detectors"):
        tprune.prune(tiny_yolos(), "stvit", keep=0.6, state={})


TINY = {"width": 24, "heads": 3, "blocks": 1, "lr": 1e-2, "batch": 8}


def unfitted(model, **settings):
    """A small ViT of bavit's that has not learned, with larger values so that images differ."""
    state = registry.build("bavit", "vit", TINY).neutral_state(anatomy(model).shape, 0)
    return {
        name: 8 * tensor if "head" in name or "embed" in name else tensor for name, tensor in state.items()
    }


def test_bavit_keeps_as_many_patches_as_are_foreground_and_no_filler_matters(images):
    model = tiny_yolos()
    with tprune.prune(model, "bavit", state=unfitted(model)) as handle:
        likely = handle.driver.method.foreground(images)
    threshold = likely.median().item()
    stays = likely >= threshold
    assert stays.sum(1).unique().numel() > 1
    with tprune.prune(model, "bavit", state=unfitted(model), threshold=threshold) as handle:
        together = found(model, images)
        assert handle.achieved().value == pytest.approx(stays.double().mean().item())
        alone = torch.cat([found(model, image[None]) for image in images])
    assert torch.allclose(together, alone, atol=1e-5)
    for image, row in zip(images, stays, strict=True):
        left = torch.cat([torch.tensor([0]), row.nonzero().flatten() + 1, torch.arange(17, 22)])
        assert torch.allclose(with_only(model, image[None], left[None]), alone[:1], atol=1e-5)
        alone = alone[1:]


def test_bavit_keeps_no_patch_where_all_is_background_and_all_where_nothing_is(images):
    model = tiny_yolos()
    dense, state = found(model, images), unfitted(model)
    alone = with_only(model, images, torch.tensor([[0, *range(17, 22)]]))
    with tprune.prune(model, "bavit", state=state, threshold=1.0):
        assert torch.allclose(found(model, images), alone, atol=1e-5)
    with tprune.prune(model, "bavit", state=state, threshold=0.0):
        assert torch.equal(found(model, images), dense)


def test_bavit_ranks_under_a_budget(images):
    model = tiny_yolos()
    with tprune.prune(model, "bavit", keep=0.25, state=unfitted(model)) as handle:
        found(model, images)
        best = handle.driver.method.foreground(images).topk(4).indices.sort(1).values
        assert torch.equal(handle.driver.position[:, 1:5], best + 1)


def test_the_loss_of_bavit_is_the_mean_cross_entropy_of_all_patches(images):
    """The paper's accumulative cross-entropy, summed by hand."""
    fit = registry.build("bavit", "vit", TINY).fit(anatomy(tiny_yolos()).shape, None, 0)
    fit.small.load_state_dict(unfitted(tiny_yolos()))
    covered = torch.rand(3, 16, generator=torch.Generator().manual_seed(2))
    logits, total = fit.small(images), 0.0
    for image in range(3):
        for patch in range(16):
            truth = int(covered[image, patch] >= 0.5)
            total -= logits[image, patch].softmax(-1)[truth].log()
    labels = torch.stack([covered, 1 - covered], -1)
    assert torch.allclose(fit.losses(None, labels, {"inputs": images}, None)["patches"], total / 48)


def test_fitted_bavit_finds_the_digits_that_an_unfitted_one_misses():
    model, processor = tiny_yolos(), YolosImageProcessor()

    def prepare(image):
        size = {"height": 32, "width": 32}
        return processor(images=image, return_tensors="pt", size=size)["pixel_values"][0]

    test = Covering(SceneRegions("test"), prepare, (4, 4))
    pixels, shares = (torch.stack(part) for part in zip(*map(test.sample, range(32)), strict=True))
    foreground, recall = 1 - shares[..., -1], []
    fit = {"fit": "built-in", "tokenizer": processor, "epochs": 12 * 8 / 2048}
    for given in ({"state": unfitted(model)}, TINY | fit):
        with tprune.prune(model, "bavit", keep=0.25, **given) as handle:
            best = handle.driver.method.foreground(pixels).topk(4).indices
        recall.append((foreground.gather(1, best).sum() / foreground.sum()).item())
    assert recall[1] > max(0.5, recall[0] + 0.1)


@pytest.fixture(scope="module")
def yolos_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny-yolos"
    tiny_yolos().save_pretrained(folder)
    YolosImageProcessor(size={"shortest_edge": 32, "longest_edge": 64}).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("keep", [[], ["--keep", "0.5"]])
def test_a_detector_on_disk_goes_the_whole_way(keep, yolos_folder, tmp_path):
    settings = TINY | {"epochs": 3 * 8 / 2048}
    asked = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    asked = ["vit", "--method", "bavit", *keep, "--fit", "built-in", *asked, yolos_folder]
    result = call(*asked, "--limit", 8, "--out", tmp_path / "out")
    assert "a detector, and no boxes to measure mean average precision with: only agreement" in result.stderr
    report = json.loads((tmp_path / "out" / artifact.REPORT).read_text())
    assert 0 <= report["pruned"]["agreement"] <= 1
    assert "accuracy" not in report["pruned"]
    assert report["pruned"]["flops"] != report["dense"]["flops"]
    if keep:
        assert report["budget"]["achieved"] == 0.5
    model, probe = tprune.load(tmp_path / "out"), artifact.read_tensors(tmp_path / "out" / artifact.PROBE)
    assert torch.allclose(model(probe["input"]).logits, probe["output"], atol=1e-5)


def test_what_learns_from_classes_is_not_fitted_to_a_detector():
    with pytest.raises(UserError, match="tnt learns from classes of images, and a YolosForObjectDetection"):
        tprune.prune(tiny_yolos(), "tnt", keep=0.5, fit="built-in")
