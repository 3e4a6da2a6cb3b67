"""What a method may look at inside a decoder, and what it keeps from prompt to prompt."""

from dataclasses import dataclass, field

import pytest
import torch

import tprune
from tests.vlm.tiny import tiny
from tprune.core.budget import Site, Stage
from tprune.core.reduction import Reduction
from tprune.methods.vlm.fastv import FastV
from tprune.models.prompts import noise_prompts
from tprune.models.signals import attention_of
from tprune.models.subject import Subject
from tprune.models.taps import Capture
from tprune.pipelines.run import pipeline
from tprune.progress import Progress
from tprune.recipe import ModelSource, Recipe
from tprune.recipe import Stage as RecipeStage


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@dataclass(frozen=True)
class Looks(FastV):
    """Half of the image leaves before layer 1; before layer 3 the method only looks."""

    reads = ("attention", "sublayers", "embeddings", "before")
    seen: dict = field(default_factory=dict, hash=False, compare=False)

    @classmethod
    def hyperparameters(cls):
        return [one for one in super().hyperparameters() if one.name != "seen"]

    def stages(self, shape, knob):
        return [Stage(Site(1), shape.tokens // 2), Stage(Site(3), shape.tokens // 2)]

    def reduce(self, site, view, count, memory):
        if site == Site(1):
            index = torch.arange(view.hidden.shape[1])
            order = torch.where(view.prunable, index % 2, 0).sort(dim=1, stable=True).indices
            kept = int((~view.prunable).sum(1)[0]) + count
            return Reduction.keep(order[:, :kept].sort(dim=1).values, view.hidden.shape[1])
        names = ("next_attention", "unrotated_attention", "rotated_ones", "sublayers", "embeddings", "cells")
        self.seen.update({name: view.signal(name) for name in names}, view=view)
        return None


def looked(kind, positions):
    """What `Looks` saw, what ran in layers 2 and 3, and the model with its inputs."""
    model = tiny(kind)
    inputs = noise_prompts(model, 2, 0)
    stage = RecipeStage("vlm", "fastv", positions=positions)
    driver = pipeline(Recipe(ModelSource("in memory"), (stage,)), stage, Progress())
    driver.method = method = Looks()
    layers = model.model.language_model.layers
    entered = {}
    hook = layers[2].register_forward_hook(
        lambda module, args, kwargs, output: entered.update(hidden=(args or (kwargs["hidden_states"],))[0]),
        with_kwargs=True,
    )
    capture = Capture([attention_of(layer) for layer in layers[2:]])
    with driver.apply(Subject(model, None, None), None):
        model(**inputs)
    calls = [capture.calls[attention_of(layer)][-1] for layer in layers[2:]]
    capture.remove()
    hook.remove()
    return model, inputs, method.seen, entered["hidden"], calls


@pytest.mark.parametrize(
    ("kind", "positions"), [("llava", "original"), ("llava", "compact"), ("qwen2-vl", "original")]
)
def test_attention_ahead_is_the_attention_that_comes_and_sublayers_are_what_ran(kind, positions):
    model, inputs, seen, entered, (before, coming) = looked(kind, positions)
    assert torch.equal(seen["next_attention"].rows(), coming.view().rows())
    (attention_in, attention_out), (mlp_in, mlp_out) = seen["sublayers"]
    view, layer = seen["view"], model.model.language_model.layers[2]
    assert torch.equal(attention_in, layer.input_layernorm(entered))
    assert torch.equal(mlp_in, layer.post_attention_layernorm(entered + attention_out))
    assert torch.allclose(entered + attention_out + mlp_out, view.hidden, atol=1e-6)

    heads = seen["unrotated_attention"]
    plain = layer.self_attn.q_proj(layer.input_layernorm(entered))
    assert torch.allclose(heads.query.transpose(1, 2).flatten(2), plain, atol=1e-5)
    # Lengths survive a rotation; directions do not.
    assert torch.allclose(heads.key.norm(dim=-1), before.key.norm(dim=-1), atol=1e-4)
    assert not torch.allclose(heads.key, before.key, atol=1e-2)
    ones = seen["rotated_ones"]
    assert torch.allclose(ones.square().sum(-1), torch.tensor(float(ones.shape[-1])), atol=1e-3)

    dense = model(**inputs, output_hidden_states=True).hidden_states[0]
    assert torch.equal(seen["embeddings"], dense.gather(1, view.position.unsqueeze(2).expand_as(view.hidden)))


@pytest.mark.parametrize(("kind", "side"), [("llava", 4), ("qwen2-vl", 8), ("internvl", 4)])
def test_cells_tell_every_image_tokens_row_and_column(kind, side):
    _, _, seen, _, _ = looked(kind, "original")
    view = seen["view"]
    for row, cells in enumerate(seen["cells"]):
        crop, high, wide = cells[view.prunable[row]].unbind(1)
        first = int(view.position[row][view.prunable[row]][0])
        assert (crop == row).all()
        assert (high * side + wide == view.position[row][view.prunable[row]] - first).all()
    assert (seen["cells"][~view.prunable] == -1).all()


def test_vla_pruner_fills_its_history_from_answers_and_forgets_it_at_reset():
    model = tiny("llava")
    prompts = [noise_prompts(model, 1, seed) for seed in range(4)]
    ask = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    model.set_attn_implementation("eager")
    dense = model(**prompts[0], output_attentions=True).attentions[2].mean(1)[:, -1]
    model.set_attn_implementation("sdpa")
    image = prompts[0]["input_ids"] == model.config.image_token_id

    with tprune.prune(model, "vlm/vla-pruner", window=2, reduction=0.5) as handle:
        episode, held = handle.driver.episode.memory, []
        for place, inputs in enumerate(prompts):
            model.generate(**inputs, **ask)
            held.append(handle.driver.tally.owner)
            if place == 0:
                assert len(episode["answer"]) == 3
                assert torch.allclose(episode["answer"][0], dense[image][None], atol=1e-5)
        assert held[:2] == [None, None]
        assert [int((owner >= 0)[image].sum()) for owner in held[2:]] == [8, 8]
        gone = ~(handle.driver.tally.owner >= 0)[image][None]
        assert all((paid[gone] == 0).all() and (paid[~gone] > 0).all() for paid in episode["answer"])
        handle.reset()
        model.generate(**prompts[0], **ask)
        assert handle.driver.tally.owner is None
