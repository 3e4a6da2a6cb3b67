"""Images that keep different numbers of tokens."""

import pytest
import torch
import transformers

import tprune
from tests.conftest import tiny_vit
from tprune.core.reduction import Reduction
from tprune.errors import UserError
from tprune.models.ragged import Ragged

THRESHOLDS = {"merge_threshold": 0.6, "prune_threshold": 0.04}


def test_dense_features_of_a_ragged_batch_are_those_of_its_images(vit, images):
    with tprune.prune(vit, "ltmp", **THRESHOLDS) as handle:
        together = vit.forward_intermediates(images, indices=[3], intermediates_only=True)[0]
        counts = handle.driver.ragged.real.sum(1)
        alone = [
            vit.forward_intermediates(image[None], indices=[3], intermediates_only=True)[0]
            for image in images
        ]
    assert len(set(counts.tolist())) > 1
    assert together.shape[-2:] == (4, 4)
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)


def test_what_is_reported_is_what_happened_while_counting(vit, images):
    with tprune.prune(vit, "ltmp", **THRESHOLDS) as handle:
        assert handle.achieved().value == 1
        vit(images)
        with handle.counting():
            vit(images[:1])
        told = handle.achieved().value
        vit(images)
        assert handle.achieved().value == told
    with tprune.prune(vit, "ltmp", **THRESHOLDS) as handle:
        vit(images[:1])
        assert handle.achieved().value == pytest.approx(told)


def test_fillers_are_hidden_and_not_counted():
    ragged = Ragged(1, 1)
    ragged.begin(2)
    x = torch.zeros(2, 4, 3)
    ragged.count(0, x)
    assert ragged.hide(None, x) is None
    index = torch.tensor([[0, 1, 2], [0, 3, 0]])
    ragged.follow(Reduction.keep(index, 4, index.new_tensor([[1, 1, 1], [1, 1, 0]]).bool()))
    ragged.count(1, x[:, :3])
    assert ragged.means() == [3.0, 1.5]
    assert torch.equal(
        ragged.hide(None, x).isinf()[:, 0, 0], torch.tensor([[False] * 3, [False, False, True]])
    )


@pytest.mark.parametrize(
    ("model", "clue"),
    [
        (lambda: tiny_vit(class_token=False, global_pool="avg"), "without a class token"),
        (lambda: tiny_vit(global_pool="avg"), "averages over tokens"),
        (
            lambda: transformers.Dinov2ForImageClassification(
                transformers.Dinov2Config(
                    hidden_size=24, num_hidden_layers=2, num_attention_heads=3, image_size=32, patch_size=8
                )
            ),
            "averages over tokens",
        ),
    ],
)
def test_a_head_that_averages_over_tokens_is_refused(model, clue):
    with pytest.raises(UserError, match=clue):
        tprune.prune(model(), "ltmp", **THRESHOLDS)


def test_thresholds_must_fit_the_depth_and_are_a_budget_themselves(vit):
    with pytest.raises(UserError, match="2 numbers for 4 blocks"):
        tprune.prune(vit, "ltmp", merge_threshold=(0.5, 0.6))
    with pytest.raises(UserError, match="both budgets"):
        tprune.prune(vit, "ltmp", keep=0.6, merge_threshold=0.5)


def test_frames_must_divide_the_tokens(vit):
    with pytest.raises(UserError, match="frames=3: 16 tokens"):
        tprune.prune(vit, "sta", keep=0.7, frames=3)


def test_a_stack_of_frames_loses_as_many_tokens_from_each(images):
    model = tiny_vit(img_size=(128, 32), class_token=False, global_pool="avg")
    clip = torch.cat([images[:2], images[1:], images[:2], images[1:]], dim=2)  # four frames, top to bottom
    with tprune.prune(model, "sta", keep=0.6, frames=4) as handle:
        handle.driver.record = True
        model(clip)
        _, first = handle.driver.trace.reductions[0]
    frame = first.index // 16
    assert torch.equal(frame, frame.sort(dim=1).values)
    assert len({(frame == place).sum().item() for place in range(4)}) == 1
