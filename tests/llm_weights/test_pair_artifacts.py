"""Encoders with a decoder beside them on disk: written, read, interrupted, and as the command has them."""

import json
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForSeq2SeqLM

import tprune
from tests.decoders import tokens
from tests.llm_weights.test_artifacts import QUIET, recipe, weights
from tests.llm_weights.test_pairs import logits
from tests.llm_weights.tiny import tokenizer
from tests.pairs import pair
from tprune.cli import command
from tprune.errors import UserError
from tprune.pipelines import journal
from tprune.pipelines.run import execute
from tprune.recipe import read


@pytest.fixture(scope="module", params=["t5", "bart"])
def source(request, tmp_path_factory):
    """A model with its tokenizer on disk."""
    folder = tmp_path_factory.mktemp("pairs") / request.param
    pair(request.param).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def test_an_artifact_is_loaded_by_stock_transformers_and_its_recipe_gives_the_same_bytes(
    source, text, tmp_path
):
    report = execute(recipe(source, text, "sparsegpt"), QUIET, out=str(tmp_path / "one"))
    assert report["kind"] == "masked"
    assert {"perplexity", "agreement", "flops"} <= report["dense"].keys() == report["pruned"].keys()
    execute(read(tmp_path / "one" / "recipe.yaml"), QUIET, out=str(tmp_path / "two"), evaluate=False)
    assert weights(tmp_path / "one") == weights(tmp_path / "two")
    stock, ids = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "one").eval(), tokens(2, 20)
    assert torch.equal(logits(stock, ids), logits(tprune.load(str(tmp_path / "one")), ids))
    assert not torch.equal(logits(stock, ids), logits(AutoModelForSeq2SeqLM.from_pretrained(source), ids))
    plain = recipe(source, text, "sparsegpt", loadable="plain")
    assert execute(plain, QUIET, out=str(tmp_path / "plain"), evaluate=False)["kind"] == "plain"
    execute(
        recipe(source, text, "sparsegpt"),
        QUIET,
        out=str(tmp_path / "small"),
        evaluate=False,
        by_reference=True,
    )
    assert torch.equal(logits(tprune.load(str(tmp_path / "small")), ids), logits(stock, ids))


@pytest.mark.parametrize(("source", "block"), [("t5", 1), ("bart", 3)], indirect=["source"])
def test_a_run_interrupted_in_either_stack_goes_on_there_and_ends_with_the_same_bytes(
    source, block, text, tmp_path, monkeypatch
):
    asked = recipe(source, text, "sparsegpt")
    execute(asked, QUIET, out=str(tmp_path / "whole"), evaluate=False)
    write = journal.Journal.write

    def interrupted(self, index, tensors):
        stored = write(self, index, tensors)
        if index == block:
            raise KeyboardInterrupt
        return stored

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(journal.Journal, "write", interrupted)
        execute(asked, QUIET, out=str(tmp_path / "out"), evaluate=False)
    execute(asked, QUIET, out=str(tmp_path / "out"), evaluate=False)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_a_cache_method_is_refused_in_one_line(source):
    asked = ["llm-context", "--method", "snapkv", "--keep", "0.5", str(source)]
    with pytest.raises(UserError, match="model, which tprune llm-context does not prune") as said:
        CliRunner().invoke(command, asked, catch_exceptions=False)
    assert "\n" not in str(said.value)


def test_blocks_of_both_stacks_are_read_from_their_files(source, text, tmp_path):
    reports = []
    for name, memory in (("whole", None), ("paged", "2MB")):
        asked = replace(recipe(source, text, "sparsegpt"), max_memory=memory)
        reports.append(execute(asked, QUIET, out=str(tmp_path / name)))
    whole, paged = reports
    assert paged["per_layer"] == whole["per_layer"]
    for kind in ("dense", "pruned"):
        assert paged[kind]["perplexity"] == pytest.approx(whole[kind]["perplexity"], rel=1e-5)
    models = [AutoModelForSeq2SeqLM.from_pretrained(tmp_path / one) for one in ("whole", "paged")]
    one, other = (dict(model.named_parameters()) for model in models)
    assert one.keys() == other.keys()
    assert all(torch.allclose(one[part], other[part], atol=1e-6) for part in one)


def test_the_command_says_what_it_did(source, text):
    run = CliRunner().invoke(
        command,
        ["llm-weights", "--method", "wanda", "--sparsity", "0.5", "--data", str(text), "--length", "24"]
        + ["--calibration", "2", "--limit", "2", "--json", str(source)],
    )
    assert run.exit_code == 0, run.stderr
    said = json.loads(run.stdout)
    assert said["budget"]["achieved"] == 0.5
    assert said["protocol"]["data"]["foretold"] == 12
