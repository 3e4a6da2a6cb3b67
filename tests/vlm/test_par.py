"""Par's router against the authors', and tokens and layers that it leaves out against plain recomputation."""

from functools import partial

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaModel

import tprune
from tests.golden_values import golden, under
from tests.vlm.tiny import IMAGE, start, tiny
from tprune.errors import UserError
from tprune.methods import registry
from tprune.methods.tokens import Shape
from tprune.models.decoder import DecoderDriver
from tprune.models.prompts import noise_prompts

NAMES = {
    "layer_select_tokens": "tokens",
    "model.": "",
    "input_layernorm": "norm_attention",
    "post_attention_layernorm": "norm_mlp",
    "self_attn.q_proj": "query",
    "self_attn.k_proj": "key",
    "self_attn.v_proj": "value",
    "self_attn.o_proj": "out",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.down_proj": "down",
}


def authors(tensors):
    """The authors' router as `state`."""
    state = {}
    for name, tensor in under(tensors, "router.").items():
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        state[name] = tensor
    return state | {"speed": 10_000.0 ** -(torch.arange(0, 8, 2).float() / 8)}


@pytest.mark.parametrize("case", golden("vlm", "par")[1]["settings"]["cases"])
def test_par_routes_tokens_and_layers_as_the_authors_do(case):
    tensors, told = golden("vlm", "par")
    config, setting = told["settings"]["config"], told["settings"]["cases"][case]
    model = LlamaModel(LlamaConfig(**config, pad_token_id=None)).eval()
    model.load_state_dict(under(tensors, "decoder."), strict=False)
    settings = {"tokens": setting["token_prune_ratio"], "layers": setting["layer_prune_ratio"], "layer": 8}
    method = registry.build("par", "vlm", settings).bind(authors(tensors))
    embeddings = tensors["embeddings"].float()[None]
    image = torch.zeros(1, embeddings.shape[1], dtype=torch.bool)
    image[:, 36:612] = True
    with torch.no_grad():
        everything = torch.ones_like(image)
        logits = torch.cat([part[0] for part in method.router()(embeddings, everything)])
        said = torch.cat([logits[36:612], logits[-8:]]).sigmoid()
        stages = partial(method.stages, Shape(8, 576), None)
        driver = DecoderDriver(model, method, lambda inputs: image, lambda count: stages())
        driver.trace = trace = []
        hidden = model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        ran = driver.tally.entering > 0
        driver.remove()
    assert torch.allclose(said, tensors["probability"], atol=1e-5)
    assert torch.equal(ran.nonzero().flatten(), tensors[f"{case}.layers"])
    stayed = (trace[-1][1][0] == torch.arange(622)).nonzero().flatten()
    assert torch.equal(stayed[(stayed >= 36) & (stayed < 612)] - 36, tensors[f"{case}.tokens"])
    assert torch.allclose(hidden[0, 612:], tensors[f"{case}.hidden"], atol=1e-4)


def routed(model, *passes, tokens=0.0):
    """The method at work, passing these layers by, one tuple for every row."""
    given = start("par", model)
    handle = tprune.prune(model, "vlm/par", **given | {"tokens": tokens, "layers": len(passes[0]) / 4})
    chosen = torch.zeros(len(passes), 4, dtype=torch.bool)
    for row, layers in enumerate(passes):
        chosen[row, list(layers)] = True
    object.__setattr__(handle.driver.method, "passes", lambda logits, count: chosen[: len(logits)])
    return handle


def without(model, layers, inputs):
    """Logits of the model whose decoder lacks some layers."""
    whole = model.model.language_model.layers
    model.model.language_model.layers = torch.nn.ModuleList(
        layer for place, layer in enumerate(whole) if place not in layers
    )
    try:
        return model(**inputs, use_cache=False).logits
    finally:
        model.model.language_model.layers = whole


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llava", "qwen2.5-vl"])
@pytest.mark.parametrize("layers", [(2,), (1, 3), (0, 2)])
def test_layers_that_are_passed_by_are_as_if_they_were_not_there(kind, layers):
    model, inputs = tiny(kind), noise_prompts(tiny(kind), 1, 0)
    expected = without(model, layers, inputs)
    with routed(model, layers) as handle:
        cache = DynamicCache(config=model.config.get_text_config())
        assert torch.allclose(model(**inputs, past_key_values=cache).logits, expected, atol=2e-4)
        held = [layer.get_seq_length() for layer in cache.layers]
        length = inputs["input_ids"].shape[1]
        # The first layer's cache tells how long the sequence is.
        assert held == [0 if place in layers and place else length for place in range(4)]
        more = torch.tensor([[7]])
        behind = model(input_ids=more, past_key_values=cache).logits
        assert [layer.get_seq_length() > 0 for layer in cache.layers] == [bool(one) for one in held]
        entering = [row["tokens"] for row in handle.per_layer()]
        count = int((inputs["input_ids"] == IMAGE).sum())
        assert entering == [0 if place in layers else count for place in range(4)]
    whole = dict(inputs)
    for name, value in inputs.items():
        if value.shape == inputs["input_ids"].shape:
            tail = more if name == "input_ids" else torch.full_like(more, int(name == "attention_mask"))
            whole[name] = torch.cat([value, tail], 1)
    assert torch.allclose(behind[:, -1], without(model, layers, whole)[:, -1], atol=2e-4)


@torch.no_grad()
def test_rows_pass_different_layers_by():
    model, inputs = tiny("llava"), noise_prompts(tiny("llava"), 2, 0)
    ask = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    alone = []
    for row, layers in enumerate([(1, 2), (2, 3)]):
        one = {name: value[row : row + 1] for name, value in inputs.items()}
        with routed(model, layers, tokens=0.5):
            alone.append((model(**one).logits, model.generate(**one, **ask)[:, -3:]))
    with routed(model, (1, 2), (2, 3), tokens=0.5) as handle:
        together, told = model(**inputs).logits, model.generate(**inputs, **ask)[:, -3:]
        assert [row["tokens"] for row in handle.per_layer()] == [16, 4, 0, 4]
    assert torch.allclose(together, torch.cat([logits for logits, _ in alone]), atol=2e-4)
    assert torch.equal(told, torch.cat([one for _, one in alone]))


def test_a_fit_makes_the_choice_that_keeps_the_answer_likelier():
    method = registry.build("par", "vlm", {"depth": 1, "inner": 1, "tokens": 0.5, "layers": 0.25, "flows": 2})
    fit = method.fit(Shape(4, 6, heads=2, width=8), None, 0)
    fit.generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in fit.router.parameters():
            parameter.normal_(std=1.0, generator=fit.generator)
    view = Prompt(torch.randn(2, 9, 8, generator=fit.generator))
    choose(fit, view)
    worse = fit.choice

    def again(inputs):
        # The other half of the tokens, and another layer.
        other = {"tokens": view.prunable & ~worse["tokens"], "layers": worse["layers"].roll(1, 1)}
        fit.choice = worse | other
        return dense

    answers = torch.zeros(2, 9, dtype=torch.bool)
    answers[0, 7:] = answers[1, 8:] = True
    memory = {"inputs": {"answers": answers}, "again": again}
    dense = torch.tensor([[5.0, 0.0]] * 3)
    found = fit.losses(-dense, None, memory, lambda: dense)
    found["preference"].backward()
    best = fit.choice
    assert [part.sum(1).tolist() for part in (best["tokens"], best["layers"])] == [[3, 3], [3, 3]]
    step = [-0.01 * (0 if part.grad is None else part.grad) for part in fit.router.parameters()]
    gap = plain(fit, view, best) - plain(fit, view, worse)
    expected = -torch.nn.functional.logsigmoid(method.strength * gap).mean()
    assert torch.allclose(found["preference"], expected)
    with torch.no_grad():
        for part, more in zip(fit.router.parameters(), step, strict=True):
            part += more
    assert (plain(fit, view, best) - plain(fit, view, worse)).mean() > gap.mean()


class Prompt:
    """Nine tokens: one, six of an image, two."""

    def __init__(self, hidden):
        self.hidden, self.real = hidden, torch.ones(hidden.shape[:2], dtype=torch.bool)
        self.prunable = self.real & (torch.arange(9) > 0) & (torch.arange(9) < 7)


def choose(fit, view):
    """One noisy choice."""
    memory = {}
    return [fit.at(site, view, memory) for site in fit.sites]


def plain(fit, view, choice):
    """The log-likelihood of a choice, term by term."""
    tokens, layers = (part.double().sigmoid() for part in fit.router(view.hidden, view.real))
    found = []
    for row in range(2):
        image = [
            tokens[row, place] if choice["tokens"][row, place] else 1 - tokens[row, place]
            for place in range(1, 7)
        ]
        through = [
            layers[row, place] if choice["layers"][row, place] else 1 - layers[row, place]
            for place in range(4)
        ]
        found.append(sum(map(torch.log, image)) / 6 + sum(map(torch.log, through)) / 4)
    return torch.stack(found).float()


def test_a_width_that_heads_do_not_share_is_refused():
    method = registry.build("par", "vlm", {})
    with pytest.raises(UserError, match="even share"):
        method.fit(Shape(4, 16, heads=5, width=32), 0.5, 0)
