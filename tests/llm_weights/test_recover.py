"""Training after pruning: what was pruned stays pruned, and the rest learns."""

import importlib.util
import json

import pytest
import torch

import tprune
from tests.decoders import decoder, tokens
from tests.fits import StoppedError, stopping
from tests.llm_weights.test_command import SMALL, run
from tests.llm_weights.test_finetune import zeros
from tests.llm_weights.tiny import logits, prune
from tprune import artifact
from tprune.errors import UserError
from tprune.models import masks
from tprune.models.lora import low_rank

FEW = {"lora": "lora:epochs=0.3,lr=0.03,rank=4", "full": "full:epochs=0.3,lr=0.003"}


@pytest.mark.parametrize("how", ["lora", "full"])
@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "mixtral"])
def test_zeros_stay_while_the_rest_is_trained(name, how, text):
    model, other = decoder(name), decoder(name)
    handle = prune(model, "wanda", text, pattern="2:4", recover=FEW[how])
    prune(other, "wanda", text, pattern="2:4")
    before, after = zeros(other), zeros(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    first, last = handle.recovered["losses"]["next token"]
    assert last < first
    kinds = [type(module) for module in other.modules()]
    assert kinds == [type(module) for module in model.modules()]
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not torch.allclose(logits(model, tokens(1, 9)), logits(other, tokens(1, 9)), atol=1e-3)


def test_a_step_in_parts_is_a_step_at_once(text):
    models = [decoder(), decoder()]
    for model, together in zip(models, (1, 8), strict=True):
        prune(model, "magnitude", text, sparsity=0.5, recover=FEW["full"], batch_size=together)
    pairs = zip(*(model.parameters() for model in models), strict=True)
    assert all(torch.allclose(one, other, atol=1e-4) for one, other in pairs)


@pytest.mark.parametrize("method", ["flap", "shortgpt", "sleb"])
def test_what_lost_structure_learns_too(method, text):
    model = decoder()
    handle = prune(model, method, text, sparsity=0.34, recover=FEW["lora"])
    first, last = handle.recovered["losses"]["next token"]
    assert last < first
    assert handle.recovered["kind"] == "lora"


@pytest.mark.parametrize("how", ["lora", "full"])
def test_zeros_of_an_earlier_stage_stay_too(how, text):
    model, other = decoder(), decoder()
    for one, recover in ((model, FEW[how]), (other, None)):
        prune(one, "magnitude", text, sparsity=0.5)
        prune(one, "mag-sp", text, sparsity=0.34, recover=recover)
    before, after = zeros(other), zeros(model)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_is_merged_is_what_was_trained(name, text):
    model = decoder(name)
    handle = prune(model, "wanda", text, sparsity=0.5)
    kept = masks.kept(masks.matched(model, masks.masks_of(handle.tensors(by_reference=True), "here")))
    with low_rank(model, 2, 4.0, 0, kept), torch.no_grad():
        for part, weight in model.named_parameters():
            if "lora_B" in part:
                weight.normal_(generator=torch.Generator().manual_seed(1))
        with_change = logits(model, tokens(2, 9))
    assert torch.allclose(logits(model, tokens(2, 9)), with_change, atol=1e-4)


def asked(folder, text, out, *more):
    return [
        *f"--method wanda --sparsity 0.5 {folder} --data {text} --out {out} --json".split(),
        *SMALL,
        *more,
    ]


def test_the_report_tells_both_perplexities_and_a_reference_brings_back_what_was_trained(
    folder, text, tmp_path
):
    out = tmp_path / "out"
    report = json.loads(run(*asked(folder, text, out, "--recover", FEW["lora"], "--by-reference")).stdout)
    assert report["pruned"]["perplexity"] < report["recovery"]["before"]["perplexity"]
    assert report["recovery"]["sequences"] > 0
    assert {"rank", "epochs", "losses", "steps"} <= report["recovery"].keys()
    assert "recover: lora:epochs=0.3" in (out / "recipe.yaml").read_text()
    again = tprune.load(str(out))
    assert torch.equal(
        logits(again, artifact.read_tensors(out / "probe.safetensors")["input"])[:, -2:],
        artifact.read_tensors(out / "probe.safetensors")["output"],
    )


@pytest.mark.parametrize("how", ["lora", "full"])
def test_an_interrupted_recovery_goes_on_and_ends_in_the_same_bytes(how, folder, text, tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    few = FEW[how] + ",batch=4"
    run(*asked(folder, text, whole, "--recover", few))
    seen = stopping(3, monkeypatch)
    with pytest.raises(StoppedError):
        run(*asked(folder, text, broken, "--recover", few))
    report = json.loads(run(*asked(folder, text, broken, "--recover", few)).stdout)
    # The third step had been taken, not yet saved.
    assert len(seen) == report["recovery"]["steps"] + 1
    one, other = (artifact.read_tensors(out / "model.safetensors") for out in (whole, broken))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recover", "adapters"], "--recover adapters: expected lora or full"),
        (["--recover", "lora:ranks=3"], "lora has no hyperparameter 'ranks'"),
        (["--recover", "lora:epochs=0"], "trains nothing"),
        (["--recover", "full", "--dtype", "bfloat16"], "lost in bfloat16"),
        (["--recover", "lora", "--method", "armor", "--pattern", "2:4"], "armor puts matrices around"),
        (["--recover-data", "here.txt"], "give --recover lora or full with it"),
        (["--recover", "lora", "--recover-data", "nowhere.txt"], "nowhere.txt: No such file"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(arguments, message, folder, text):
    with pytest.raises(UserError, match=message):
        given = arguments if "--pattern" in arguments else ["--sparsity", "0.5", *arguments]
        run("--method", "wanda", folder, "--data", text, *SMALL, "--no-eval", *given)


def test_a_model_in_memory_is_untouched_where_it_cannot_be_trained(text):
    model = decoder()
    with pytest.raises(UserError, match="--recover adapters"):
        prune(model, "wanda", text, sparsity=0.5, recover="adapters")
    assert all(map(torch.equal, model.parameters(), decoder().parameters()))


def test_a_missing_package_is_named_before_anything_is_loaded(folder, text, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--recover lora needs the peft library: pip install peft"):
        run("--method", "wanda", "--sparsity", "0.5", folder, "--data", text, "--recover", "lora")
