"""On the built-in model, at the same budget, methods beat the random floor."""

from copy import deepcopy

import pytest
import torch

import tprune
from tests.conftest import start
from tprune.data import images
from tprune.models import load as loaders
from tprune.models.source import resolve
from tprune.recipe import ModelSource

SAMPLES = 200
KEEP = 0.55


@pytest.fixture(scope="module")
def model_and_scenes():
    source = resolve(ModelSource("digits-vit"), "vit")
    subject = loaders.load(source, "vit", device="cpu", dtype="float32", seed=0)
    scenes = images.built_in(SAMPLES)
    pixels = torch.stack([subject.processor(scenes.open(place)) for place in range(SAMPLES)])
    return subject.model, pixels, torch.tensor(scenes.labels)


def accuracy(model, pixels, labels):
    """Top-1 over all scenes."""
    with torch.no_grad():
        guesses = torch.cat([model(batch).argmax(-1) for batch in pixels.split(50)])
    return (guesses == labels).double().mean().item()


@pytest.fixture(scope="module")
def floor(model_and_scenes):
    """Accuracy of random drop, the mean of three seeds."""
    model, pixels, labels = model_and_scenes
    found = []
    for seed in range(3):
        with tprune.prune(model, "vit/random", keep=KEEP, seed=seed):
            found.append(accuracy(model, pixels, labels))
    return sum(found) / len(found)


@pytest.mark.parametrize("method", ["evit", "tome", "zero-tprune"])
def test_it_beats_random_at_the_same_budget(method, model_and_scenes, floor):
    model, pixels, labels = model_and_scenes
    with tprune.prune(model, method, keep=KEEP):
        assert accuracy(model, pixels, labels) > floor + 0.05


SHORT = {
    "tnt": (KEEP, {"epochs": 32 * 16 / 2048}),
    "mstm": (0.35, {"epochs": 32 * 16 / 2048, "lr": 8e-5}),
    "diffrate": (0.3, {"epochs": 64 * 2 / 2048, "batch": 2, "lr": 0.3}),
    "ltmp": (0.3, {"epochs": 32 * 2 / 2048, "batch": 2, "lr": 1e-3, "merge_lr": 0.05}),
}
"""A budget at which much is lost, and a fit of seconds."""


@pytest.mark.parametrize("method", SHORT)
def test_what_a_short_fit_learns_beats_the_neutral_state_and_random_at_the_same_budget(
    method, model_and_scenes, monkeypatch
):
    model, pixels, labels = model_and_scenes
    # A fit may tune the model, which the other tests want as it was.
    model = deepcopy(model)
    monkeypatch.setattr("tprune.pipelines.fit.SETTLE_IMAGES", 64)
    keep, short = SHORT[method]
    neutral = [(method, start(method, model)), ("vit/random", {})]
    rivals = []
    for rival, first in neutral:
        with tprune.prune(model, rival, keep=keep, **first):
            rivals.append(accuracy(model, pixels, labels))
    with tprune.prune(model, method, keep=keep, fit="built-in", **short) as handle:
        assert accuracy(model, pixels, labels) > max(rivals) + 0.05
        assert handle.achieved().value == pytest.approx(keep, abs=0.02)
