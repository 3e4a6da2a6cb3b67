"""Methods of the family that learn: from text to what is on disk."""

import json

import pytest
import torch

import tprune
from tests.decoders import count_hooks, decoder
from tests.fits import interrupted, same
from tests.llm_weights import tiny
from tests.test_cli import call
from tprune import artifact
from tprune.errors import UserError
from tprune.methods import registry
from tprune.models.source import Source
from tprune.models.subject import Subject
from tprune.pipelines.run import pipeline
from tprune.progress import Progress
from tprune.recipe import ModelSource, Recipe, Stage

LEARNERS = [
    name
    for name in registry.running_on("plain", "llm-context")
    if registry.load(name, "llm-context").learns != "no"
]
every_learner = pytest.mark.parametrize("method", LEARNERS)
STEPS = {"sequence": 32, "batch": 2, "lr": 1e-2}
SMALL = {
    "cskv": {"looks": 4},
    "dynamic-context-pruning": {"size": 4},
    "ftp": {"population": 3, "generations": 1, "looks": 1},
    "tokenbutler": {"reduce": 2, "inner": 12, "size": 4},
}


def settings(method, file, steps=3):
    """Hyperparameters for so many steps on this text."""
    windows = len(tprune_windows(file))
    return STEPS | SMALL[method] | {"epochs": steps * STEPS["batch"] / windows}


def tprune_windows(file):
    from tprune.data import text

    return text.training(str(file), tiny.tokenizer(), STEPS["sequence"])


def learned(method, file, **more):
    model = decoder()
    asked = {"keep": 0.5, "fit": str(file), "tokenizer": tiny.tokenizer()}
    with tprune.prune(model, method, **asked, **settings(method, file) | more) as handle:
        return handle.tensors(True), handle, model


@every_learner
def test_three_steps_change_what_is_stored_and_the_same_seed_gives_the_same_bytes(method, text):
    first, handle, model = learned(method, text)
    again, _, _ = learned(method, text)
    begun, _, _ = learned(method, text, lr=0.0)
    assert same(first, again)
    assert not same(first, begun)
    assert handle.fitted["steps"] == 3
    assert handle.fitted["data"]["split"] == "calibration"
    same_model = same(dict(model.named_parameters()), dict(decoder().named_parameters()))
    assert same_model != handle.fitted["tuned"]
    assert not any(parameter.requires_grad for parameter in model.parameters())


@every_learner
def test_an_interrupted_fit_goes_on_to_the_same_bytes(method, text, monkeypatch, tmp_path):
    whole, _, _ = learned(method, text)
    stage = Stage("llm-context", method, keep=0.5, set=settings(method, text), fit=str(text))
    recipe = Recipe(ModelSource("a model in memory"), (stage,))

    def run():
        subject = Subject(
            decoder(), tiny.tokenizer(), Source("a model in memory", "memory", "", "transformers")
        )
        with pipeline(recipe, stage, Progress()).apply(subject, tmp_path) as handle:
            return handle.tensors(True)

    assert same(interrupted(run, tmp_path, monkeypatch), whole)


@every_learner
def test_a_fit_is_written_loaded_and_run_again_to_the_same_bytes(method, text, folder, tmp_path):
    out, again = tmp_path / "out", tmp_path / "again"
    given = [part for pair in settings(method, text).items() for part in ("--set", "{}={}".format(*pair))]
    asked = ["llm-context", "--method", method, "--keep", "0.5", "--fit", text, *given, folder]
    assert f"fit on {text} data" in call(*asked, "--dry-run").output
    report = json.loads(call(*asked, "--length", 96, "--data", text, "--out", out, "--json").stdout)
    assert report["fit"]["steps"] == 3
    files = sorted(file.name for file in out.glob("*.safetensors"))
    model, probe = tprune.load(out), artifact.read_tensors(out / artifact.PROBE)
    with torch.no_grad():
        cache = model(input_ids=probe["input"][:, :72]).past_key_values
        found = model(input_ids=probe["input"][:, 72:], past_key_values=cache).logits
    assert torch.allclose(found, probe["output"], atol=1e-4)
    call("run", out / "recipe.yaml", "--out", again, "--quiet")
    assert all((again / file).read_bytes() == (out / file).read_bytes() for file in files)


def test_a_method_that_runs_unfitted_says_so_in_one_line(text, folder):
    said = call(
        "llm-context", "--method", "cskv", "--keep", "0.5", folder, "--data", text, "--no-eval"
    ).stderr
    assert said.splitlines().count("cskv runs unfitted; --fit DATA fits it to this model") == 1


def test_what_cannot_be_fitted_is_refused(text, tmp_path):
    model = decoder()
    with pytest.raises(UserError, match="h2o learns nothing"):
        tprune.prune(model, "h2o", keep=0.5, fit="built-in", tokenizer=tiny.tokenizer())
    with pytest.raises(UserError, match="which takes a tokenizer"):
        tprune.prune(model, "cskv", keep=0.5, fit="built-in")
    with pytest.raises(UserError, match="--fit .*no.txt: No such file"):
        tprune.prune(model, "cskv", keep=0.5, fit=str(tmp_path / "no.txt"), tokenizer=tiny.tokenizer())
    with pytest.raises(UserError, match="--fit: .* tokens do not fill one window of 100000"):
        tprune.prune(model, "cskv", keep=0.5, fit=str(text), tokenizer=tiny.tokenizer(), sequence=100_000)


@every_learner
def test_a_fit_that_is_refused_leaves_nothing_in_the_model(method, text, monkeypatch):
    def refuse(*args):
        raise UserError("no")

    monkeypatch.setattr("tprune.pipelines.fit.processes", refuse)
    model = decoder()
    before = count_hooks(model), [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(UserError, match="no"):
        tprune.prune(
            model, method, keep=0.5, fit=str(text), tokenizer=tiny.tokenizer(), **settings(method, text)
        )
    assert (count_hooks(model), [parameter.requires_grad for parameter in model.parameters()]) == before


def test_cskv_reconstructs_its_text_better_once_it_is_fitted(text):
    """On its own text: keys and values through the fitted maps, those it begins with, and singular vectors."""
    model, ids = decoder(), tprune_windows(text).tokens[-6:]

    def lost(**more):
        with tprune.prune(model, "cskv", keep=0.3, tokenizer=tiny.tokenizer(), window=16, **more):
            cache = model(ids).past_key_values
        dense = model(ids).past_key_values
        total = 0.0
        for layer, exact in zip(cache.layers, dense.layers, strict=True):
            key, value, _ = next(layer.stored.tiles())
            total += ((key - exact.keys).square().mean() + (value - exact.values).square().mean()).item()
        return total

    asked = {"fit": str(text), "sequence": 32, "batch": 8, "looks": 32}
    begun, fitted = (lost(**asked, lr=lr, epochs=8.0) for lr in (0.0, 1e-2))
    assert fitted < 0.8 * begun
    assert fitted < 0.8 * lost()
