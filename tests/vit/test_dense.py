"""Dense outputs: every block's features at full length, whatever has left."""

import pytest
import torch
from transformers import DPTConfig, DPTForSemanticSegmentation

import tprune
from tests.conftest import start, tiny_vit
from tprune.methods import registry

METHODS = registry.running_on("plain")
every_method = pytest.mark.parametrize("method", METHODS)


def tiny_dpt():
    """A segmentation model on a plain ViT of four blocks and 16 patches."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = DPTConfig(
            hidden_size=24,
            num_hidden_layers=4,
            num_attention_heads=3,
            intermediate_size=48,
            image_size=32,
            patch_size=8,
            backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=[8, 8, 8, 8],
            fusion_hidden_size=8,
            num_labels=5,
            is_hybrid=False,
            backbone_featmap_shape=None,
            use_auxiliary_head=False,
        )
        model = DPTForSemanticSegmentation(config).eval().requires_grad_(False)
        for parameter in model.dpt.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
        return model


@every_method
def test_intermediate_features_come_at_full_length_and_the_last_ones_classify_as_before(method, vit, images):
    with tprune.prune(vit, f"vit/{method}", keep=0.6, **start(method, vit)):
        final, features = vit.forward_intermediates(images, output_fmt="NLC", return_prefix_tokens=True)
        pruned = vit(images)
        assert torch.allclose(vit.forward_head(final), pruned, atol=1e-5)
        assert vit(images).shape == pruned.shape
    assert len(features) == 4
    assert all(patches.shape == (3, 16, 24) for patches, _ in features)
    assert "forward_intermediates" not in vit.__dict__


@every_method
def test_keeping_all_leaves_intermediate_features_bitwise_dense(method, vit, images):
    dense = vit.forward_intermediates(images, intermediates_only=True)
    with tprune.prune(vit, f"vit/{method}", keep=1.0, **start(method, vit)):
        kept = vit.forward_intermediates(images, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(kept, dense, strict=True))


def test_a_dropped_token_keeps_its_last_value_and_a_kept_one_goes_on(images):
    vit = tiny_vit(depth=8)
    with tprune.prune(vit, "vit/random", layers=(6,), ratio=0.5) as handle:
        features = vit.forward_intermediates(images, output_fmt="NLC", intermediates_only=True)
        left = handle.driver.position[:, 1:] - 1  # [B, 8], the patches that block 4 and later see
    gone = torch.ones(3, 16, dtype=torch.bool).scatter(1, left, False)
    assert gone.sum() == 24
    for later in features[4:]:
        assert torch.equal(later[gone], features[3][gone])
        assert not torch.isclose(later[~gone], features[3][~gone]).all(-1).any()


def test_merged_tokens_share_one_value(vit, images):
    with tprune.prune(vit, "tome", r=(4,)) as handle:
        features = vit.forward_intermediates(images, output_fmt="NLC", intermediates_only=True)
        left = handle.driver.position.shape[1] - 1
    assert left < 16
    for image in features[-1]:
        assert len(image.unique(dim=0)) == left


@pytest.mark.parametrize("layers", [None, 1])
def test_get_intermediate_layers_gives_full_grids(vit, images, layers):
    with tprune.prune(vit, "evit", keep=0.6):
        found = vit.get_intermediate_layers(images, n=layers or 4, reshape=True)
    assert [tuple(one.shape) for one in found] == [(3, 24, 4, 4)] * (layers or 4)


@every_method
def test_a_segmentation_model_of_transformers_sees_all_patches(method, images):
    model = tiny_dpt()
    dense = model(images).logits
    with tprune.prune(model, f"vit/{method}", keep=1.0, **start(method, model)):
        assert torch.equal(model(images).logits, dense)
    with tprune.prune(model, f"vit/{method}", keep=0.6, **start(method, model)) as handle:
        pruned = model(images).logits
        assert min(handle.driver.trace.entering) < 16
        assert torch.allclose(model(images[:1]).logits, pruned[:1], rtol=1e-3, atol=1e-12)
    assert pruned.shape == dense.shape
    assert not torch.equal(pruned, dense)
    assert torch.equal(model(images).logits, dense)


def test_sizes_weigh_in_attention_also_where_blocks_take_no_mask(images):
    model = tiny_dpt()
    with tprune.prune(model, "tome", keep=0.6):
        weighed = model(images).logits
    with tprune.prune(model, "tome", keep=0.6, prop_attn=False):
        assert not torch.allclose(model(images).logits, weighed, rtol=1e-4, atol=0)
