"""A second call on the cache of a pruned prompt."""

import pytest
import torch
from transformers import DynamicCache

import tprune
from tests.vlm.tiny import tiny
from tprune.errors import UserError
from tprune.models.prompts import noise_prompts

every_site = pytest.mark.parametrize("method", ["divprune", "fastv"])
every_model = pytest.mark.parametrize("name", ["llava", "qwen2.5-vl", "internvl"])
ASK = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def empty(model):
    return DynamicCache(config=model.config.get_text_config())


@every_site
@every_model
def test_an_image_in_a_later_turn_is_refused_and_the_conversation_can_go_on(method, name):
    model = tiny(name)
    first, second = noise_prompts(model, 1, 0), noise_prompts(model, 1, 1)
    mask = torch.ones(1, first["input_ids"].shape[1] + second["input_ids"].shape[1], dtype=torch.long)
    text = {"input_ids": torch.arange(5, 11)[None]}
    with tprune.prune(model, f"vlm/{method}", keep=0.5):
        held, other = empty(model), empty(model)
        model(**first, past_key_values=held, use_cache=True)
        model(**first, past_key_values=other, use_cache=True)
        with pytest.raises(
            UserError, match="an image in a later turn .* give the whole conversation as one prompt"
        ):
            model(**second | {"attention_mask": mask}, past_key_values=held, use_cache=True)
        after = model(**text, past_key_values=held, use_cache=True).logits
        assert torch.equal(after, model(**text, past_key_values=other, use_cache=True).logits)


@every_site
def test_an_image_behind_a_cached_prompt_without_images_is_refused_too(method):
    model = tiny("llava")
    with tprune.prune(model, f"vlm/{method}", keep=0.5):
        held = empty(model)
        model(input_ids=torch.arange(5, 11)[None], past_key_values=held, use_cache=True)
        with pytest.raises(UserError, match="an image in a later turn"):
            model(**noise_prompts(model, 1, 0), past_key_values=held, use_cache=True)


def test_a_whole_conversation_with_a_new_image_behind_a_pruned_cache_is_refused():
    model = tiny("llava")
    first, second = noise_prompts(model, 1, 0), noise_prompts(model, 1, 1)
    whole = torch.cat([first["input_ids"], second["input_ids"]], 1)
    with tprune.prune(model, "vlm/divprune", keep=0.5):
        held = empty(model)
        model(**first, past_key_values=held, use_cache=True)
        with pytest.raises(UserError, match="an image in a later turn"):
            model.generate(input_ids=whole, pixel_values=second["pixel_values"], past_key_values=held, **ASK)


def test_two_images_of_one_conversation_given_at_once_are_both_pruned():
    model = tiny("llava")
    inputs = noise_prompts(model, 1, 0, images=2)
    with tprune.prune(model, "vlm/divprune", keep=0.5) as handle:
        model(**inputs)
        kept = handle.driver.tally.owner[0] >= 0
    image = inputs["input_ids"][0] == model.config.image_token_id
    assert kept[image].view(2, 16).sum(1).tolist() == [8, 8]


@every_site
@pytest.mark.parametrize("name", ["llava", "internvl"])
def test_a_later_turn_of_text_in_generate_is_what_single_steps_give(method, name):
    model = tiny(name)
    first, behind = noise_prompts(model, 1, 0), torch.arange(5, 11)[None]
    length = first["input_ids"].shape[1]
    mask = torch.ones(1, length + 6, dtype=torch.long)
    with tprune.prune(model, f"vlm/{method}", keep=0.5):
        held = empty(model)
        model(**first, past_key_values=held, use_cache=True)
        told = model.generate(input_ids=behind, attention_mask=mask, past_key_values=held, **ASK)[:, 6:]
        held = empty(model)
        model(**first, past_key_values=held, use_cache=True)
        steps = [
            model(input_ids=token[:, None], past_key_values=held, use_cache=True).logits[:, -1].argmax(-1)
            for token in torch.cat([behind, told[:, :-1]], 1).unbind(1)
        ]
    assert torch.equal(torch.stack(steps[5:], 1), told)


def test_a_whole_conversation_behind_a_pruned_cache_is_refused_where_it_would_be_cut_at_the_wrong_place():
    model = tiny("llava")
    first, behind = noise_prompts(model, 1, 0), torch.arange(5, 11)[None]
    whole = torch.cat([first["input_ids"], behind], 1)
    with tprune.prune(model, "vlm/divprune", keep=0.5):
        held = empty(model)
        model(**first, past_key_values=held, use_cache=True)
        with pytest.raises(UserError, match="pass only the new ones"):
            model.generate(input_ids=whole, past_key_values=held, **ASK)
        with pytest.raises(UserError, match="pass only the new ones"):
            model(input_ids=behind, attention_mask=torch.ones(1, 6), past_key_values=held, use_cache=True)
