"""PLPHP against its description; and what leaves a head's cache is as if that head alone did not see it."""

import torch

import tprune
from tests.vlm.tiny import IMAGE, tiny
from tprune.methods import registry
from tprune.methods.attention import Attention
from tprune.models.prompts import noise_prompts
from tprune.pipelines.kernels import selection


def test_a_layer_keeps_more_where_it_looks_at_the_image_and_less_where_it_does_not():
    method, images = registry.build("plphp", "vlm", {"first": 0}), torch.tensor([100, 10])
    mass = torch.tensor([[0.3, 0.09], [0.25, 0.1], [0.05, 0.5]])
    assert method.counts(mass, images, None).tolist() == [[70, 1], [40, 4], [10, 7]]
    wanted = method.counts(mass, images, torch.tensor([50, 5]))
    assert wanted.sum(0).tolist() == [150, 15]
    assert wanted.tolist() == [[80, 2], [50, 5], [20, 8]]


def test_entries_are_worth_what_the_last_token_pays_them_in_the_heads_that_share_them():
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(2, 4, 9, 9, generator=generator).softmax(-1)
    keys, image = torch.zeros(2, 2, 9, 1), torch.zeros(2, 9, dtype=torch.bool)
    image[:, 2:6] = True
    last = torch.tensor([[8], [7]])
    worth, mass = registry.build("plphp", "vlm").worth(
        Attention(keys, keys, keys, 1.0, map=weights), image, last
    )
    for row in range(2):
        paid = weights[row, :, last[row, 0]]
        assert torch.allclose(worth[row], torch.stack([paid[:2].mean(0), paid[2:].mean(0)]))
        assert torch.allclose(mass[row], paid[:, 2:6].sum(1).mean())


def test_what_left_a_heads_cache_is_as_if_hidden_from_that_head():
    model = tiny("llava")
    inputs, told = noise_prompts(model, 2, 0, images=2), torch.tensor([[5], [6]])
    length, layers = inputs["input_ids"].shape[1], model.model.language_model.layers
    image = inputs["input_ids"] == IMAGE
    with torch.no_grad():
        full = model(**inputs, use_cache=True).past_key_values
        model.set_attn_implementation("eager")
        paid = model(**inputs, output_attentions=True).attentions
        model.set_attn_implementation("sdpa")
        mass = torch.stack([(layer.mean(1)[:, -1] * image).sum(1) for layer in paid])  # [L, B]
        middle = mass.median().item()
        with tprune.prune(model, "vlm/plphp", rate=0.3, first=0, attentive=middle, indifferent=0.0) as handle:
            cache = model(**inputs, use_cache=True).past_key_values
            kept = [layer.places.clone() for layer in cache.layers]
            found = model(input_ids=told, past_key_values=cache, use_cache=True).logits
            entering = [row["tokens"] for row in handle.per_layer()]
    handles = []
    for layer, held, places in zip(layers, cache.layers, kept, strict=True):
        real = held.valid
        seen = torch.zeros(*places.shape[:2], length + 1, dtype=torch.bool)
        real = torch.ones_like(places[:, 0], dtype=torch.bool) if real is None else real[:, :-1]
        seen = seen.scatter(2, torch.where(real.unsqueeze(1), places, length), True)
        seen[..., length] = True
        mask = seen.repeat_interleave(2, dim=1).unsqueeze(2)

        def hide(module, args, kwargs, mask=mask):
            return args, kwargs | {"attention_mask": mask}

        handles.append(layer.register_forward_pre_hook(hide, with_kwargs=True))
    with torch.no_grad():
        expected = model(input_ids=told, past_key_values=full, use_cache=True).logits
    for one in handles:
        one.remove()
    assert torch.allclose(found, expected, atol=1e-5)
    rate = torch.where(mass > middle, 0.6, 0.3)
    assert entering == (rate * image.sum(1) + 1e-4).long().double().mean(1).tolist()
    assert any(not torch.equal(places[:, 0], places[:, 1]) for places in kept)


def test_its_selection_alone_is_timed_with_a_row_per_head():
    with torch.no_grad():
        kept = selection(registry.build("plphp", "vlm"), "cpu")()
    assert kept.index.shape == (32, 652 - 576 + 64)
