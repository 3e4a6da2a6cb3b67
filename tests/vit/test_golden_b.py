"""DiffRate, LTMP and STA against their authors' own code (see tests/golden/vit/*.json)."""

import json

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import tprune
from tests.golden_values import HERE, golden, under
from tprune.core import match
from tprune.core.budget import Site
from tprune.methods import registry
from tprune.methods.attention import Attention
from tprune.methods.token_view import TokenView
from tprune.methods.tokens import Shape


def settings(name):
    return json.loads((HERE / "vit" / f"{name}.json").read_text())["settings"]


def seen(hidden, key, depth=12, prefix=0):
    """A view of tokens whose block attended with one head of these keys."""
    head = key.unsqueeze(1)
    return TokenView(
        hidden=hidden,
        prunable=torch.arange(hidden.shape[1]).ge(prefix).expand(hidden.shape[:2]),
        prefix=prefix,
        depth=depth,
        attention=Attention(head, head, head, 1.0),
    )


@pytest.mark.parametrize("case", settings("sta")["cases"])
def test_sta_keeps_the_authors_tokens_in_their_order(case):
    tensors, told = golden("vit", "sta")
    setting = told["settings"]["cases"][case]
    x, kept = tensors[f"{case}.x"], tensors[f"{case}.kept"]
    method = registry.build("sta", "vit", {"frames": 8})
    view = seen(x, tensors[f"{case}.metric"], setting["depth"])
    reduction = method.reduce(Site(setting["index"] + 1), view, kept.shape[1], {})
    assert torch.equal(reduction.index, kept)
    assert torch.equal(reduction.apply(x), tensors[f"{case}.out"])


def test_sta_counts_are_the_papers_for_videomae_large():
    stages = registry.build("sta", "vit", {"frames": 8}).stages(Shape(24, 1568), None)
    assert [(stage.site.layer, stage.count) for stage in stages] == [(1, 1056), (9, 800), (17, 672)]


@pytest.mark.parametrize("case", settings("diffrate")["cases"])
def test_a_diffrate_model_gives_the_authors_logits(case):
    tensors, told = golden("vit", "diffrate")
    model = VisionTransformer(**told["settings"]["model"]).eval()
    model.load_state_dict(under(tensors, "model."))
    with torch.no_grad(), tprune.prune(model, "diffrate", schedule=case) as handle:
        logits = model(tensors["image"].float())
        after = handle.driver.entering[1::2]
        size = handle.driver.size
    assert after == told["settings"]["cases"][case]["non_cls_tokens_after_each_block"]
    assert torch.allclose(logits, tensors[f"{case}.logits"], atol=2e-5)
    assert torch.allclose(size, tensors[f"{case}.size"], rtol=1e-4)


def test_diffrate_merges_as_the_authors_do():
    tensors, told = golden("vit", "diffrate")
    kept, x, size = told["settings"]["merge kept"], tensors["merge.x"], tensors["merge.size_in"]
    method = registry.build("diffrate", "vit")
    order = torch.arange(x.shape[1]).expand(len(x), -1)
    reduction = method.merge(x, order[:, :kept], order[:, kept:], 1, size)
    assert torch.allclose(reduction.apply(x), tensors["merge.out"], atol=1e-6)
    assert torch.allclose(reduction.size(size), tensors["merge.size"], atol=1e-6)


def test_a_size_that_negative_similarities_take_away_stays_positive():
    x = torch.tensor([[[9.0, 9.0], [1.0, 0.0], [-1.0, 0.0]]])
    order = torch.arange(3).expand(1, 3)
    reduction = registry.build("diffrate", "vit").merge(x, order[:, :2], order[:, 2:], 1, None)
    assert match.nearest(x, order[:, 2:], order[:, :2], 1)[0].item() == -1
    assert reduction.size(None)[0, 1] > 0


LTMP = settings("ltmp")["cases"]


def ltmp_model():
    tensors, told = golden("vit", "ltmp")
    model = VisionTransformer(**told["settings"]["model"]).eval().requires_grad_(False)
    model.load_state_dict(under(tensors, "model."))
    return model, tensors


@pytest.mark.parametrize("case", [case for case in LTMP if case.startswith("fixed")])
def test_an_ltmp_model_without_thresholds_gives_the_authors_logits(case):
    model, tensors = ltmp_model()
    with torch.no_grad(), tprune.prune(model, "ltmp", r=LTMP[case]["r"]) as handle:
        logits = model(tensors["image"].float())
        assert handle.driver.entering[1::2] == LTMP[case]["non_cls_tokens_after_each_block"]
    assert torch.allclose(logits, tensors[f"{case}.logits"], atol=1e-5)


@pytest.mark.parametrize("case", [case for case in LTMP if not case.startswith("fixed")])
def test_ltmp_thresholds_give_the_authors_logits_in_a_batch_and_alone(case):
    model, tensors = ltmp_model()
    names, images = ("merge_threshold", "prune_threshold"), tensors["image"].float()
    given = {name: tuple(LTMP[case][name]) for name in names}
    with torch.no_grad(), tprune.prune(model, "ltmp", **given) as handle:
        for image, logits, counts in zip(
            images, tensors[f"{case}.logits"], LTMP[case]["non_cls_tokens_after_each_block"], strict=True
        ):
            handle.driver.ragged.reset()
            assert torch.allclose(model(image[None])[0], logits, atol=1e-5)
            assert handle.driver.entering[1::2] == counts
        handle.driver.ragged.reset()
        assert torch.allclose(model(images), tensors[f"{case}.logits"], atol=1e-5)
        mean = torch.tensor(LTMP[case]["non_cls_tokens_after_each_block"], dtype=torch.float64).mean(0)
        assert handle.driver.entering[1::2] == pytest.approx(mean.tolist())
