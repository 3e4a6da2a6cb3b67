"""Methods see what their papers name, and what leaves is hidden and nothing else: against plain dense forwards."""

from functools import cache

import pytest
import torch
from transformers import DynamicCache

import tprune
from tests.vlm.tiny import one_row, tiny
from tprune.core.budget import Site
from tprune.core.budget import Stage as CoreStage
from tprune.core.reduction import Reduction
from tprune.data.questions import built_in
from tprune.methods.vlm.random import Random
from tprune.models import load
from tprune.models.prompts import noise_prompts
from tprune.models.source import resolve
from tprune.models.subject import Subject
from tprune.models.vlm import anatomy
from tprune.pipelines.run import pipeline
from tprune.progress import Progress
from tprune.recipe import ModelSource, Recipe, Stage

MODELS = ("llava", "llava-siglip", "qwen2-vl", "digits-llava")
every_model = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@cache
def digits():
    """The built-in model and its processor."""
    return load.load(
        resolve(ModelSource("digits-llava"), "vlm"), "vlm", device="cpu", dtype="float32", seed=0
    )


def example(name):
    """A model and two prompts with an image each, real questions of equal length for the built-in one."""
    if name != "digits-llava":
        model = tiny(name)
        return model, noise_prompts(model, 2, 0)
    subject, questions = digits(), built_in(6)
    asked = [place for place, item in enumerate(questions.items) if item.kind == "count"][:2]
    prompts = [f"<image> {questions.items[place].prompt}" for place in asked]
    images = [questions.open(place) for place in asked]
    return subject.model, dict(subject.processor(images=images, text=prompts, return_tensors="pt"))


def image_of(model, inputs):
    return inputs["input_ids"] == model.config.image_token_id


def chosen(model, inputs, method, keep=0.5, **settings):
    """The image tokens that a method keeps, in slots of the prompt, ascending: [B, k]; all text must stay."""
    with tprune.prune(model, f"vlm/{method}", keep=keep, **settings) as handle:
        model(**inputs)
        kept = handle.driver.tally.owner >= 0
    image = image_of(model, inputs)
    assert kept[~image].all()
    return torch.stack([row.nonzero().flatten() for row in kept & image])


def best(score, count):
    return score.topk(count).indices.sort().values


@every_model
@pytest.mark.parametrize(("layer", "keep"), [(2, 0.5), (16, 0.75)])
def test_fastv_ranks_by_the_last_row_of_the_layer_before_its_site(name, layer, keep):
    model, inputs = example(name)
    kept = chosen(model, inputs, "fastv", keep, layer=layer)
    before = max(1, round(layer * anatomy(model).depth / 32)) - 1
    model.set_attn_implementation("eager")
    attentions = model(**inputs, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    score = attentions[before].mean(1)[:, -1].masked_fill(~image_of(model, inputs), -1)
    assert torch.equal(kept, torch.stack([best(row, kept.shape[1]) for row in score]))


@every_model
def test_divprune_compares_what_the_projector_gives(name):
    model, inputs = example(name)
    kept = chosen(model, inputs, "divprune")
    vision = ("pixel_values", "image_grid_thw")
    features = model.model.get_image_features(**{key: inputs[key] for key in vision if key in inputs})
    for row, feature in enumerate(features.pooler_output):
        unit = feature / feature.norm(dim=-1, keepdim=True)
        distance = 1 - unit @ unit.T
        picks = [int(distance.topk(2, largest=False).values[:, 1].argmax())]
        while len(picks) < kept.shape[1]:
            picks.append(
                int(distance[:, picks].min(1).values.index_fill(0, torch.tensor(picks), -1).argmax())
            )
        start = int(image_of(model, inputs)[row].nonzero()[0])
        assert kept[row].tolist() == sorted(start + pick for pick in picks)


@every_model
@pytest.mark.parametrize(("layer", "keep"), [(2, 0.5), (16, 0.75)])
def test_dart_compares_the_normalised_output_of_the_layer_before_its_site_and_pivots_by_its_keys(
    name, layer, keep
):
    model, inputs = example(name)
    kept = chosen(model, inputs, "dart", keep, layer=layer)
    site = max(1, round(layer * anatomy(model).depth / 32))
    dense = model(**inputs, output_hidden_states=True, use_cache=True)
    normalised = model.model.language_model.norm(dense.hidden_states[site])
    keys = dense.past_key_values.layers[site - 1].keys.transpose(1, 2).flatten(2)
    for row, (hidden, key) in enumerate(zip(normalised, keys, strict=True)):
        image = image_of(model, inputs)[row].nonzero().flatten()
        text = torch.arange(int(image[-1]) + 1, len(hidden))
        norm = key.abs().sum(1)
        pivots = [
            image[norm[image].argsort(descending=True)[:4]],
            text[norm[text].argsort(descending=True)[:4]],
        ]
        left = set(image.tolist()) - set(pivots[0].tolist())
        taken, share = set(pivots[0].tolist()), (kept.shape[1] - 4) / 8
        unit = hidden / hidden.norm(dim=-1, keepdim=True)
        for number, pivot in enumerate(torch.cat(pivots).tolist()):
            size = int(share) + (number < kept.shape[1] - 4 - 8 * int(share))
            order = sorted(left, key=lambda place, pivot=pivot: float(unit[place] @ unit[pivot]))
            taken |= set(order[:size])
            left -= set(order[:size])
        assert kept[row].tolist() == sorted(taken)


def hiding(model, layers, masks):
    """Hooks by which the dense model's `layers` see, from all tokens, what `masks` [B, 1, q, T] says."""

    def hook(seen):
        def hide(module, args, kwargs):
            hidden = args[0] if args else kwargs["hidden_states"]
            kwargs["attention_mask"] = seen[:, :, -hidden.shape[1] :]
            return args, kwargs

        return hide

    return [
        layer.register_forward_pre_hook(hook(seen), with_kwargs=True)
        for layer, seen in zip(layers, masks, strict=True)
    ]


@every_model
@pytest.mark.parametrize("method", ["divprune", "fastv"])
def test_what_leaves_is_hidden_from_its_layer_on_and_nothing_else_in_prompt_and_generation(name, method):
    model, inputs = example(name)
    new = 4
    with tprune.prune(model, f"vlm/{method}", keep=0.5, positions="original") as handle:
        held = DynamicCache(config=model.config.get_text_config())
        first = model(**inputs, past_key_values=held, use_cache=True).logits[:, -1]
        kept, site = handle.driver.tally.owner >= 0, handle.stages[0].site.layer
        layers = handle.driver.layers
        told = model.generate(
            **inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
        )
        told = told[:, -new:]
        steps = [
            model(input_ids=told[:, t, None], past_key_values=held, use_cache=True).logits[:, -1]
            for t in range(new)
        ]
    found = torch.stack([first, *steps], 1)
    length = kept.shape[1] + new
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    column = torch.cat([kept, torch.ones(2, new, dtype=torch.bool)], 1)
    # A hidden token sees itself, so that no row of its softmax is empty.
    seen = causal & (column[:, None] | torch.eye(length, dtype=torch.bool))
    masks = [seen[:, None] if place >= site else causal[None, None] for place in range(len(layers))]
    held = DynamicCache(config=model.config.get_text_config())
    expected = []
    for step in range(new + 1):
        filled = kept.shape[1] + step
        hooks = hiding(model, layers, [mask[:, :, :filled, :filled] for mask in masks])
        given = inputs if step == 0 else {"input_ids": told[:, step - 1, None]}
        expected.append(model(**given, past_key_values=held, use_cache=True).logits[:, -1])
        for hook in hooks:
            hook.remove()
    assert torch.allclose(found, torch.stack(expected, 1), atol=1e-5)


class Checkerboard(Random):
    """Every second patch of the built-in model's images."""

    def reduce(self, site, view, count, memory):
        place = torch.arange(144)
        index = place[(place // 12 + place) % 2 == 0]
        return Reduction.keep(index.expand(len(view.hidden), -1), 144)


def test_an_even_half_of_the_image_answers_the_built_in_questions_as_the_whole_does():
    subject = digits()
    stage = Stage("vlm", "random", keep=0.5, positions="original")
    driver = pipeline(Recipe(ModelSource("digits-llava"), (stage,), limit=60), stage, Progress())
    driver.prepare(subject)
    dense = driver.evaluate(subject)
    driver.method = Checkerboard()
    with driver.apply(subject, None) as handle:
        half = driver.evaluate(subject)
        assert handle.achieved().value == 0.5
    same = (half.predictions == dense.predictions).double().mean()
    assert same > 0.9
    assert min(half.metrics["accuracy_by_kind"].values()) > 0.8


class DrawsInside(Random):
    """Random image tokens leave before the decoder's second layer."""

    def stages(self, shape, knob):
        return [CoreStage(Site(1), max(1, round(knob * shape.tokens)))]


@pytest.mark.parametrize("name", ["llava", "llava-next", "qwen2-vl"])
def test_draws_inside_the_decoder_come_from_seed_and_images_alone(name):
    model = tiny(name)
    inputs = noise_prompts(model, 3, 0, images=2)
    alone = one_row(inputs, 1, 2)

    def kept(inputs, seed=0, ask=None):
        stage = Stage("vlm", "random", keep=0.5)
        driver = pipeline(Recipe(ModelSource("in memory"), (stage,), seed=seed), stage, Progress())
        driver.method = DrawsInside()
        with driver.apply(Subject(model, None, None), None) as handle:
            if ask is None:
                model(**inputs)
            else:
                model.generate(**inputs, max_new_tokens=1, do_sample=False, pad_token_id=0, **ask)
            return handle.driver.tally.owner >= 0

    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    together = kept(inputs)
    assert torch.equal(kept(inputs), together)
    assert torch.equal(kept(alone)[0], together[1])
    assert torch.equal(kept(alone, ask={})[0], together[1])
    assert torch.equal(kept(inputs, ask={"num_beams": 2}), together.repeat_interleave(2, 0))
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(kept(inputs, seed=1), together)
    assert torch.equal(torch.random.get_rng_state(), state)
