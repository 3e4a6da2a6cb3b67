"""What must hold on every kind of model, on further kinds: one method of every kind of signal."""

import copy

import pytest
import torch
from torch.nn import functional
from transformers import (
    CLIPVisionConfig,
    Gemma2Config,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
)

import tprune
from tests.vlm import test_contract as contract
from tests.vlm import test_equivalence as equivalence
from tests.vlm.tiny import IMAGE, MORE, TEXT, TOWER, tiny
from tprune.models.prompts import noise_prompts

METHODS = ["hiprune", "mmtok", "visionzip", "vflowopt", "fastv", "flowcut", "par"]
CONTRACTS = [
    contract.test_keeping_all_is_bitwise_the_dense_model_and_leaving_restores_it,
    contract.test_the_planned_counts_are_the_counts_that_enter,
    contract.test_a_batch_gives_what_its_prompts_give_alone,
    contract.test_generation_decodes_what_a_loop_of_single_steps_and_one_chunk_do,
    contract.test_generation_with_padding_and_beams_and_without_a_cache_agrees_with_prompts_alone,
    contract.test_a_prompt_without_images_is_left_alone,
]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", MORE)
@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda test: test.__name__.removeprefix("test_"))
def test_what_holds_on_every_kind_holds_here(contract, method, kind):
    contract(method, kind)


def test_qwen3_vl_adds_the_towers_features_to_the_tokens_that_are_left():
    model, given = tiny("qwen3-vl"), {}
    inputs, core = noise_prompts(model, 2, 0), model.model.language_model
    hook = core.register_forward_pre_hook(lambda module, args, kwargs: given.update(kwargs), with_kwargs=True)
    dense = model.model(**inputs).last_hidden_state
    hook.remove()
    with tprune.prune(model, "vlm/mmtok", keep=0.4) as handle:
        found = model.model(**inputs).last_hidden_state
        left = handle.driver.tally.owner >= 0
    features = [torch.zeros_like(dense) for _ in given["deepstack_visual_embeds"]]
    for full, some in zip(features, given["deepstack_visual_embeds"], strict=True):
        full[given["visual_pos_masks"]] = some
    masks = given["visual_pos_masks"][left].view(2, -1)
    alone = core(
        inputs_embeds=given["inputs_embeds"][left].view(2, -1, 32),
        position_ids=given["position_ids"][:, left].view(-1, 2, masks.shape[1]),
        visual_pos_masks=masks,
        deepstack_visual_embeds=[full[left].view(2, -1, 32)[masks] for full in features],
    )
    expected = alone.last_hidden_state
    assert torch.allclose(found[left].view_as(expected), expected, atol=1e-4)
    assert not torch.allclose(found[left], dense[left], atol=1e-2)


def gemma3(window):
    model = copy.deepcopy(tiny("gemma3"))
    for config in (model.config.text_config, model.model.language_model.config):
        config.sliding_window = window
    return model


def llava_with(text):
    """A LLaVA with a decoder that makes its masks itself."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlavaConfig(vision_config=CLIPVisionConfig(**TOWER), text_config=text, image_token_id=IMAGE)
        model = LlavaForConditionalGeneration(config).eval().requires_grad_(False)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.25)
    return model


MIXED = {"layer_types": ["sliding_attention", "full_attention"] * 2}
WINDOWED = {
    "gemma3-12": lambda: gemma3(12),
    "gemma3-28": lambda: gemma3(28),
    "mistral-12": lambda: llava_with(MistralConfig(**TEXT, sliding_window=12)),
    "mistral-28": lambda: llava_with(MistralConfig(**TEXT, sliding_window=28)),
    "qwen2-12": lambda: llava_with(Qwen2Config(**TEXT, **MIXED, use_sliding_window=True, sliding_window=12)),
    "gemma2-12": lambda: llava_with(Gemma2Config(**TEXT, **MIXED, head_dim=8, sliding_window=12)),
}


@pytest.fixture(scope="module", params=WINDOWED)
def windowed(request):
    """Sliding layers that see fewer tokens than a prompt's 32; fewer or more than the 24 that are left."""
    return WINDOWED[request.param]()


@pytest.mark.parametrize("method", ["fastv", "index-preserving", "mmtok", "todre", "visionzip"])
def test_beyond_a_sliding_window_what_leaves_is_as_if_hidden_and_a_window_counts_it(method, windowed):
    inputs, told = noise_prompts(windowed, 2, 0), torch.arange(5, 11).view(2, 3)
    handle = equivalence.put_to_work(windowed, method, positions="original")
    with handle:
        handle.driver.trace = trace = []
        found, cache = equivalence.cached_decode(windowed, inputs, told)
        chunk = windowed(**inputs, use_cache=True).past_key_values
        chunk = windowed(input_ids=told, past_key_values=chunk, use_cache=True).logits
        layers, width = handle.driver.layers, inputs["input_ids"].shape[1]
    assert width == 32
    assert torch.allclose(found[:, 1:], chunk, atol=2e-4)
    if equivalence.only_drops(trace, torch.arange(width)):
        expected = equivalence.in_one_forward(windowed, layers, inputs, told, cache.tprune_track)
        assert torch.allclose(found, expected, atol=2e-4)


def test_beyond_a_sliding_window_keeping_all_is_bitwise_the_dense_model(windowed):
    inputs, told = noise_prompts(windowed, 2, 0), torch.arange(5, 11).view(2, 3)
    dense, _ = equivalence.cached_decode(windowed, inputs, told)
    with tprune.prune(windowed, "vlm/mmtok", keep=1.0, positions="original"):
        assert torch.equal(equivalence.cached_decode(windowed, inputs, told)[0], dense)


@pytest.mark.parametrize("method", ["fastv", "mmtok"])
def test_padding_is_hidden_from_what_follows_whoever_makes_the_masks(method, windowed):
    inputs, told = noise_prompts(windowed, 1, 0), []
    padded = {
        name: value if name == "pixel_values" else functional.pad(value, (4, 0))
        for name, value in inputs.items()
    }
    with tprune.prune(windowed, f"vlm/{method}", keep=0.5):
        for one in (inputs, padded):
            cache = windowed(**one, use_cache=True).past_key_values
            mask = functional.pad(one["attention_mask"], (0, 1), value=1)
            given = {"input_ids": inputs["input_ids"][:, :1], "attention_mask": mask}
            told.append(windowed(**given, past_key_values=cache, use_cache=True).logits)
    assert torch.allclose(*told, atol=1e-4)
