"""EET against its authors' own code (see tests/golden/vit/*.json)."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import tprune
from tests.golden_values import golden, under
from tprune.core.budget import Site
from tprune.core.score import cls_times_head_norm
from tprune.errors import UserError
from tprune.methods import registry
from tprune.methods.base import Shape


def model_of(told, tensors):
    model = VisionTransformer(**told["settings"]["model"]).eval().requires_grad_(False)
    model.load_state_dict(under(tensors, "model."))
    return model


def test_eet_keeps_the_authors_patches_in_their_order_and_gives_their_logits():
    tensors, told = golden("vit", "eet")
    model = model_of(told, tensors)
    with tprune.prune(model, "eet") as handle:
        handle.driver.record = True
        logits = model(tensors["image"].float())
        found = handle.driver.trace.reductions
    assert [site for site, _ in found] == [Site(4), Site(8), Site(10)]
    for place, (_, reduction) in enumerate(found):
        kept, expected = reduction.index[:, 1:] - 1, tensors[f"index{place}"]
        assert torch.equal(kept.sort(1).values, expected.sort(1).values)
    # Among few the authors' order is far from ties.
    assert torch.equal(kept, expected)
    assert torch.allclose(logits, tensors["logits"], atol=1e-5)


def test_eet_scores_are_the_authors():
    tensors, told = golden("vit", "eet")
    attention = model_of(told, tensors).blocks[0].attn
    x = tensors["x"]
    query, key, value = attention.qkv(x).unflatten(2, (3, 3, 4)).permute(2, 0, 3, 1, 4)
    rows = (query @ key.transpose(2, 3) / 2).softmax(-1)
    found = cls_times_head_norm(rows[:, :, 0, 1:], (rows @ value)[:, :, 1:])
    assert torch.allclose(found, tensors["score"], atol=1e-6)


def test_eet_with_heads_that_read_equally_much_is_the_mean_over_heads():
    row = torch.rand(2, 3, 5)
    assert torch.allclose(cls_times_head_norm(row, torch.ones(2, 3, 5, 4)), row.mean(1))


def test_eet_keeps_the_papers_counts_at_its_proportions():
    eet, shape = registry.build("eet", "vit"), Shape(12, 196, 1, has_cls=True)
    assert [stage.count for stage in eet.stages(shape, None)] == [98, 49, 12]
    assert eet.stages(shape, 12 / 196) == eet.stages(shape, None)
    with pytest.raises(UserError, match="2 numbers for 3 blocks"):
        registry.build("eet", "vit", {"counts": (98, 49)}).check(shape)
