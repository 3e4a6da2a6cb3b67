"""Dynamic context pruning against its authors' code, and what must hold of entries that later tokens drop."""

import pytest
import torch
from torch.nn import functional

import tprune
from tests.decoders import CONFIGS, NO_ROPE, decoder, tokens
from tests.golden_values import golden
from tests.llm_context.agreement import padded_generate_its_rows_and_a_loop
from tests.llm_weights import tiny
from tprune.core import dropping
from tprune.core.budget import Site
from tprune.core.dropping import alpha_sigmoid, interaction, lasting, remaining
from tprune.errors import UserError
from tprune.evaluate.context import layer_bytes
from tprune.methods import registry
from tprune.methods.cache import CacheShape
from tprune.methods.cache_view import LayerView, StepView
from tprune.models.cache_fit import cache_shape

GOLDEN, FACTS = golden("llm-context", "dynamic-context-pruning")
ALPHA = FACTS["settings"]["alpha"]
SMALL = {"size": 4}
PROMPT = 60
WEIGHTS = {name: GOLDEN[name][None] for name in ("query", "key")} | {"bias": GOLDEN["bias"]}
"""The authors', as of our only layer."""
every_alpha = pytest.mark.parametrize("case", ALPHA)


def prune(model, keep=0.5, seed=0, **more):
    """The method with its initial values."""
    state = registry.build("dynamic-context-pruning", settings=SMALL).neutral_state(cache_shape(model), seed)
    return tprune.prune(model, "dynamic-context-pruning", keep=keep, state=state, **SMALL, **more)


@every_alpha
def test_the_sparse_sigmoid_and_its_slope_are_those_of_the_authors(case):
    grid = GOLDEN["grid"].clone().requires_grad_()
    found = alpha_sigmoid(grid, ALPHA[case])
    assert torch.allclose(found, GOLDEN[f"{case}.p"], atol=1e-5)
    found.sum().backward()
    assert torch.allclose(grid.grad, GOLDEN[f"{case}.slope"], atol=1e-3)


def test_it_begins_as_a_plain_sigmoid():
    grid = torch.linspace(-8, 8, 33, requires_grad=True)
    found = alpha_sigmoid(grid, 1.0)
    assert torch.allclose(found, grid.sigmoid(), atol=1e-4)
    found.sum().backward()
    assert torch.allclose(grid.grad, grid.sigmoid() * (1 - grid.sigmoid()), atol=1e-4)


@every_alpha
def test_training_reads_and_learns_what_the_authors_do(case):
    """One layer: what is still there, what is read, and the gradients of both losses."""
    settings = {"size": 8, "weight": FACTS["settings"]["weight"]}
    method = registry.build("dynamic-context-pruning", settings=settings)
    fit = method.fit(CacheShape(1, (0,), 4, 16, 1e4, {}), 0.0, 0)
    fit.load_state_dict(WEIGHTS)
    fit.alpha, memory = ALPHA[case], {}
    view = LayerView(0, 1, None, GOLDEN["k"], GOLDEN["v"], None, {}, inputs=GOLDEN["x"])
    bias = fit.at(Site(0), view, memory)
    read = functional.scaled_dot_product_attention(GOLDEN["q"], GOLDEN["k"], GOLDEN["v"], bias)
    read = read.transpose(1, 2).flatten(2)
    assert torch.allclose(memory["there"][0], GOLDEN[f"{case}.there"], atol=1e-4)
    assert torch.allclose(read, GOLDEN[f"{case}.y"], atol=1e-4)
    kept = fit.losses(torch.zeros(1, 2), torch.zeros(1).long(), memory, None)["kept"]
    ((read * GOLDEN["upstream"]).sum() + kept).backward()
    for name in ("query", "key", "bias"):
        expected = GOLDEN[f"{case}.{name}_gradient"]
        found = getattr(fit, name).grad.view_as(expected)
        assert (found - expected).norm() < 2e-3 * expected.norm()


def test_a_step_drops_what_the_authors_drop_in_every_row():
    query, key = (GOLDEN["x"] @ GOLDEN[name].T for name in ("query", "key"))
    for row in range(14):
        least = lasting(query[:, : row + 1], key[:, : row + 1], GOLDEN["bias"])
        assert torch.equal(least > 0, GOLDEN["step.there"][:, row, : row + 1].bool())
    steep = remaining(interaction(query, key, GOLDEN["bias"]), 1e6)
    assert torch.equal(steep > 0.5, GOLDEN["step.there"].bool())


@pytest.mark.parametrize("length", [1, 4, 9])
def test_what_tokens_last_is_the_same_some_queries_at_a_time(length, monkeypatch):
    query, key = torch.randn(2, 3, length, 5, generator=torch.Generator().manual_seed(0))
    expected = interaction(query, key, torch.tensor(0.5))
    earlier = torch.ones(length, length, dtype=torch.bool).tril(-1)
    expected = expected.masked_fill(~earlier, torch.inf).amin(1)
    monkeypatch.setattr(dropping, "ROWS", 4)
    assert torch.allclose(lasting(query, key, torch.tensor(0.5)), expected)


def test_decoding_holds_what_the_authors_hold():
    """With room for one more than they ever have: of what is held, their entries are those above their threshold."""
    method = registry.build("dynamic-context-pruning", settings={"size": 8}).bind(WEIGHTS)
    prompt, rows = FACTS["settings"]["prompt"], []
    every = torch.arange(14).expand(2, 1, -1)
    key = GOLDEN["k"][:, :1]
    layer = LayerView(0, 1, None, key[:, :, :prompt], key[:, :, :prompt], every[..., :prompt], {})
    layer.inputs = GOLDEN["x"][:, :prompt]
    edit, state = method.start(layer, 8), layer.state
    place, state = edit.index, {name: edit.apply(value) for name, value in state.items()}
    rows.append((place, state["least"]))
    for token in range(prompt, 14):
        place = torch.cat([place, every[..., token : token + 1]], dim=2)
        state = {
            "least": functional.pad(state["least"], (0, 1)),
            "key": functional.pad(state["key"], (0, 0, 0, 1)),
        }
        view = StepView([], None, None, place, 0, state, [0], GOLDEN["x"][:, token])
        edit = method.step(view)
        place, state = edit.apply(place), {name: edit.apply(value) for name, value in view.state.items()}
        rows.append((place, state["least"]))
    for (place, least), held in zip(rows, GOLDEN["decode.held"].unbind(1), strict=True):
        found = torch.zeros(2, 14, dtype=torch.uint8).scatter(1, place[:, 0], (least[:, 0] > 0).byte())
        assert torch.equal(found, held)


@pytest.mark.parametrize("name", CONFIGS)
def test_it_runs_in_every_decoder_keeps_its_budget_and_leaves_the_model_as_it_was(name):
    model, ids, coming = decoder(name), tokens(2, PROMPT), tokens(2, 3, seed=2)
    dense = model(ids).logits
    with prune(model, 1.0):
        assert torch.equal(model(ids).logits, dense)
    more = {"positions": "original"} if name in NO_ROPE else {}
    with prune(model, 0.5, **more) as handle:
        caches = [model(ids).past_key_values for _ in range(2)]
        later = model(coming, past_key_values=caches[0]).logits
        singly = [model(coming[:, i : i + 1], past_key_values=caches[1]).logits for i in range(3)]
        assert torch.allclose(later, torch.cat(singly, dim=1), atol=1e-4)
        assert handle.achieved().value == 0.5
        held = [layer for layer in caches[0].layers if not layer.is_sliding]
        assert all(layer.length == PROMPT // 2 for layer in held)
        assert all(torch.equal(*layer.places.unbind(1)[:2]) for layer in held if layer.places.shape[1] > 1)
    assert torch.equal(model(ids).logits, dense)


def test_what_tokens_say_one_by_one_is_what_they_say_in_a_prompt():
    model, ids = decoder(num_hidden_layers=1), tokens(2, PROMPT)
    with prune(model, 1 - 1 / PROMPT):
        whole = model(ids).past_key_values.layers[0]
    with prune(model, 30 / 40):
        cache = model(ids[:, :40]).past_key_values
        for place in range(40, PROMPT):
            model(ids[:, place : place + 1], past_key_values=cache)
    layer = cache.layers[0]
    said = torch.full((*whole.places.shape[:2], PROMPT), torch.nan)
    said.scatter_(2, whole.places, whole.state["least"])
    found = said.gather(2, layer.places)
    assert torch.allclose(layer.state["least"], found, atol=1e-5)


def test_a_padded_batch_equals_its_rows_and_generate_a_loop():
    cache = padded_generate_its_rows_and_a_loop(prune, PROMPT)
    # Interaction keys are part of the cache.
    layer = cache.layers[0]
    assert layer_bytes([layer]) == layer.keys.nbytes + layer.values.nbytes + 30 * 4 * 4


def test_half_precision_runs_and_compact_positions_go_on():
    model, ids = decoder().to(torch.bfloat16), tokens(2, PROMPT)
    for positions in ("original", "compact"):
        with prune(model, positions=positions):
            cache = model(ids).past_key_values
            assert model(ids[:, :3], past_key_values=cache).logits.isfinite().all()
            assert cache.layers[0].state["key"].dtype == torch.bfloat16


def test_a_fit_presses_only_on_what_is_above_the_budget_and_steepens():
    method = registry.build("dynamic-context-pruning", settings=SMALL)
    shape, view = CacheShape(1, (0,), 4, 8, 1e4, {}), LayerView(0, 1, None, None, None, None, {})
    view.inputs = torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(0))
    losses = []
    for keep in (0.2, 0.99):
        fit, memory = method.fit(shape, keep, 0), {}
        fit.at(Site(0), view, memory)
        losses.append(fit.losses(torch.zeros(1, 2), torch.zeros(1).long(), memory, None)["kept"].item())
    assert losses[0] > 0 == losses[1]
    assert fit.alpha == 1
    fit.settle(0.5)
    assert fit.alpha == 4.5
    fit.settle(1.0)
    assert fit.alpha == 8


def test_a_fit_learns_which_tokens_can_be_done_without():
    """Reading shall give what half of the tokens hold, and the first channel says which: they are what stays."""
    generator, steps = torch.Generator().manual_seed(0), 20
    method = registry.build("dynamic-context-pruning", settings=SMALL)
    fit = method.fit(CacheShape(1, (0,), 1, 4, 1e4, {}), 0.5, 0)
    optimizer = torch.optim.AdamW(fit.parameters(), lr=0.1, weight_decay=0)
    useful = (torch.rand(8, 16, generator=generator) < 0.5).float()
    view = LayerView(0, 1, None, *[useful[:, None, :, None]] * 2, torch.arange(16).expand(8, 1, -1), {})
    view.inputs = torch.randn(8, 16, 4, generator=generator)
    view.inputs[..., 0], view.inputs[..., 1] = 4 * useful - 2, 2
    losses = []
    for step in range(steps):
        memory = {}
        weight = fit.at(Site(0), view, memory).softmax(-1)
        kept = fit.losses(torch.zeros(1, 2), torch.zeros(1).long(), memory, None)["kept"]
        losses.append((weight @ view.value - 1).square().mean() + kept)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
        fit.settle((step + 1) / steps)
    assert losses[-1] < 0.5 * losses[0]
    index = method.bind(fit.state()).start(view, 8).index[:, 0]
    assert useful.gather(1, index).mean() > 0.85 > 0.6 > useful.mean()


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="dynamic-context-pruning must be trained"):
        tprune.prune(decoder(), "dynamic-context-pruning", keep=0.5, tokenizer=tiny.tokenizer())
    with pytest.raises(UserError, match="interval=…: dynamic-context-pruning does not go by scores alone"):
        registry.build("dynamic-context-pruning", settings={"interval": 4})
