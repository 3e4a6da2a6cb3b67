"""From a recipe to a report and an artifact, and what pruning does to a real model."""

import json

import pytest
import torch
from transformers import DynamicCache

import tprune
from tests.decoders import decoder, tokens
from tprune.data import text
from tprune.errors import BudgetError, UserError
from tprune.evaluate.context import score_continuations
from tprune.evaluate.perplexity import perplexity
from tprune.methods import registry
from tprune.methods.cache import CacheMethod
from tprune.models.load import load
from tprune.models.source import resolve
from tprune.pipelines.llm_context import ContextPipeline, twin
from tprune.pipelines.run import execute, pipeline
from tprune.progress import Progress
from tprune.recipe import ModelSource, Recipe, Stage

METHODS = [
    name
    for name in registry.running_on("plain", "llm-context")
    if registry.load(name, "llm-context").learns != "required"
]
# think-clearly reads text, and has tests of its own.
every_method = pytest.mark.parametrize("method", [name for name in METHODS if name != "think-clearly"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny decoder on disk, without a tokenizer."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    decoder().save_pretrained(path)
    return str(path)


def recipe(model, method, keep=0.5, **more):
    return Recipe(ModelSource(model), (Stage("llm-context", method, keep=keep),), length=200, **more)


@every_method
def test_a_saved_model_gives_the_same_outputs_again(method, folder, tmp_path):
    out = str(tmp_path / "out")
    report = execute(recipe(folder, method), Progress(), out=out, evaluate=False)
    assert report["kind"] == "wrapped"
    assert abs(report["budget"]["achieved"] - 0.5) < 0.02
    assert set(report["dense"]) == set(report["pruned"])
    ids, coming = tokens(1, 150), tokens(1, 2, seed=2)
    with tprune.prune(decoder(), f"llm-context/{method}", keep=0.5) as handle:
        model = handle.compression.base if hasattr(handle, "compression") else handle.driver.core
        expected = model(coming, past_key_values=model(ids).past_key_values).last_hidden_state
    loaded = tprune.load(out)
    found = loaded.model(coming, past_key_values=loaded.model(ids).past_key_values).last_hidden_state
    assert torch.allclose(found, expected, atol=1e-6)
    loaded.tprune_handle.remove()
    again = loaded.model(coming, past_key_values=loaded.model(ids).past_key_values).last_hidden_state
    assert not torch.allclose(again, expected, atol=1e-3)


@every_method
def test_an_artifact_by_reference_holds_no_weights(method, folder, tmp_path):
    out = tmp_path / "out"
    execute(recipe(folder, method), Progress(), out=str(out), evaluate=False, by_reference=True)
    assert [file.name for file in sorted(out.glob("*.safetensors"))] == ["probe.safetensors"]
    assert tprune.load(str(out)).tprune_handle is not None


def test_a_model_without_a_tokenizer_can_only_be_timed(folder):
    with pytest.raises(UserError, match="without a tokenizer"):
        execute(recipe(folder, "h2o"), Progress())


@pytest.mark.parametrize(
    ("method", "keep", "clue"),
    [
        ("infinitehip", 0.1, "no room for a chunk"),
        ("h2o", 0.001, "no entry at all"),
        ("lazyllm", 0.2, "reaches"),
    ],
)
def test_a_budget_without_room_is_refused_before_the_dense_model_is_measured(
    method, keep, clue, folder, monkeypatch
):
    monkeypatch.delattr(ContextPipeline, "workload")
    with pytest.raises(BudgetError, match=clue):
        execute(recipe(folder, method, keep), Progress(), evaluate=False)


@pytest.mark.parametrize(("length", "clue"), [(1000, "256 positions"), (4, "at least 8")])
def test_windows_that_do_not_fit_are_refused(length, clue, folder):
    asked = Recipe(ModelSource(folder), (Stage("llm-context", "h2o", keep=0.5),), length=length)
    with pytest.raises(UserError, match=clue):
        execute(asked, Progress(), evaluate=False)


def test_the_continuation_of_an_unpruned_context_is_scored_as_in_one_pass():
    model, windows = decoder(), tokens(3, 64)
    losses, predictions, held = score_continuations(model, windows, batch_size=2)
    logits = model(windows).logits[:, 47:-1]
    whole = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), windows[:, 48:].flatten(), reduction="none"
    )
    assert torch.allclose(losses.flatten(), whole, atol=1e-4)
    assert torch.equal(predictions, logits.argmax(-1))
    assert held == 2 * 3 * 2 * 48 * 8 * 4


@every_method
def test_the_benchmark_times_every_part_and_leaves_the_model_dense(method, folder):
    asked = recipe(folder, method)
    driver = pipeline(asked, asked.stage, Progress())
    subject = driver.load()
    dense = subject.model(tokens(1, 150)).logits
    found = driver.bench(subject, rounds=2)
    timed = {"prefill_dense", "prefill_pruned", "decode_dense", "decode_pruned", "scoring_prefill"}
    evicts = isinstance(driver.method, CacheMethod) and driver.method.evicts_while_decoding
    assert set(found["times"]) == timed | ({"scoring_decode"} if evicts else set())
    forgets = not isinstance(driver.method, CacheMethod) or driver.method.forgets
    assert found["cache_mb_pruned"] < found["cache_mb_dense"] or not forgets
    json.dumps(found)
    assert torch.equal(subject.model(tokens(1, 150)).logits, dense)


def test_what_is_reported_of_tokens_is_that_of_the_evaluation(folder):
    asked = recipe(folder, "lazyllm")
    driver = pipeline(asked, asked.stages[0], Progress())
    subject = driver.load()
    driver.prepare(subject)
    with driver.apply(subject, None) as handle:
        driver.windows = tokens(2, 200)
        driver.evaluate(subject)
        counted = handle.achieved().value, handle.per_layer()
        driver.windows = tokens(1, 40)
        driver.workload(subject).run()
        assert (handle.achieved().value, handle.per_layer()) == counted
        assert handle.tally.prompts == 2


def test_a_twin_shares_its_tensors_and_none_of_the_hooks():
    model = decoder()
    other = twin(model)
    assert all(one is two for one, two in zip(model.parameters(), other.parameters(), strict=True))
    ids = tokens(1, 128)
    with tprune.prune(model, "h2o", keep=0.5):
        assert other(ids).past_key_values.layers[0].keys.shape[2] == 128
        assert model(ids).past_key_values.layers[0].keys.shape[2] == 64


def test_on_a_real_model_looking_beats_chance():
    subject = load(
        resolve(ModelSource("smollm2-135m"), "llm-context"),
        "llm-context",
        device="cpu",
        dtype="float32",
        seed=0,
    )
    windows = text.windows(text.read(None, "evaluation"), subject.processor, 512, 2)
    found = {"dense": perplexity(score_continuations(subject.model, windows, 1)[0])}
    for method in ("snapkv", "h2o", "llm-context/random"):
        with tprune.prune(subject.model, method, keep=0.25):
            losses, _, held = score_continuations(subject.model, windows, 1)
        found[method] = perplexity(losses)
        assert held == 0.25 * 2 * 30 * 3 * 384 * 64 * 4
    assert found["dense"] < found["snapkv"] < 0.6 * found["llm-context/random"]
    assert found["dense"] < found["h2o"] < 0.6 * found["llm-context/random"]


def test_positions_and_a_cache_of_ones_own_reach_the_python_interface():
    model, ids = decoder(), tokens(1, 128)
    outputs = []
    for positions in ("original", "compact", None):
        with tprune.prune(model, "streaming-llm", keep=0.5, positions=positions):
            cache = DynamicCache()
            model(ids, past_key_values=cache)
            outputs.append(model(ids[:, :1], past_key_values=cache).logits)
    assert torch.equal(outputs[1], outputs[2])
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-3)
