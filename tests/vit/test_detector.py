"""Detectors: the queries at the end of the sequence are never pruned, positions are added between the blocks."""

import pytest
import torch
from transformers import YolosConfig, YolosForObjectDetection

import tprune
from tests.conftest import start
from tprune.core.reduction import Reduction
from tprune.methods import registry

METHODS = [fact.id for fact in registry.facts("vit")]


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
