"""On the built-in model, at the same budget, methods beat the random floor."""

import pytest
import torch

import tprune
from tprune.data import images
from tprune.methods import registry
from tprune.models import load as loaders
from tprune.models.anatomy import anatomy
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


def test_heads_that_tnt_has_fitted_beat_untrained_ones_and_random(model_and_scenes, floor):
    model, pixels, labels = model_and_scenes
    first = registry.build("tnt", "vit").neutral_state(anatomy(model).shape, 0)
    with tprune.prune(model, "tnt", keep=KEEP, state=first):
        untrained = accuracy(model, pixels, labels)
    with tprune.prune(model, "tnt", keep=KEEP, fit="built-in", epochs=0.25) as handle:
        assert handle.fitted["steps"] == 32
        assert accuracy(model, pixels, labels) > max(untrained, floor) + 0.05
