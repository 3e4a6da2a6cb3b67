"""The vision towers of transformers, and the real makes of timm."""

import pytest
import timm
import torch
import transformers

import tprune
from tests.conftest import start
from tprune.errors import UserError
from tprune.methods import registry
from tprune.models.anatomy import anatomy

METHODS = registry.running_on("plain")
NEED_A_CLASS_TOKEN = {"bat", "diffrate", "eet", "evit", "mstm", "ppt"}
ROTARY = ("eva02_tiny_patch14_224", "vit_small_patch16_dinov3")
SMALL = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 48}
TOWERS = {
    "vit": ("ViTForImageClassification", "ViTConfig", {"num_labels": 7}, 1),
    "deit": ("DeiTForImageClassification", "DeiTConfig", {}, 2),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", {"mlp_ratio": 2}, 1),
    "dinov2 registers": (
        "Dinov2WithRegistersForImageClassification",
        "Dinov2WithRegistersConfig",
        {"mlp_ratio": 2, "num_register_tokens": 3},
        4,
    ),
    "clip": ("CLIPVisionModel", "CLIPVisionConfig", {}, 1),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", {}, 0),
}
TIMM = (
    "deit_small_patch16_224",
    "deit_small_distilled_patch16_224",
    "vit_small_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2",
    "deit3_small_patch16_224",
    "vit_base_patch16_siglip_224",
    "eva02_tiny_patch14_224",
    "vit_small_patch16_dinov3",
)


def built(make):
    """A model with weights from a fixed seed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval().requires_grad_(False)


def logits(model, images):
    """What the model says, whatever it calls it."""
    out = model(images)
    if isinstance(out, torch.Tensor):
        return out
    return out.logits if hasattr(out, "logits") else out.pooler_output


def holds_with_every_method(model, images):
    """Each method that takes the model keeps all of it bitwise, prunes as planned, image by image, and leaves no trace.

    Returns:
        the methods that refuse it.
    """
    dense, refused = logits(model, images), set()
    for method in METHODS:
        try:
            registry.build(method, "vit").check(anatomy(model).shape)
        except UserError:
            refused.add(method)
            continue
        given = start(method, model)
        with tprune.prune(model, f"vit/{method}", keep=1.0, **given):
            assert torch.equal(logits(model, images), dense), method
        with tprune.prune(model, f"vit/{method}", keep=0.6, **given) as handle:
            pruned = logits(model, images)
            assert handle.driver.trace.entering == handle.driver.entering[::2], method
            assert abs(handle.achieved().value - 0.6) < 0.06, method
            assert torch.allclose(logits(model, images[:1]), pruned[:1], atol=1e-5), method
        assert torch.equal(logits(model, images), dense), method
        assert not torch.equal(pruned, dense), method
    return refused


@pytest.mark.parametrize("tower", TOWERS)
def test_every_method_prunes_the_vision_towers_of_transformers(tower, images):
    kind, config, extra, prefix = TOWERS[tower]
    config = getattr(transformers, config)(image_size=32, patch_size=8, **SMALL, **extra)
    model = built(lambda: getattr(transformers, kind)(config))
    assert anatomy(model).shape.prefix == prefix
    assert holds_with_every_method(model, images) == (set() if prefix else NEED_A_CLASS_TOKEN)


@pytest.mark.parametrize("name", ROTARY)
def test_every_method_prunes_models_with_rotary_positions(name, images):
    small = {"embed_dim": 24, "num_heads": 3, "img_size": 32, "patch_size": 8, "num_classes": 5}
    model = built(lambda: timm.create_model(name, pretrained=False, depth=4, **small))
    assert holds_with_every_method(model, images) == set()


@pytest.mark.parametrize("name", TIMM)
def test_timm_makes_are_identical_at_keep_one(name):
    size = 28 if "14" in name else 32
    model = built(lambda: timm.create_model(name, pretrained=False, depth=3, img_size=size))
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    dense = model(images)
    for method in ("vit/random", "tome", "zero-tprune") + (() if "siglip" in name else ("evit",)):
        with tprune.prune(model, method, keep=1.0):
            assert torch.equal(model(images), dense), method
        with tprune.prune(model, method, keep=0.75):
            assert torch.isfinite(model(images)).all()


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("eva02_tiny_patch14_224", 56),
        ("vit_small_patch16_dinov3", 64),
        ("vit_small_patch16_rope_mixed_224", 64),
    ],
)
def test_rotary_tables_follow_the_tokens_that_are_left(name, size):
    model = built(lambda: timm.create_model(name, pretrained=False, depth=3, img_size=size))
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with tprune.prune(model, "vit/random", keep=0.6, layers=(0,)) as handle:
        handle.driver.record = True
        pruned = model(images)
        (_, reduction), *_ = handle.driver.trace.reductions
    # The same tokens, chosen by hand before the first block, each with its own row of the table.
    hidden, table = model._pos_embed(model.patch_embed(images))
    hidden = reduction.apply(model.norm_pre(hidden))
    place = reduction.index[:, model.num_prefix_tokens :] - model.num_prefix_tokens
    # Of all blocks and heads, or of each block and head.
    tables = table if table.dim() == 4 else table.expand(3, 1, -1, -1)
    for block, rows in zip(model.blocks, tables, strict=True):
        hidden = block(hidden, rope=rows[:, place].transpose(0, 1))
    assert torch.allclose(model.forward_head(model.norm(hidden)), pruned, atol=1e-5)


def test_dense_features_come_back_at_full_length():
    model = built(lambda: timm.create_model("vit_tiny_patch16_224", pretrained=False, depth=4, img_size=64))
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with tprune.prune(model, "tome", keep=0.7) as handle:
        handle.driver.record = True
        features = model.forward_features(images)
        for _, reduction in reversed(handle.driver.trace.reductions):
            features = reduction.restore(features)
    assert features.shape == (2, 17, model.embed_dim)
