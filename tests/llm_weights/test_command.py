"""The command of the family: its report and its refusals."""

import json

import pytest
from click.testing import CliRunner

from tests.llm_weights.tiny import save
from tprune.cli import command
from tprune.commands import bench
from tprune.errors import UserError
from tprune.evaluate import perplexity
from tprune.models import load as loaders
from tprune.recipe import ModelSource, Recipe, Stage

SMALL = ["--calibration", "4", "--length", "24", "--batch-size", "2", "--limit", "2"]


def run(*arguments):
    return CliRunner().invoke(command, ["llm-weights", *map(str, arguments)], catch_exceptions=False)


def test_json_is_one_object_with_the_promised_keys(folder, text):
    result = run("--method", "wanda", "--pattern", "2:4", folder, "--data", text, "--json", *SMALL)
    report = json.loads(result.stdout)
    expected = {
        "family",
        "method",
        "model",
        "params",
        "seed",
        "budget",
        "dense",
        "pruned",
        "per_layer",
        "out",
    }
    assert expected <= report.keys()
    assert report["budget"]["asked"] == "2:4"
    assert report["budget"]["achieved"] == 0.5
    kept = {"perplexity", "agreement", "flops", "latency_ms", "throughput", "peak_memory_mb"}
    assert kept == report["dense"].keys() == report["pruned"].keys()
    assert [row["block"] for row in report["per_layer"]] == [0, 1, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--sparsity S"),
        (["--pattern", "2:5"], "inputs of model.layers.0.self_attn.q_proj do not divide into groups of 5"),
        (["--pattern", "4:2"], "expected N:M"),
        (["--sparsity", "1.5"], "--sparsity 1.5"),
        (["--sparsity", "0.5", "--length", "4096"], "this model has 256 positions"),
        (["--sparsity", "0.5", "--set", "nothing=1"], "wanda has no hyperparameter 'nothing'"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_measured(arguments, message, folder, text, monkeypatch):
    monkeypatch.setattr(perplexity, "token_losses", None)
    with pytest.raises(UserError, match=message):
        run("--method", "wanda", folder, "--data", text, *SMALL, *arguments)


def test_a_missing_budget_is_refused_before_the_model_is_loaded(folder, monkeypatch):
    monkeypatch.setattr(loaders, "load", None)
    with pytest.raises(UserError, match="flap needs a budget: give --sparsity S"):
        run("--method", "flap", folder)


def test_a_model_without_a_tokenizer_says_what_is_missing(text, tmp_path):
    source = save(tmp_path / "model")
    for file in source.glob("*token*"):
        file.unlink()
    with pytest.raises(UserError, match="has no tokenizer"):
        run("--method", "random", "--sparsity", "0.5", source, "--data", text, *SMALL)


def test_a_sparsity_out_of_a_structured_method_s_reach_names_what_is_reachable(folder, text):
    with pytest.raises(UserError, match="at most"):
        run("--method", "flap", "--sparsity", "0.97", folder, "--data", text, *SMALL, "--no-eval")
    with pytest.raises(UserError, match="reachable are 0.3333 to 0.6667"):
        run("--method", "shortgpt", "--sparsity", "0.9", folder, "--data", text, *SMALL, "--no-eval")


@pytest.mark.parametrize(("method", "held"), [("wanda", True), ("magnitude", False)])
def test_the_benchmark_says_time_in_plain_passes_and_memory_above_the_model(method, held, folder, text):
    stage = Stage("llm-weights", method, sparsity=0.5)
    recipe = Recipe(
        ModelSource(str(folder)), (stage,), data=str(text), calibration=4, length=24, batch_size=2
    )
    record = bench.measure(recipe, 3)
    assert record["plain_passes"] > 0
    within = record["within_rounds"]["plain_passes"]
    assert 0 < within["q1"] <= within["median"] <= within["q3"]
    assert record["tensors_above_model_mb"] > max(record["activations_mb"], record["masks_mb"])
    assert record["resident_above_model_mb"] > -1
    assert (record["activations_mb"] > 0) == held
    assert record["largest_block_mb"] > 0
    assert record["protocol"]["attention"] == "sdpa"
    assert record["protocol"]["dtype"] == "float32"
    assert record["protocol"]["hardware"]["threads"] > 0
