"""What a run writes: kinds of artifact, loading again, the same bytes again, going on after a kill."""

import json
import os
import signal
import subprocess
import sys
import weakref
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

import tprune
from tests.decoders import tokens
from tests.llm_weights.test_contract import METHODS
from tests.llm_weights.tiny import QUICK, kind_for, logits, save
from tprune.cli import command
from tprune.errors import UserError
from tprune.methods import registry
from tprune.pipelines import journal
from tprune.pipelines import run as runs
from tprune.pipelines.llm_weights import LlmWeights
from tprune.pipelines.run import execute
from tprune.progress import Progress
from tprune.recipe import ModelSource, Recipe, Stage, read

QUIET = Progress(quiet=True)
KINDS = {name: registry.load(name, "llm-weights") for name in METHODS}
LOADABLE = [
    name for name, kind in KINDS.items() if kind.uniform and not kind.wraps and "experts" not in kind.units
]


@pytest.fixture
def source(method, folder, tmp_path):
    """A model on disk that the method works in."""
    name, changes = kind_for(method)
    return save(tmp_path / "source", name, **changes) if changes else folder


def recipe(folder, text, method, sparsity=0.34, **stage):
    return Recipe(
        ModelSource(str(folder)),
        (Stage("llm-weights", method, sparsity=sparsity, set=QUICK.get(method, {}), **stage),),
        data=str(text),
        limit=2,
        calibration=4,
        length=24,
        batch_size=2,
    )


def weights(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}


def stock(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def test_the_pruned_model_is_gone_when_what_was_written_of_it_is_read(folder, text, tmp_path, monkeypatch):
    load, verify, alive = LlmWeights.load, runs.verify, []

    def noted(driver):
        subject = load(driver)
        alive.append(weakref.ref(subject.model))
        return subject

    def checked(*given):
        assert [one() for one in alive] == [None]
        verify(*given)

    monkeypatch.setattr(LlmWeights, "load", noted)
    monkeypatch.setattr(runs, "verify", checked)
    execute(recipe(folder, text, "wanda"), QUIET, out=str(tmp_path / "out"))


@pytest.mark.parametrize("method", METHODS)
def test_an_artifact_loads_again_and_its_recipe_gives_the_same_bytes(method, source, text, tmp_path):
    asked = recipe(source, text, method)
    report = execute(asked, QUIET, out=str(tmp_path / "one"))
    quality = "accuracy" if method in ("gaprune", "l3prune") else "perplexity"
    assert {quality, "agreement", "flops"} <= report["dense"].keys() == report["pruned"].keys()
    kind = registry.load(method, "llm-weights")
    own_shapes = "tprune" in json.loads((tmp_path / "one" / "config.json").read_text())
    assert report["kind"] == ("wrapped" if own_shapes else "plain" if kind.scope == "model" else "masked")
    assert own_shapes or not kind.wraps
    again = tprune.load(str(tmp_path / "one"))
    execute(read(tmp_path / "one" / "recipe.yaml"), QUIET, out=str(tmp_path / "two"), evaluate=False)
    assert weights(tmp_path / "one") == weights(tmp_path / "two")
    if report["kind"] != "wrapped":
        ids = tokens(2, 20)
        assert torch.equal(logits(again, ids), logits(stock(tmp_path / "one"), ids))


@pytest.mark.parametrize("method", METHODS)
def test_an_artifact_by_reference_holds_no_weights_and_gives_the_same_model(method, source, text, tmp_path):
    asked = recipe(source, text, method)
    execute(asked, QUIET, out=str(tmp_path / "whole"), evaluate=False)
    execute(asked, QUIET, out=str(tmp_path / "small"), evaluate=False, by_reference=True)
    assert not list((tmp_path / "small").glob("model*.safetensors"))
    ids = tokens(2, 20)
    whole, small = (logits(tprune.load(str(tmp_path / name)), ids) for name in ("whole", "small"))
    assert torch.equal(whole, small)


@pytest.mark.parametrize("method", LOADABLE)
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "gemma3", "qwen2"])
def test_loadable_plain_is_loaded_by_stock_transformers_with_the_same_outputs(method, name, text, tmp_path):
    source = save(tmp_path / "model", name)
    report = execute(
        recipe(source, text, method, loadable="plain"), QUIET, out=str(tmp_path / "out"), evaluate=False
    )
    assert report["kind"] == "plain"
    assert not (tmp_path / "out" / "tprune.safetensors").exists()
    ids = tokens(2, 20)
    expected = logits(tprune.load(str(tmp_path / "out")), ids)
    assert torch.equal(logits(stock(tmp_path / "out"), ids), expected)


def test_a_masked_model_in_bfloat16_is_loaded_by_stock_transformers_with_the_same_outputs(
    folder, text, tmp_path
):
    asked = replace(recipe(folder, text, "wanda"), dtype="bfloat16")
    execute(asked, QUIET, out=str(tmp_path / "out"), evaluate=False)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="bfloat16").eval()
    assert torch.equal(logits(tprune.load(tmp_path / "out"), tokens(2, 64)), logits(found, tokens(2, 64)))


def test_blocks_of_different_widths_that_go_in_a_later_stage_are_gone_when_loaded_again(text, tmp_path):
    asked = recipe(save(tmp_path / "model", "llama", num_hidden_layers=3), text, "flap", sparsity=0.3)
    asked = replace(asked, stages=(*asked.stages, Stage("llm-weights", "shortgpt", sparsity=0.34)))
    execute(asked, QUIET, out=str(tmp_path / "out"), evaluate=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert len(config["tprune"]["layers"]) == config["num_hidden_layers"] == 2
    assert len(tprune.load(str(tmp_path / "out")).model.layers) == 2


@pytest.mark.parametrize("name", ["phi3", "gpt-neox", "opt", "gemma2", "qwen3"])
def test_wrapped_widths_of_every_layout_are_loaded_again(name, text, tmp_path):
    source = save(tmp_path / "model", name)
    report = execute(
        recipe(source, text, "flap", sparsity=0.3), QUIET, out=str(tmp_path / "out"), evaluate=False
    )
    assert report["kind"] == "wrapped"
    again = tprune.load(str(tmp_path / "out"))
    assert type(again) is type(stock(source))
    report = execute(
        recipe(tmp_path / "out", text, "wanda", sparsity=0.5),
        QUIET,
        out=str(tmp_path / "twice"),
        evaluate=False,
    )
    assert report["kind"] == "wrapped"
    assert 0.49 < report["budget"]["achieved"] <= 0.5  # rows of odd width lose one weight less


@pytest.mark.parametrize("name", ["mixtral", "qwen-moe"])
@pytest.mark.parametrize("method", ["sparsegpt", "shortgpt"])
def test_pruned_experts_are_saved_and_loaded(name, method, text, tmp_path):
    source = save(tmp_path / "model", name)
    execute(recipe(source, text, method, sparsity=0.34), QUIET, out=str(tmp_path / "out"), evaluate=False)
    ids = tokens(2, 20)
    assert torch.equal(logits(tprune.load(str(tmp_path / "out")), ids), logits(stock(tmp_path / "out"), ids))


class Killed(BaseException):
    """As abrupt as a signal: no handler of Exception sees it."""


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "flap", "shortgpt"])
@pytest.mark.parametrize("block", [0, 1, 2])
def test_a_run_interrupted_after_any_block_goes_on_there_and_ends_with_the_same_bytes(
    method, block, folder, text, tmp_path, monkeypatch
):
    asked = recipe(folder, text, method)
    execute(asked, QUIET, out=str(tmp_path / "whole"), evaluate=False)
    write, written = journal.Journal.write, []

    def interrupted(self, index, tensors):
        stored = write(self, index, tensors)
        if index == block:
            raise Killed
        return stored

    def counted(self, index, tensors):
        written.append(index)
        return write(self, index, tensors)

    monkeypatch.setattr(journal.Journal, "write", interrupted)
    with pytest.raises(Killed):
        execute(asked, QUIET, out=str(tmp_path / "out"), evaluate=False)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(journal.Journal, "write", counted)
    execute(asked, QUIET, out=str(tmp_path / "out"), evaluate=False)
    assert written == list(range(block + 1, 3))
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert not list(tmp_path.glob(".out*"))


def test_a_changed_recipe_does_not_go_on_with_another_s_blocks(folder, text, tmp_path, monkeypatch):
    asked = recipe(folder, text, "wanda")
    write = journal.Journal.write

    def interrupted(self, index, tensors):
        write(self, index, tensors)
        raise Killed

    monkeypatch.setattr(journal.Journal, "write", interrupted)
    with pytest.raises(Killed):
        execute(asked, QUIET, out=str(tmp_path / "out"), evaluate=False)
    monkeypatch.setattr(journal.Journal, "write", write)
    other = replace(asked, seed=1)
    execute(other, QUIET, out=str(tmp_path / "out"), evaluate=False)
    execute(other, QUIET, out=str(tmp_path / "whole"), evaluate=False)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


KILL_ITSELF = """
import os, signal, sys
from tprune.pipelines import journal
from tprune.pipelines.run import execute
from tprune.progress import Progress
from tprune.recipe import read

write = journal.Journal.write

def write_and_die(self, index, tensors):
    stored = write(self, index, tensors)
    if index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return stored

journal.Journal.write = write_and_die
execute(read(sys.argv[1]), Progress(), out=sys.argv[2], evaluate=False)
"""


def test_a_killed_process_is_taken_up_by_the_next_and_ends_with_the_same_bytes(folder, text, tmp_path):
    asked = recipe(folder, text, "sparsegpt")
    file = tmp_path / "recipe.yaml"
    file.write_text(asked.to_yaml())
    out = tmp_path / "out"
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    killed = subprocess.run(
        [sys.executable, "-c", KILL_ITSELF, file, out], env=environment, capture_output=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert not out.exists()
    execute(asked, QUIET, out=str(out), evaluate=False)
    execute(asked, QUIET, out=str(tmp_path / "whole"), evaluate=False)
    assert weights(out) == weights(tmp_path / "whole")


LOAD_ALL = """
import sys, torch, tprune
from safetensors.torch import load_file

for folder in sys.argv[1:]:
    probe = load_file(folder + "/probe.safetensors")
    with torch.no_grad():
        found = tprune.load(folder)(input_ids=probe["input"]).logits[:, -2:]
    assert torch.allclose(found, probe["output"], rtol=1e-4, atol=1e-5), folder
"""


def test_a_fresh_process_loads_every_kind_of_artifact(folder, text, tmp_path):
    kinds = {"plain": "shortgpt", "masked": "sparsegpt", "wrapped": "flap"}
    for kind, method in kinds.items():
        report = execute(recipe(folder, text, method), QUIET, out=str(tmp_path / kind), evaluate=False)
        assert report["kind"] == kind
    execute(
        recipe(folder, text, "flap"),
        QUIET,
        out=str(tmp_path / "reference"),
        evaluate=False,
        by_reference=True,
    )
    folders = [str(tmp_path / name) for name in (*kinds, "reference")]
    fresh = subprocess.run([sys.executable, "-c", LOAD_ALL, *folders], capture_output=True)
    assert fresh.returncode == 0, fresh.stderr.decode()


@pytest.mark.parametrize("method", ["wanda", "flap"])
def test_measuring_an_artifact_again_finds_what_was_recorded(method, folder, text, tmp_path):
    report = execute(recipe(folder, text, method), QUIET, out=str(tmp_path / "out"))
    result = CliRunner().invoke(command, ["eval", str(tmp_path / "out"), "--json"], catch_exceptions=False)
    measured = json.loads(result.stdout)["measured"]
    assert measured["perplexity"] == pytest.approx(report["pruned"]["perplexity"], rel=1e-6)
    assert measured["flops"] == report["pruned"]["flops"]


def test_the_table_of_shapes_is_in_the_configuration(folder, text, tmp_path):
    execute(recipe(folder, text, "flap", sparsity=0.3), QUIET, out=str(tmp_path / "out"), evaluate=False)
    layers = json.loads((tmp_path / "out" / "config.json").read_text())["tprune"]["layers"]
    assert len(layers) == 3
    assert len({row["channels"][0] for row in layers}) > 1


def test_masks_of_another_model_are_refused(folder, text, tmp_path):
    asked = recipe(folder, text, "magnitude")
    execute(asked, QUIET, out=str(tmp_path / "out"), evaluate=False, by_reference=True)
    other = save(tmp_path / "other", hidden_size=64, intermediate_size=96)
    file = tmp_path / "out" / "recipe.yaml"
    named = read(file)
    file.write_text(replace(named, model=replace(named.model, name=str(other), sha256=None)).to_yaml())
    with pytest.raises(UserError, match="does not fit this model"):
        tprune.load(str(tmp_path / "out"))
