"""What every method of the family must do on every kind of model, run over whatever files there are."""

import pytest
import torch
from transformers import DynamicCache

import tprune
from tests.vlm.tiny import IMAGE, KINDS, of_sizes, one_row, start, tiny, together
from tprune.errors import UserError
from tprune.methods import registry
from tprune.models.prompts import noise_prompts
from tprune.models.vlm import anatomy

METHODS = [fact.id for fact in registry.facts("vlm")]
every_method = pytest.mark.parametrize("method", METHODS)
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def pruned(model, method, **settings):
    """The method at work, or None where it says that it does not fit the model."""
    if registry.load(method, "vlm").needs_cls and not anatomy(model).prefix:
        with pytest.raises(UserError, match="class token"):
            tprune.prune(model, f"vlm/{method}", **settings)
        return None
    return tprune.prune(model, f"vlm/{method}", **start(method, model), **settings)


def behind(model, inputs):
    """Logits of a token behind the prompt: they tell of what left the prompt, and of what left its cache."""
    cache = model(**inputs, use_cache=True).past_key_values
    return model(input_ids=inputs["input_ids"][:, :1], past_key_values=cache, use_cache=True).logits


def inside(model):
    """What a leftover hook, attribute or config would change."""
    return {
        name: (
            set(vars(module)),
            list(module._forward_pre_hooks),
            list(module._forward_hooks),
            id(getattr(module, "config", None)),
        )
        for name, module in model.named_modules()
    }


@every_method
@every_kind
def test_keeping_all_is_bitwise_the_dense_model_and_leaving_restores_it(method, kind):
    model = tiny(kind)
    inputs = noise_prompts(model, 2, 0)
    dense = model(**inputs).logits
    before = inside(model)
    handle = pruned(model, method, keep=1.0)
    if handle is None:
        return
    with handle:
        assert torch.equal(model(**inputs).logits, dense)
        assert handle.achieved().value == 1.0
    later = behind(model, inputs)
    with tprune.prune(model, f"vlm/{method}", **start(method, model), keep=0.5):
        assert not torch.equal(behind(model, inputs), later)
    assert torch.equal(model(**inputs).logits, dense)
    assert inside(model) == before


@every_method
@every_kind
def test_the_planned_counts_are_the_counts_that_enter(method, kind):
    model = tiny(kind)
    inputs = noise_prompts(model, 2, 1)
    tokens = int((inputs["input_ids"][0] == IMAGE).sum())
    handle = pruned(model, method, keep=0.5)
    if handle is None:
        return
    with handle:
        cache = model(**inputs, use_cache=True).past_key_values
        entering = [row["tokens"] for row in handle.per_layer()]
        text = inputs["input_ids"].shape[1] - tokens
        held = entering[:1] * len(entering) if handle.driver.hides else entering
        if getattr(handle.driver, "uniform", False):
            held = entering[-1:] * len(entering)
        # Of layers that do not run tests/vlm/test_par.py tells.
        if not getattr(handle.driver.method, "routes", False):
            assert [layer.keys.shape[2] for layer in cache.layers] == [text + count for count in held]
        assert abs(handle.achieved().value - 0.5) < 0.06
        assert handle.achieved().value == pytest.approx(sum(entering) / (len(entering) * tokens))


@every_method
@every_kind
def test_a_batch_gives_what_its_prompts_give_alone(method, kind):
    model = tiny(kind)
    inputs = noise_prompts(model, 2, 2, images=2)
    handle = pruned(model, method, keep=0.4)
    if handle is None:
        return
    with handle:
        together = model(**inputs).logits
        alone = torch.cat([model(**one_row(inputs, row, 2)).logits for row in range(2)])
    assert torch.allclose(together, alone, atol=2e-4)


@every_method
@pytest.mark.parametrize("kind", ["llava-next", "llava-onevision"])
def test_images_of_several_sizes_in_a_batch_are_what_they_are_alone(method, kind):
    model = tiny(kind)
    prompts = [
        of_sizes(model, sizes, seed)
        for seed, sizes in enumerate([[(60, 44)], [(32, 64), (20, 64)], [(64, 32)]])
    ]
    handle = pruned(model, method, keep=0.4)
    if handle is None:
        return
    with handle:
        alone = torch.cat([model(**prompt).logits[:, -1] for prompt in prompts])
        assert torch.allclose(model(**together(prompts)).logits[:, -1], alone, atol=5e-4)


@every_method
@every_kind
def test_generation_decodes_what_a_loop_of_single_steps_and_one_chunk_do(method, kind):
    model = tiny(kind)
    inputs = noise_prompts(model, 2, 3)
    handle = pruned(model, method, keep=0.5)
    if handle is None:
        return
    with handle:
        told = model.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0)[:, -4:]
        cache = DynamicCache(config=model.config.get_text_config())
        first = model(**inputs, past_key_values=cache, use_cache=True).logits[:, -1:]
        steps = [
            model(input_ids=told[:, t : t + 1], past_key_values=cache, use_cache=True).logits
            for t in range(3)
        ]
        cache = DynamicCache(config=model.config.get_text_config())
        model(**inputs, past_key_values=cache, use_cache=True)
        chunk = model(input_ids=told[:, :3], past_key_values=cache, use_cache=True).logits
    assert torch.equal(torch.cat([first, *steps], 1).argmax(-1), told)
    assert torch.allclose(torch.cat(steps, 1), chunk, atol=2e-4)


@every_method
@pytest.mark.parametrize("kind", ["llava", "qwen2.5-vl", "internvl"])
def test_generation_with_padding_and_beams_and_without_a_cache_agrees_with_prompts_alone(method, kind):
    model = tiny(kind)
    short = noise_prompts(model, 1, 4, behind=6)
    long = noise_prompts(model, 1, 5)
    gap = long["input_ids"].shape[1] - short["input_ids"].shape[1]
    both = {}
    for name, value in short.items():
        if name in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"):
            value = torch.nn.functional.pad(value, (gap, 0))
        both[name] = torch.cat([value, long[name]])
    handle = pruned(model, method, keep=0.5)
    if handle is None:
        return
    ask = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    ask["suppress_tokens"] = [IMAGE, IMAGE + 1, IMAGE + 2, IMAGE + 3]
    with handle:
        alone = torch.cat([model.generate(**one, **ask)[:, -4:] for one in (short, long)])
        assert torch.equal(model.generate(**both, **ask)[:, -4:], alone)
        if not handle.driver.generating.cached:
            assert torch.equal(model.generate(**both, use_cache=False, **ask)[:, -4:], alone)
        alone = torch.cat([model.generate(**one, num_beams=2, **ask)[:, -4:] for one in (short, long)])
        assert torch.equal(model.generate(**both, num_beams=2, **ask)[:, -4:], alone)
        if handle.driver.generating.cached:
            with pytest.raises(UserError, match="use_cache=True"):
                model.generate(**both, use_cache=False, **ask)


@every_method
@every_kind
def test_a_prompt_without_images_is_left_alone(method, kind):
    model = tiny(kind)
    inputs = {"input_ids": torch.arange(5, 17)[None].repeat(2, 1)}
    dense = model(**inputs).logits
    told = model.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=0)
    handle = pruned(model, method, keep=0.4)
    if handle is None:
        return
    with handle:
        assert torch.equal(model(**inputs).logits, dense)
        assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=0), told)


@every_method
def test_a_row_without_images_in_a_batch_is_left_alone(method):
    model = tiny("llava")
    image = noise_prompts(model, 1, 6)
    text = torch.arange(image["input_ids"].shape[1])[None] % 80 + 3
    both = {
        "input_ids": torch.cat([image["input_ids"], text]),
        "attention_mask": torch.ones(2, text.shape[1], dtype=torch.long),
        "pixel_values": image["pixel_values"],
    }
    dense = model(input_ids=text).logits
    with tprune.prune(model, f"vlm/{method}", **start(method, model), keep=0.5):
        together = model(**both).logits
        assert torch.allclose(together[:1], model(**image).logits, atol=2e-4)
    assert torch.allclose(together[1:], dense, atol=2e-4)


@every_method
def test_padding_on_the_right_changes_nothing_in_front_of_it(method):
    model = tiny("llava")
    alone = noise_prompts(model, 1, 4, behind=6)
    padded = {
        name: value if name == "pixel_values" else torch.nn.functional.pad(value, (0, 9))
        for name, value in alone.items()
    }
    length = alone["input_ids"].shape[1]
    with tprune.prune(model, f"vlm/{method}", **start(method, model), keep=0.4):
        expected, found = model(**alone).logits, model(**padded).logits
    assert torch.allclose(found[:, :length], expected, atol=2e-4)


@pytest.mark.parametrize(
    ("method", "settings"), [("tokencorr", {"similar": 0.5}), ("vflowopt", {"entropy": 0.5})]
)
def test_what_the_data_decides_is_decided_in_a_batch_as_it_is_alone(method, settings):
    model = tiny("llava")
    inputs = noise_prompts(model, 3, 4)
    with tprune.prune(model, f"vlm/{method}", **settings):
        alone = torch.cat([model(**one_row(inputs, row)).logits[:, -1] for row in range(3)])
        assert torch.allclose(model(**inputs).logits[:, -1], alone, atol=2e-4)


@every_method
def test_the_same_seed_and_images_choose_the_same_tokens_twice(method):
    model = tiny("llava")
    inputs = noise_prompts(model, 3, 7)
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    with tprune.prune(model, f"vlm/{method}", **start(method, model), keep=0.5, seed=3):
        first = model(**inputs).logits
    with tprune.prune(model, f"vlm/{method}", **start(method, model), keep=0.5, seed=3):
        assert torch.equal(model(**inputs).logits, first)
    assert torch.equal(torch.random.get_rng_state(), state)


@every_method
def test_both_position_policies_work_and_the_model_with_rows_and_columns_refuses_compact(method):
    model = tiny("llava")
    inputs = noise_prompts(model, 2, 8)
    found = []
    for positions in ("original", "compact"):
        with tprune.prune(model, f"vlm/{method}", **start(method, model), keep=0.5, positions=positions):
            found.append(behind(model, inputs))
    assert not torch.allclose(*found)
    with pytest.raises(UserError, match=r"--positions compact|class token"):
        turned = tiny("qwen2-vl")
        tprune.prune(turned, f"vlm/{method}", **start(method, turned), keep=0.5, positions="compact")


@every_method
def test_a_budget_out_of_reach_names_the_reachable_range(method):
    with pytest.raises(UserError, match="reaches"):
        tprune.prune(tiny("llava"), f"vlm/{method}", **start(method, tiny("llava")), keep=0.01)


@every_method
def test_a_language_model_without_images_is_refused(method):
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.vlm.tiny import TEXT

    with pytest.raises(UserError, match="no vision-language model"):
        tprune.prune(LlamaForCausalLM(LlamaConfig(**TEXT)), f"vlm/{method}", keep=0.5)
