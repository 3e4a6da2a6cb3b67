"""Patches that leave inside a vision tower are as if they had never been in its later blocks."""

import pytest
import torch

import tprune
from tests.vlm.tiny import tiny
from tprune.models.prompts import noise_prompts
from tprune.models.vlm import anatomy


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def watched(model):
    """What goes into every block of the tower and into the projector, filled by each call; and a remedy."""
    seen = {}
    parts = [*anatomy(model).blocks, model.model.multi_modal_projector]
    hooks = [
        part.register_forward_pre_hook(
            lambda _, args, kwargs, place=place: seen.update(
                {place: args[0] if args else kwargs["hidden_states"]}
            ),
            with_kwargs=True,
        )
        for place, part in enumerate(parts)
    ]
    return seen, lambda: [hook.remove() for hook in hooks]


@pytest.mark.parametrize("kind", ["llava", "llava-siglip"])
def test_later_blocks_compute_what_they_would_without_the_patches_that_left(kind):
    model = tiny(kind)
    inputs = noise_prompts(model, 2, 0)
    parts = anatomy(model)
    with tprune.prune(model, "vlm/saint-vlm", patches=0.5, where="tower", block=0):
        seen, stop = watched(model)
        model(**inputs)
        stop()
    alone = seen[1]
    assert alone.shape[1] == parts.prefix + 8
    for layer in parts.blocks[1 : parts.projected + 1]:
        alone = layer(alone, None)
    projected = seen[len(parts.blocks)]
    for row in range(2):
        near = torch.cdist(alone[row, parts.prefix :], projected[row]).amin(1)
        assert float(near.max()) < 1e-4


@pytest.mark.parametrize("kind", ["llava", "llava-next"])
def test_saint_lets_each_image_lose_what_it_has_too_much_of_the_same_in_any_batch(kind):
    model = tiny(kind)
    inputs = noise_prompts(model, 2, 3)
    inputs["pixel_values"][1:] = inputs["pixel_values"][1:].mean((-1, -2), keepdim=True)
    alone, counts = [], []
    for row in range(2):
        handle = tprune.prune(model, "vlm/saint-vlm", threshold=0.4, partners=2)
        with handle:
            alone.append(model(**{name: value[row : row + 1] for name, value in inputs.items()}).logits)
            counts.append([layer["tokens"] for layer in handle.per_layer()])
    with tprune.prune(model, "vlm/saint-vlm", threshold=0.4, partners=2):
        assert torch.allclose(model(**inputs).logits, torch.cat(alone), atol=2e-4)
    assert counts[0] != counts[1]
