"""Which image tokens belong together, and which patch of the tower each of them is."""

import pytest
import torch

import tprune
from tests.vlm.tiny import IMAGE, tiny
from tprune.models.encoder import Sight
from tprune.models.layout import units
from tprune.models.prompts import noise_prompts
from tprune.models.vlm import anatomy


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def embeddings(model, inputs):
    """What enters the decoder."""
    seen = {}
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    model(**inputs)
    hook.remove()
    return seen["inputs_embeds"]


def projected(model, pixels):
    """The projector's output for every patch of every crop, before any packing: [crops, P, D]."""
    states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
    return model.model.multi_modal_projector(states[:, 1:])


@pytest.mark.parametrize("size", [[32, 64], [64, 32], [60, 44], [20, 64]])
def test_every_token_of_a_crop_is_the_projection_of_its_patch(size):
    model = tiny("llava-next")
    inputs = noise_prompts(model, 1, 0)
    sizes = torch.tensor([size])
    crops = 5 if size == [60, 44] else 3
    inputs["pixel_values"] = torch.randn(1, crops, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    features = model.model.get_image_features(inputs["pixel_values"], sizes).pooler_output[0]
    ids = torch.cat([torch.arange(5, 9), torch.full((len(features),), IMAGE), torch.arange(9, 15)])[None]
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids), "image_sizes": sizes}
    found = units(model.model, model.config, inputs, ids == IMAGE, by_crop=True)
    expected = projected(model, inputs["pixel_values"][0])
    embeds = embeddings(model, inputs)
    assert [unit.crop for unit in found] == list(range(crops))
    padded = 0
    for unit in found:
        there = unit.slot >= 0
        padded += int((~there).sum())
        assert torch.allclose(embeds[0, unit.slot[there]], expected[unit.crop][there], atol=1e-5)
    tokens = sum(int((unit.slot >= 0).sum()) for unit in found)
    newlines = len(features) - tokens
    assert newlines > 0
    assert (padded > 0) == (size in ([60, 44], [20, 64]))
    [whole] = units(model.model, model.config, inputs, ids == IMAGE, by_crop=False)
    assert whole.slot.tolist() == list(range(4, 4 + len(features)))


def test_a_resized_mosaic_is_a_unit_of_its_own():
    model = tiny("llava-onevision")
    sizes = torch.tensor([[64, 64]])
    # With room for one crop only, the mosaic of four is resized.
    inputs = {"image_sizes": sizes, "vision_aspect_ratio": "anyres_max_1"}
    pixels = torch.randn(1, 5, 3, 32, 32)
    features = model.model.get_image_features(
        pixels, sizes, vision_aspect_ratio="anyres_max_1"
    ).pooler_output[0]
    mask = torch.ones(1, len(features), dtype=torch.bool)
    thumbnail, mosaic = units(model.model, model.config, inputs, mask, by_crop=True)
    assert thumbnail.slot.tolist() == list(range(16))
    assert len(mosaic.slot) < len(features) - 16
    assert mosaic.slot.min() == 16


def test_tiles_that_follow_one_another_are_one_image():
    model = tiny("internvl")
    row = torch.zeros(2, 60, dtype=torch.bool)
    row[0, 3:35] = True
    row[0, 40:56] = True
    row[1, 10:26] = True
    inputs = {"pixel_values": torch.randn(4, 3, 32, 32)}
    images = units(model.model, model.config, inputs, row, by_crop=False)
    assert [(unit.row, len(unit.slot), unit.crop) for unit in images] == [(0, 32, 0), (0, 16, 2), (1, 16, 3)]
    tiles = units(model.model, model.config, inputs, row, by_crop=True)
    assert [(unit.row, unit.image, unit.crop) for unit in tiles] == [
        (0, 0, 0),
        (0, 0, 1),
        (0, 1, 2),
        (1, 2, 3),
    ]


def test_scores_before_a_pixel_shuffle_are_the_mean_of_the_four_patches_a_token_is_made_of():
    model = tiny("internvl")
    with tprune.prune(model, "fastervlm", keep=0.5) as handle:
        score = torch.arange(64.0)[None]
        sight = Sight(anatomy(model), {})
        [unit] = units(model.model, model.config, {}, torch.ones(1, 16, dtype=torch.bool), by_crop=True)
        pooled = handle.projector.views.pool(sight, [unit], score)
    blocks = score.view(1, 4, 2, 4, 2).mean((2, 4)).flatten(1)
    assert torch.equal(pooled, blocks)


def test_every_image_keeps_the_same_fraction_and_newlines_leave_with_the_first_token():
    model = tiny("llava-next")
    inputs = noise_prompts(model, 1, 0, images=2)
    with tprune.prune(model, "fastervlm", keep=0.5) as handle:
        model(**inputs)
        owner = handle.driver.tally.owner[0]
    found = units(model.model, model.config, inputs, inputs["input_ids"] == IMAGE, by_crop=True)
    assert [int((owner[unit.slot] >= 0).sum()) for unit in found] == [8] * 6
    member = torch.cat([unit.slot for unit in found])
    newlines = (inputs["input_ids"][0] == IMAGE).index_fill(0, member, False)
    assert newlines.sum() == 8
    assert (owner[newlines] == -1).all()
    assert (owner[inputs["input_ids"][0] != IMAGE] >= 0).all()


def test_the_class_token_row_is_that_of_the_block_whose_output_is_projected():
    model = tiny("llava")
    inputs = noise_prompts(model, 1, 0)
    with tprune.prune(model, "fastervlm", keep=0.25) as handle:
        model(**inputs)
        owner = handle.driver.tally.owner[0]
    model.set_attn_implementation({"vision_config": "eager"})
    attentions = model.model.vision_tower(inputs["pixel_values"], output_attentions=True).attentions
    model.set_attn_implementation({"vision_config": "sdpa"})
    score = attentions[-2].mean(1)[0, 0, 1:]
    kept = owner[inputs["input_ids"][0] == IMAGE] >= 0
    assert kept.nonzero().flatten().tolist() == sorted(score.topk(4).indices.tolist())
