"""TokenButler against its authors' code, and what must hold of queries that choose their keys."""

import copy

import pytest
import torch

import tprune
from tests.decoders import CONFIGS, decoder, tokens
from tests.golden_values import golden, under
from tests.llm_context.agreement import padded_generate_its_rows_and_a_loop
from tests.llm_weights import tiny
from tprune.core.rotary import rotated
from tprune.data import text as data_text
from tprune.errors import UserError
from tprune.methods import registry
from tprune.methods.cache import CacheShape
from tprune.methods.llm_context.tokenbutler import most_asked
from tprune.models.cache_fit import CacheFitDriver, cache_shape
from tprune.models.source import Source
from tprune.models.subject import Subject
from tprune.pipelines.run import pipeline
from tprune.progress import Progress
from tprune.recipe import ModelSource, Recipe, Stage

GOLDEN, FACTS = golden("llm-context", "tokenbutler")
SMALL = {"reduce": 2, "inner": 12, "size": 4}
PROMPT = 60


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def prune(model, keep=0.5, **more):
    """The method with its initial values."""
    state = registry.build("tokenbutler", settings=SMALL).neutral_state(cache_shape(model), 0)
    return tprune.prune(model, "tokenbutler", keep=keep, state=state, **SMALL, **more)


def seen(count):
    return torch.ones(count, count, dtype=torch.bool).tril()[None, None]


def test_the_predictor_is_that_of_the_authors():
    sizes = {name: FACTS["settings"][name] for name in ("size", "inner", "reduce")}
    method = registry.build("tokenbutler", settings=sizes).bind(under(GOLDEN, "state."))
    inputs, position = GOLDEN["inputs"], GOLDEN["position"]
    shape = CacheShape(
        FACTS["settings"]["depth"], (0, 1, 2), FACTS["settings"]["heads"], 32, FACTS["settings"]["base"], {}
    )
    memory = {}
    asks = method.foresee(shape, inputs, position, seen(14), memory)
    assert torch.allclose(asks, GOLDEN["asks"], atol=1e-5)
    assert torch.allclose(memory["is_asked"], GOLDEN["is_asked"], atol=1e-5)
    memory = {}
    for part in (slice(0, 9), slice(9, 10), slice(10, 14)):
        asks = method.foresee(
            shape, inputs[:, part], position[:, part], seen(14)[:, :, part, : part.stop], memory
        )
        assert torch.allclose(asks, GOLDEN["asks"][:, :, part], atol=1e-5)
    assert torch.allclose(memory["is_asked"], GOLDEN["is_asked"], atol=1e-5)


@pytest.mark.parametrize("case", FACTS["settings"]["cases"])
def test_the_keys_are_those_of_the_authors(case):
    heads = slice(FACTS["settings"]["heads"], 2 * FACTS["settings"]["heads"])
    logits = GOLDEN["asks"][:, heads] @ GOLDEN["is_asked"][:, heads].mT / 2
    chosen = most_asked(logits, seen(14), FACTS["settings"]["cases"][case], 0)
    assert torch.equal(chosen, GOLDEN[f"{case}.chosen"].bool())


def test_the_first_keys_are_read_and_count():
    logits = torch.randn(1, 2, 20, 20, generator=torch.Generator().manual_seed(0))
    chosen = most_asked(logits, seen(20), 0.3, 4)
    assert chosen[..., :4].eq(seen(20)[..., :4]).all()
    for row in range(20):
        assert (chosen[0, :, row].sum(-1) == min(row + 1, max(4, -(-3 * (row + 1) // 10)))).all()


def test_what_is_rotated_knows_only_the_distance():
    x = torch.randn(2, 1, 1, 5, 8, generator=torch.Generator().manual_seed(0))
    place, frequency = torch.arange(5)[None], torch.tensor([1.0, 0.1, 0.01, 0.001])
    near = rotated(x[0], place, frequency) @ rotated(x[1], place, frequency).mT
    far = rotated(x[0], place + 70, frequency) @ rotated(x[1], place + 70, frequency).mT
    assert torch.allclose(near, far, atol=1e-4)
    assert torch.allclose(rotated(x[0], place * 0, frequency), x[0])


@pytest.mark.parametrize("name", CONFIGS)
def test_it_chooses_in_every_decoder_keeps_its_budget_and_leaves_the_model_as_it_was(name):
    model, ids, coming = decoder(name), tokens(2, PROMPT), tokens(2, 3, seed=2)
    dense = model(ids).logits
    with prune(model, 1.0):
        assert torch.equal(model(ids).logits, dense)
    with prune(model, 0.5) as handle:
        cache = model(ids).past_key_values
        later = model(coming, past_key_values=copy.deepcopy(cache)).logits
        singly = [model(coming[:, i : i + 1], past_key_values=cache).logits for i in range(3)]
        assert later.isfinite().all()
        assert torch.allclose(later, torch.cat(singly, dim=1), atol=1e-4)
        kept = [row["kept"] for row in handle.per_layer() if row["kept"] is not None]
        assert kept[0] == 1 or name.startswith("gemma")
        assert abs(handle.achieved().value - sum(kept) / len(kept)) < 1e-6
        assert abs(handle.achieved().value - 0.5) < 0.03
    assert torch.equal(model(ids).logits, dense)


def test_a_padded_batch_equals_its_rows_and_generate_a_loop():
    padded_generate_its_rows_and_a_loop(prune, PROMPT)


def test_it_is_timed_before_it_has_learned():
    stage = Stage("llm-context", "tokenbutler", keep=0.5, set=SMALL)
    driver = pipeline(Recipe(ModelSource("a model in memory"), (stage,), length=60), stage, Progress())
    subject = Subject(decoder(), None, Source("a model in memory", "memory", "", "transformers"))
    found = driver.bench(subject, rounds=1)
    assert {"prefill_pruned", "decode_pruned", "scoring_prefill"} <= set(found["times"])
    # What the predictor notes of every token is part of the cache.
    assert found["cache_mb_pruned"] > found["cache_mb_dense"]


def test_a_fit_foresees_the_logits_of_its_text_better_than_initial_values(text):
    """Of other text it does not, in seconds and in a tiny model with random weights."""
    model = decoder()
    words = data_text.training(str(text), tiny.tokenizer(), 32).tokens
    asked = {"fit": str(text), "sequence": 32, "batch": 8, "epochs": 4.0, "dropout": 0.0, "lr": 1e-2}
    with tprune.prune(model, "tokenbutler", keep=0.5, tokenizer=tiny.tokenizer(), **asked, **SMALL) as handle:
        fitted = handle.tensors(True)

    def error(state):
        method = registry.build("tokenbutler", settings=SMALL | {"dropout": 0.0})
        fit = method.fit(cache_shape(model), 0.5, 0)
        if state is not None:
            fit.predictor.load_state_dict(state)
        fit.generator = torch.Generator()
        driver = CacheFitDriver(model, method, fit)
        model(words)
        driver.remove()
        return fit.losses(None, None, driver.memory, None)["logits"].item()

    assert error(fitted) < 0.95 * error(None)


def test_what_does_not_fit_is_refused():
    model = decoder()
    with pytest.raises(UserError, match="tokenbutler must be trained"):
        tprune.prune(model, "tokenbutler", keep=0.5)
    with prune(model, 0.3), pytest.raises(UserError, match="ask for --keep above 0.33"):
        model(tokens(1, 20))
    with pytest.raises(UserError, match="queries of tokenbutler choose in all layers alike"):
        registry.build("tokenbutler", settings={"pyramid": 2})
    with pytest.raises(UserError, match="positions stay as they are"):
        prune(model, positions="compact")
    with pytest.raises(UserError, match="make no even part for each of 4 heads"):
        registry.build("tokenbutler").fit(cache_shape(model), 0.5, 0)
    cache = model(tokens(1, 20)).past_key_values
    with prune(model), pytest.raises(UserError, match="start from an empty one"):
        model(tokens(1, 5), past_key_values=cache)
