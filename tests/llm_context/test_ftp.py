"""FTP: tokens pass single layers by and come back, by the fixed router and by one that is learned."""

import math

import pytest
import torch
from transformers import DynamicCache

import tprune
from tests.decoders import decoder, tokens
from tests.llm_context.agreement import padded_generate_its_rows_and_a_loop
from tests.llm_weights import tiny
from tprune.core.budget import Site, Stage
from tprune.data.text import Sequences
from tprune.errors import UserError
from tprune.methods import registry
from tprune.methods.shape import Shape
from tprune.models.signals import attention_of
from tprune.models.source import Source
from tprune.models.subject import Subject
from tprune.models.taps import Capture
from tprune.pipelines.context_course import ContextCourse

PROMPT = 40
CONTEXT = 30
"""Of a window of so many: what a fit takes for the prompt."""
DEPTH = 3
UNEVEN = torch.tensor([0.5, 0.2])
"""What enters the second and the third layer."""


def state(schedule=UNEVEN, seed=0):
    """A router with weights that tell tokens apart."""
    found = registry.build("ftp").neutral_state(Shape(DEPTH, PROMPT - 1), seed)
    return found | {"schedule": schedule}


def prune(model, keep=0.5, **more):
    return tprune.prune(model, "ftp", keep=keep, state=state(), **more)


@torch.no_grad()
def run(model, layer, hidden, places):
    """One decoder layer over the tokens at `places` of the prompt; and what each of them received there."""
    rope = model.model.rotary_emb(hidden, places[None])
    capture = Capture([attention_of(layer)])
    output = layer(hidden, attention_mask=None, position_ids=places[None], position_embeddings=rope)
    [call] = capture.calls[attention_of(layer)]
    capture.remove()
    keys = call.key[0].repeat_interleave(2, 0)
    logits = call.query[0] @ keys.transpose(1, 2) * call.scale
    logits = logits.masked_fill(torch.ones_like(logits[0], dtype=torch.bool).triu(1), -math.inf)
    return output, logits.softmax(-1).sum(1).mean(0)


def chosen(kind, learned, table, count):
    """The tokens but the last that go through a layer, one by one."""
    if kind == "position":
        order = [0, *range(PROMPT - 2, 0, -1)]
    elif kind == "attention":
        order = [0, *sorted(range(1, PROMPT - 1), key=lambda i: -table[i])]
    else:
        ranks = {i: place for place, i in enumerate(sorted(range(PROMPT), key=lambda i: -table[i]))}
        worth = {}
        for i in range(PROMPT - 1):
            looked = [i / PROMPT, math.log1p(table[i]), ranks[i] / PROMPT, 1 - count / (PROMPT - 1)]
            inside = (learned["first.weight"] @ torch.tensor(looked) + learned["first.bias"]).clamp_min(0)
            computing, skipping = learned["second.weight"] @ inside + learned["second.bias"]
            worth[i] = float(computing - skipping)
        order = sorted(worth, key=lambda i: -worth[i])
    return torch.tensor(sorted([*order[:count], PROMPT - 1]))


@pytest.mark.parametrize("kind", ["position", "attention", "learned"])
def test_what_passes_a_layer_by_is_back_before_the_next_as_it_was(kind):
    model, ids = decoder(), tokens(1, PROMPT)
    learned = state()
    given = {"state": learned} if kind == "learned" else {"order": kind, "skipped": 0.4}
    counts = [round((PROMPT - 1) * part) for part in (UNEVEN.tolist() if kind == "learned" else [0.4, 0.4])]
    with tprune.prune(model, "ftp", **given) as handle:
        output = model(ids, use_cache=True)
        assert [row["tokens"] for row in handle.per_layer()] == [PROMPT - 1, *counts]
    assert [layer.keys.shape[2] for layer in output.past_key_values.layers] == [
        PROMPT,
        *(count + 1 for count in counts),
    ]
    hidden = model.get_input_embeddings()(ids)
    hidden, received = run(model, model.model.layers[0], hidden, torch.arange(PROMPT))
    table = received.tolist()
    for layer, count in zip(model.model.layers[1:], counts, strict=True):
        through = chosen(kind, learned, table, count)
        hidden[:, through], received = run(model, layer, hidden[:, through], through)
        for place, value in zip(through.tolist(), received.tolist(), strict=True):
            table[place] = value
    assert torch.allclose(output.logits, model.lm_head(model.model.norm(hidden)), atol=1e-4)


def test_a_learned_router_generates_alike_in_batches_and_loops():
    padded_generate_its_rows_and_a_loop(lambda model: prune(model), PROMPT)


def course(model, **settings):
    """A fit in a model, at work: the course, the fit and its driver."""
    subject = Subject(model, tiny.tokenizer(), Source("a model in memory", "memory", "", "transformers"))
    method = registry.build("ftp", settings=settings)
    found = ContextCourse(method, subject, Sequences(tokens(4, PROMPT), {}))
    fit = method.fit(found.shape, 0.5, 0)
    return found, fit, found.driver(method, fit, 0)


@pytest.mark.parametrize("learned", [False, True])
def test_a_search_tries_what_is_then_done(learned):
    model, ids = decoder(), tokens(2, PROMPT)
    found, fit, driver = course(model, order="attention")
    fit.levels, fit.searching, fit.learned = ((10, 16) if learned else (13, 13)), True, learned
    with torch.no_grad():
        tried = found.outputs(ids)
    driver.remove()
    more = {"state": fit.state()} if learned else {"order": "attention", "skipped": 0.65 * 2 / 3}
    counts = [1 - level / 20 for level in fit.levels]
    with tprune.prune(model, "ftp", **more) as handle:
        cache = DynamicCache()
        parts = [model.model(some, past_key_values=cache) for some in ids.tensor_split([CONTEXT], dim=1)]
        done = torch.cat([part.last_hidden_state for part in parts], dim=1)
        entering = [row["tokens"] / (CONTEXT - 1) for row in handle.per_layer()[1:]]
    assert entering == pytest.approx(counts, abs=0.02)
    assert torch.allclose(tried, done, atol=1e-3)


def test_only_too_little_is_punished_and_the_guide_fades():
    _, fit, driver = course(decoder())
    driver.remove()
    fit.levels = (10, 16)
    guides = [torch.tensor(0.5), torch.tensor(1.5)]
    outputs = torch.tensor([[[9.0], [2.0]]])
    more = {"guides": guides, "whole": torch.tensor([[False, True]])}

    def losses(*left):
        memory = {"left": [Stage(Site(1 + i), torch.tensor(x)) for i, x in enumerate(left)]} | more
        return fit.losses(outputs, None, memory, lambda: torch.ones(1, 2, 1))

    assert losses(0.7, 0.6)["sparsity"] == pytest.approx(0.2 + 0.4)
    assert losses(0.1, 0.3)["sparsity"] == pytest.approx(0.1)
    assert losses(0.5, 0.2)["distillation"] == 1
    assert losses(0.5, 0.2)["guide"] == 1
    fit.settle(0.75)
    assert losses(0.5, 0.2)["guide"] == 0.25


def test_gates_have_a_gradient_for_what_they_skip_and_for_what_they_do_not():
    model, ids = decoder(), tokens(1, PROMPT)
    found, fit, driver = course(model)
    outputs = found.outputs(ids)
    parts = fit.losses(outputs, None, driver.memory, lambda: torch.zeros_like(outputs) + 1)
    driver.remove()
    for name in ("distillation", "sparsity", "guide"):
        fit.zero_grad()
        parts[name].backward(retain_graph=True)
        if float(parts[name].detach()):
            assert all(float(parameter.grad.norm()) > 0 for parameter in fit.second.parameters())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_fit_loses_less_than_the_fixed_router(text):
    model, ids = decoder(), windows(text)[-8:]
    dense = model.model(ids).last_hidden_state
    asked = {"keep": 0.5, "tokenizer": tiny.tokenizer()}
    fit = {"fit": str(text), "sequence": 32, "batch": 4, "lr": 1e-2, "population": 8, "generations": 3}

    def lost(**more):
        with tprune.prune(model, "ftp", **asked, **more):
            return float((model.model(ids).last_hidden_state - dense).square().mean())

    assert lost(**fit, epochs=2.0) < 0.95 * lost()


def windows(file):
    from tprune.data.text import training

    return training(str(file), tiny.tokenizer(), 32).tokens


def test_what_cannot_be_is_refused(text):
    model, asked = decoder(), {"fit": str(text), "tokenizer": tiny.tokenizer(), "sequence": 32}
    with pytest.raises(UserError, match="--keep 1: ftp learns to skip tokens in all layers but the first"):
        tprune.prune(model, "ftp", keep=1.0, **asked)
    with pytest.raises(UserError, match="--set skipped=0.9: .* give --keep from 0.333 to below 1"):
        tprune.prune(model, "ftp", skipped=0.9, **asked)
    with (
        tprune.prune(model, "ftp", keep=0.2),
        pytest.raises(UserError, match="--keep 0.2: ftp reaches 0.333"),
    ):
        model(tokens(1, PROMPT))
