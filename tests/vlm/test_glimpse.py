"""A token of a method's own behind the prompt, and what GlimpsePrune makes of it."""

import copy

import pytest
import torch
import transformers
from torch.nn import functional

import tprune
from tests.golden_values import golden, under
from tests.vlm.tiny import SMALL, TEXT, one_row, start, tiny
from tprune.core import grid
from tprune.errors import UserError
from tprune.methods import registry
from tprune.methods.tokens import Shape
from tprune.models import beside
from tprune.models.prompts import noise_prompts
from tprune.models.run import here
from tprune.models.signals import attention_of
from tprune.models.taps import Capture

LOOKED = 2


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def small(state):
    settings = {"width": 16, "condition": 16, "heads": 2, "blocks": "3,2"}
    return registry.build("glimpseprune", "vlm", settings).bind(state)


def test_the_predictor_says_what_the_authors_says():
    tensors, _ = golden("vlm", "glimpseprune")
    state = under(tensors, "state.") | {"token": torch.zeros(5, 8)}
    state |= {
        "project.weight": torch.zeros(8, 8),
        "project.bias": torch.zeros(8),
        "norm.weight": torch.ones(8),
    }
    module = small(state).learned()
    place = torch.arange(12)
    cells = torch.stack([place * 0, place // 4, place % 4], 1).expand(2, -1, -1)
    image = torch.ones(2, 12, dtype=torch.bool)
    encoded = [tensors["encoded.0"], tensors["encoded.1"]]
    assert torch.allclose(module(tensors["looks"], encoded, cells, image), tensors["logits"], atol=1e-5)
    # A second crop, and text between both, change nothing.
    both = {"looks": [tensors["looks"][:1], tensors["looks"][1:]]}
    looks = torch.cat([both["looks"][0], torch.full((1, 2, 4), 9.0), both["looks"][1]], 1)
    encoded = [torch.cat([one[:1], torch.full((1, 2, 12), 7.0), one[1:]], 1) for one in encoded]
    text = torch.full((1, 2, 3), -1)
    cells = torch.cat([cells[:1], text, cells[:1] + torch.tensor([1, 0, 0])], 1)
    image = functional.pad(torch.ones(1, 12, dtype=torch.bool), (0, 2)).repeat(1, 2)[:, :26]
    found = module(looks, encoded, cells, image)[image].view(2, 12)
    assert torch.allclose(found, tensors["logits"], atol=1e-5)


@pytest.mark.parametrize("case", golden("vlm", "glimpseprune")[1]["settings"]["cases"])
def test_as_many_stay_as_with_the_authors(case):
    tensors, told = golden("vlm", "glimpseprune")
    names = {"max_remain_ratio": "cap", "min_remain_num": "least", "reduce_threshold": "threshold"}
    settings = {names[name]: value for name, value in told["settings"]["cases"][case].items()}
    method = registry.build("glimpseprune", "vlm", settings)
    probability = tensors["select.logits"].sigmoid()
    sure = method.sure(probability, torch.ones(3, 12, dtype=torch.bool))
    assert torch.equal(sure, tensors[f"select.{case}"])


def test_boxes_and_losses_are_the_authors():
    tensors, _ = golden("vlm", "glimpseprune")
    boxes = torch.nn.utils.rnn.pad_sequence(
        [tensors["boxes.0"], tensors["boxes.1"]], batch_first=True, padding_value=torch.nan
    )
    place = torch.arange(12)
    cells = torch.stack([place // 4, place % 4], 1).expand(2, -1, -1)
    covered = grid.covered(cells, torch.tensor([[3, 4], [3, 4]]), boxes)
    assert torch.equal(covered.view(2, 3, 4), tensors["masks"])
    method = registry.build("glimpseprune", "vlm", SMALL["glimpseprune"])
    fit = method.fit(Shape(4, 12, heads=4, width=8, tower=12), None, 0)
    whole = torch.cat([cells[..., :1] * 0, cells], 2)
    memory = {
        "inputs": {"boxes": boxes, "answers": None},
        "view": Seen(whole, torch.ones(2, 12, dtype=torch.bool)),
    }
    fit.glimpse.asked = lambda *given: tensors["logits"]
    found = fit.losses(None, torch.tensor([0]), memory, None)
    assert torch.allclose(found["dice"], tensors["dice"])
    assert torch.allclose(found["dice"] + found["entropy"], tensors["both"])
    assert found["answers"].item() == pytest.approx(0)


class Seen:
    """A view of twelve image tokens, behind which the token says the only word there is."""

    def __init__(self, cells, prunable):
        self.cells, self.prunable = cells, prunable

    def signal(self, name):
        return {"cells": self.cells, "beside": self}[name]

    def tell(self, added, layer, answers):
        return None, torch.zeros(1, 1)


def heard(model, inputs, ask):
    """What `ask(behind, given)` finds during a prompt; `given` is what the decoder was called with."""
    found, given = [], {}
    settings = {"keep": 0.6, "layer": LOOKED, "caches": "later"}
    with tprune.prune(model, "vlm/glimpseprune", **start("glimpseprune", model) | settings) as handle:
        driver = handle.driver

        def enter(module, args, kwargs):
            given.update(kwargs)

        def leave(module, args, output):
            run = driver.run
            behind = driver.signals.beside.of(run.heard, run.real)
            found.append(ask(behind, given))

        hooks = [
            driver.core.register_forward_pre_hook(enter, with_kwargs=True),
            driver.layers[-1].register_forward_hook(leave),
        ]
        driver.method = Nothing()
        model(**inputs)
        for hook in hooks:
            hook.remove()
    return found[0]


class Nothing:
    """Lets nothing leave, and reads what glimpseprune does."""

    reads = ("beside", "encoder")
    returns = False

    def reduce(self, site, view, count, memory):
        return None


def standing(model, given, added, index):
    """Logits and the attention of layer `LOOKED` where a token stands in the sequence itself, before `index` of it."""
    core, embeds = model.model.language_model, given["inputs_embeds"]
    real = given["attention_mask"].bool()
    ids = given["position_ids"]
    before, behind = ids[..., :index], ids[..., index:]
    ids = torch.cat([before, before[..., -1:] + 1, behind + 1], -1)
    embeds = torch.cat([embeds[:, :index], embeds[:, :1] * 0, embeds[:, index:]], 1)
    real = torch.cat([real[:, :index], real[:, :1] | True, real[:, index:]], 1)
    hooks = []
    for place, layer in enumerate(core.layers):

        def give(module, args, kwargs, place=place):
            hidden = (args[0] if args else kwargs.pop("hidden_states")).clone()
            hidden[:, index] += added[place]
            return (hidden,), kwargs

        hooks.append(layer.register_forward_pre_hook(give, with_kwargs=True))
    capture = Capture([attention_of(core.layers[LOOKED])])
    output = core(inputs_embeds=embeds, attention_mask=real.long(), position_ids=ids, use_cache=False)
    [[call]] = capture.calls.values()
    for hook in [*hooks, capture]:
        hook.remove()
    return model.lm_head(output.last_hidden_state), call.view().rows(slice(index, index + 1))


def padded(model):
    """Two prompts, the first with three tokens of padding in front."""
    inputs = noise_prompts(model, 2, 4)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][0, :3] = 0
    return inputs


def sliding():
    """A LLaVA whose decoder sees all of a prompt in the layer that is looked from alone."""
    config = copy.deepcopy(tiny("llava").config)
    kinds = ["full_attention" if place == LOOKED else "sliding_attention" for place in range(4)]
    window = {"use_sliding_window": True, "sliding_window": 12, "layer_types": kinds}
    config.text_config = transformers.Qwen2Config(**TEXT, **window)
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        model = transformers.LlavaForConditionalGeneration(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.25, generator=generator)
    return model


@pytest.fixture(params=["llava", "qwen2.5-vl", "sliding"])
def asked(request):
    """A model, two prompts, and what is added to a token behind them before every layer [4, 32]."""
    model = sliding() if request.param == "sliding" else tiny(request.param)
    return model, padded(model), torch.randn(4, 32, generator=torch.Generator().manual_seed(0))


def test_a_token_behind_the_prompt_becomes_what_it_would_be_in_it(asked):
    model, inputs, added = asked

    def ask(behind, given):
        return behind.look(added[: LOOKED + 1]), given

    attention, given = heard(model, inputs, ask)
    _, rows = standing(model, completed(given, inputs), added, inputs["input_ids"].shape[1])
    assert torch.allclose(attention.rows(), rows, atol=1e-5)


def test_answers_behind_it_are_told_as_if_it_stood_before_them(asked):
    model, inputs, added = asked
    length = inputs["input_ids"].shape[1]
    first, answers = length - 3, torch.zeros(2, length, dtype=torch.bool)
    answers[:, first:] = True
    answers[1, -1] = inputs["attention_mask"][1, -1] = 0

    def ask(behind, given):
        behind = type(behind)(behind.beside, behind.heard, behind.real & ~answers)
        return *behind.tell(added, LOOKED, answers), given

    attention, said, given = heard(model, inputs, ask)
    logits, rows = standing(model, completed(given, inputs), added, first)
    assert torch.allclose(said, logits[:, first:-1][answers[:, first:]], atol=1e-4)
    # The token's own key stands behind those of the prompt and its answers there.
    expected = torch.cat([rows[..., :first], rows[..., first + 1 :], rows[..., first : first + 1]], 3)
    assert torch.allclose(attention.rows()[..., : length + 1], expected, atol=1e-5)


def test_a_token_that_would_look_from_a_sliding_layer_is_told_which_see_the_prompt():
    model = sliding()
    asked = start("glimpseprune", model) | {"keep": 0.6, "layer": 0}
    with tprune.prune(model, "vlm/glimpseprune", **asked), pytest.raises(UserError, match="full attention"):
        model(**noise_prompts(model, 1, 0))


def completed(given, inputs):
    """The decoder's inputs with positions and a mask, whoever made them."""
    ids = given.get("position_ids")
    ids = torch.arange(inputs["input_ids"].shape[1])[None].expand(2, -1) if ids is None else ids
    return given | {"position_ids": ids, "attention_mask": inputs["attention_mask"]}


def test_a_decoder_without_rotary_embeddings_is_refused_in_one_line():
    method = registry.build("glimpseprune", "vlm")
    with pytest.raises(
        UserError, match="glimpseprune needs a decoder with rotary embeddings, and Linear has none"
    ):
        beside.check(method, torch.nn.Linear(1, 1))


def test_what_leaves_leaves_the_caches_of_the_layers_before_too():
    model = tiny("llava")
    inputs, told = padded(model), torch.tensor([[5], [6]])
    asked = start("glimpseprune", model) | {"layer": LOOKED, "keep": 0.8}
    with tprune.prune(model, "vlm/glimpseprune", **asked | {"caches": "later"}) as handle:
        cache = model(**inputs, use_cache=True).past_key_values
        site, kept = next(iter(cache.tprune_track.layers.items()))
        stays = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
        stays = torch.cat([stays.scatter(1, kept.index, True), stays[:, :1] | True], 1)
        stays[0, :3] = False
        hooks = [
            layer.register_forward_pre_hook(
                lambda module, args, kwargs: (args, kwargs | {"attention_mask": stays[:, None, None]}),
                with_kwargs=True,
            )
            for layer in handle.driver.layers[:site]
        ]
        mask = functional.pad(inputs["attention_mask"], (0, 1), value=1)
        expected = model(input_ids=told, attention_mask=mask, past_key_values=cache, use_cache=True).logits
        for hook in hooks:
            hook.remove()
    with tprune.prune(model, "vlm/glimpseprune", **asked):
        cache = model(**inputs, use_cache=True).past_key_values
        assert {layer.keys.shape[2] for layer in cache.layers} == {kept.index.shape[1] - 1}
        found = model(input_ids=told, attention_mask=mask, past_key_values=cache, use_cache=True).logits
    assert torch.allclose(found, expected, atol=1e-5)


def test_each_prompt_keeps_what_it_needs():
    model = tiny("llava")
    inputs = noise_prompts(model, 3, 5)
    asked = start("glimpseprune", model) | {"threshold": 9e-4}
    with tprune.prune(model, "vlm/glimpseprune", **asked) as handle:
        together = model(**inputs, use_cache=True)
        layers = together.past_key_values.tprune_track.layers
        assert here(inputs["input_ids"] == 90, layers[0].index, layers[0].valid).sum(1).unique().numel() > 1
        alone = torch.cat([model(**one_row(inputs, row)).logits for row in range(3)])
        assert handle.achieved().value < 1
    assert torch.allclose(together.logits, alone, atol=2e-4)


def test_widths_that_do_not_divide_are_refused():
    method = registry.build("glimpseprune", "vlm", {"width": 10, "condition": 12, "heads": 4})
    with pytest.raises(UserError, match="a multiple of the heads"):
        method.fit(Shape(4, 16, heads=4, width=32, tower=24), None, 0)
