"""Videos: the tokens of a VideoMAE, several frames of it in each."""

import pytest
import torch
import transformers

import tprune
from tests.conftest import start
from tests.golden_values import golden, under
from tests.videos import SMALL, noise, videomae
from tprune.errors import UserError
from tprune.methods import registry
from tprune.models.anatomy import anatomy

FITTING = (
    "atc",
    "cropr",
    "ltmp",
    "nose",
    "random",
    "saint",
    "sta",
    "tnt",
    "token-transforming",
    "tome",
    "zero-tprune",
)
LARGE = {"image_size": 224, "patch_size": 16, "num_frames": 16, "num_hidden_layers": 24}
"""Blocks and tokens of ViT-L on 16 frames."""


@pytest.fixture(scope="module")
def model():
    return videomae()


@pytest.mark.parametrize("method", FITTING)
def test_a_video_keeps_all_bitwise_and_loses_as_many_tokens_as_planned(model, method):
    clips, settings = noise(), start(method, model)
    dense = model(clips).logits
    with tprune.prune(model, f"vit/{method}", keep=1.0, **settings):
        assert torch.equal(model(clips).logits, dense)
    with tprune.prune(model, f"vit/{method}", keep=0.6, **settings) as handle:
        pruned = model(clips).logits
        assert handle.driver.trace.entering == handle.driver.entering[::2]
        assert abs(handle.achieved().value - 0.6) < 0.06
        assert torch.allclose(model(clips[:1]).logits, pruned[:1], atol=1e-5)
    assert not torch.equal(pruned, dense)
    assert torch.equal(model(clips).logits, dense)


def test_every_other_method_says_why_it_does_not_prune_videos(model):
    for method in set(registry.running_on("plain")) - set(FITTING):
        with pytest.raises(UserError, match="class token|of one image|--set graph=semantic"):
            tprune.prune(model, f"vit/{method}", keep=0.6, state={})


def test_gtp_prunes_videos_along_its_semantic_graph(model):
    with tprune.prune(model, "gtp", keep=0.6, graph="semantic", neighbours=3):
        assert torch.isfinite(model(noise()).logits).all()


def test_a_videomae_with_sta_gives_the_authors_logits():
    tensors, told = golden("vit", "sta-model")
    setting = told["settings"]
    model = videomae(**setting["model"])
    model.load_state_dict(under(tensors, "model."))
    video = tensors["video"].float()
    assert torch.allclose(model(video).logits, tensors["dense.logits"], atol=2e-6)
    # `r` is said of 196 tokens per frame.
    share = -(-setting["r"] * 196 // setting["tokens_per_frame"])
    with tprune.prune(model, "sta", r=share) as handle:
        logits = model(video).logits
        after = handle.driver.entering[2::2]
    assert after == setting["tokens_after_each_block"][:-1]
    assert torch.allclose(logits, tensors["logits"], atol=2e-6)


def test_the_papers_setting_has_the_papers_counts_in_the_papers_model():
    shape = anatomy(videomae(**LARGE)).shape
    assert (shape.tokens, shape.video, shape.grid) == (1568, (8, 14, 14), None)
    stages = registry.build("sta", "vit").stages(shape, None)
    assert [(stage.site.layer, stage.count) for stage in stages] == [(1, 1056), (9, 800), (17, 672)]


def test_sta_drops_as_many_tokens_of_every_pair_of_frames(model):
    with tprune.prune(model, "sta", keep=0.6) as handle:
        handle.driver.record = True
        model(noise())
        _, first = handle.driver.trace.reductions[0]
    frame = first.index // 4
    assert torch.equal(frame, frame.sort(dim=1).values)
    assert len({(frame == place).sum().item() for place in range(4)}) == 1


@pytest.mark.parametrize(
    ("make", "clue"),
    [
        (lambda: videomae(use_mean_pooling=False), "reads its first patch"),
        (
            lambda: transformers.TimesformerForVideoClassification(
                transformers.TimesformerConfig(
                    **{name: value for name, value in SMALL.items() if name != "tubelet_size"}
                )
            ),
            "TimesformerForVideoClassification is a video transformer of a make",
        ),
    ],
)
def test_video_models_of_other_makes_are_refused(make, clue):
    with pytest.raises(UserError, match=clue):
        tprune.prune(make(), "tome", keep=0.6)


def test_frames_given_by_hand_must_divide_the_tokens(model):
    with pytest.raises(UserError, match="frames=3: 16 tokens"):
        tprune.prune(model, "sta", keep=0.6, frames=3)
