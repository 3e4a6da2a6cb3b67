"""Models larger than memory: blocks come from the shards when they run, and go again."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

import tprune
from tests.decoders import decoder, tokens
from tests.llm_weights.test_command import SMALL, run
from tests.llm_weights.tiny import save
from tprune import artifact
from tprune.commands import bench
from tprune.errors import UserError
from tprune.models.blocks import find_decoder
from tprune.models.calibrate import Stream
from tprune.models.shards import Shards
from tprune.models.subject import pages_of
from tprune.recipe import ModelSource, Recipe, Stage


def prune(model, text, out, method, *more):
    given = f"--method {method} --sparsity 0.5 {model} --data {text} --out {out} --json".split()
    return json.loads(run(*given, *SMALL, *more).stdout)


@pytest.mark.parametrize(
    ("name", "method"),
    [("llama", "wanda"), ("gpt2", "wanda"), ("gemma2", "sparsegpt"), ("phi3", "sparsegpt")],
)
def test_a_paged_model_is_pruned_to_the_same_weights_as_a_whole_one(name, method, text, tmp_path):
    source = save(tmp_path / "model", name)
    whole = prune(source, text, tmp_path / "whole", method)
    paged = prune(source, text, tmp_path / "paged", method, "--max-memory", "2MB")
    assert paged["protocol"] == whole["protocol"]
    assert paged["per_layer"] == whole["per_layer"]
    for kind in ("dense", "pruned"):
        assert paged[kind]["perplexity"] == pytest.approx(whole[kind]["perplexity"], rel=1e-5)
        assert paged[kind]["flops"] == whole[kind]["flops"]
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / one) for one in ("whole", "paged")]
    one, other = (dict(model.named_parameters()) for model in models)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[part], other[part]) for part in one)
    assert pages_of(tprune.load(str(tmp_path / "paged"))) is None
    both = [artifact.read_tensors(tmp_path / kind / artifact.TENSORS) for kind in ("whole", "paged")]
    assert both[0].keys() == both[1].keys()
    assert all(torch.equal(both[0][mask], both[1][mask]) for mask in both[0])


def test_activations_in_a_file_are_those_in_memory(tmp_path):
    ids = tokens(5, 20)
    held, spilled = Stream(find_decoder(decoder()), ids, 2), Stream(find_decoder(decoder()), ids, 2, tmp_path)
    assert not list(tmp_path.iterdir())
    for index in range(3):
        chosen = torch.tensor([3, 0])
        for places in (None, chosen):
            one, other = (stream.gather(index, ("norm",), None, places) for stream in (held, spilled))
            assert all(torch.equal(one[name].result()["norm"], other[name].result()["norm"]) for name in one)
        held.advance(index)
        spilled.advance(index)
    assert torch.equal(held.hidden, torch.cat(list(spilled.hidden.split(3))))


LIMITED = """
import resource, sys
import torch
from tests.llm_weights.test_paged import prune
from tprune.errors import UserError
from tprune.models import load
from tprune.models.source import resolve
from tprune.recipe import ModelSource

torch.set_num_threads(1)
small, large, text, out = sys.argv[1:]
prune(small, text, out + "-small", "wanda", "--max-memory", "2MB", "--no-eval")
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 96 * 2**20,) * 2)
print(prune(large, text, out, "wanda", "--max-memory", "40MB", "--no-eval")["budget"]["achieved"])
try:
    load.load(resolve(ModelSource(large), "llm-weights"), "llm-weights", device="cpu", dtype="float32", seed=0)
except (RuntimeError, MemoryError, UserError):
    print("too large to be loaded whole")
"""


def test_a_model_larger_than_the_address_space_that_is_left_is_pruned(folder, text, tmp_path):
    large = save(
        tmp_path / "large",
        hidden_size=256,
        intermediate_size=2048,
        num_hidden_layers=24,
    )
    assert sum(file.stat().st_size for file in large.glob("*.safetensors")) > 160 * 2**20
    words = [sys.executable, "-c", LIMITED, folder, large, text, tmp_path / "out"]
    # Large tensors are mapped one by one: a freed one leaves no hole in the address space.
    surroundings = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    words = [str(word) for word in words]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=surroundings)
    assert done.stdout.split("\n")[:2] == ["0.5", "too large to be loaded whole"], done.stderr[-2000:]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-memory", "much"], "expected a size such as 500MB or 8GB"),
        (["--max-memory", "0GB"], "expected a size such as 500MB or 8GB"),
        (["--max-memory", "0.1MB"], "too little for one sequence of 24 tokens; give at least"),
        (["--max-memory", "2MB", "--recover", "full"], "need the whole model"),
        (["--max-memory", "2MB", "--method", "flap"], "flap looks at the whole model at once"),
        (["--max-memory", "2MB", "--method", "gblm"], "gblm looks at the whole model at once"),
        (["--max-memory", "2MB", "--by-reference"], "no --by-reference"),
    ],
)
def test_what_cannot_be_streamed_is_said(arguments, message, folder, text, tmp_path):
    out = ["--out", tmp_path / "out"]
    with pytest.raises(UserError, match=message):
        run("--method", "wanda", "--sparsity", "0.5", folder, "--data", text, *SMALL, *out, *arguments)


def test_without_a_folder_and_for_a_model_that_is_converted_at_loading_it_is_refused(folder, text, tmp_path):
    given = ["--method", "wanda", "--sparsity", "0.5", "--data", text, *SMALL, "--max-memory", "2MB"]
    with pytest.raises(UserError, match="give --out DIR"):
        run(folder, *given)
    experts = save(tmp_path / "experts", "mixtral")
    with pytest.raises(UserError, match="the shards hold no model.layers.0.mlp"):
        run(experts, *given, "--out", tmp_path / "out")


def test_damaged_shards_are_named(tmp_path):
    file = tmp_path / "model.safetensors"
    for content in (b"", b"\xff" * 64, (8).to_bytes(8, "little") + b'{"a": 1}'):
        file.write_bytes(content)
        with pytest.raises(UserError, match="not a readable safetensors file"):
            Shards([file])
    header = b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)
    with pytest.raises(UserError, match="ends within a"):
        Shards([file]).read("a", torch.empty(4))
    with pytest.raises(UserError, match=r"a is \[4\], and the configuration says \[5\]"):
        Shards([file]).read("a", torch.empty(5))


def test_the_benchmark_of_a_paged_model_counts_memory_from_the_whole_one(text, tmp_path):
    source = save(tmp_path / "model", hidden_size=256, intermediate_size=1024, num_hidden_layers=8)
    recipe = Recipe(
        ModelSource(str(source)),
        (Stage("llm-weights", "sparsegpt", sparsity=0.5),),
        data=str(text),
        calibration=4,
        length=24,
        batch_size=2,
    )
    whole, paged = (bench.measure(replace(recipe, max_memory=size), 1) for size in (None, "40MB"))
    model = sum(file.stat().st_size for file in source.glob("*.safetensors")) / 2**20
    assert paged["plain_passes"] > 0
    assert paged["workers"] == 1
    assert -model < paged["tensors_above_model_mb"] < whole["tensors_above_model_mb"]
    assert paged["masks_mb"] == whole["masks_mb"]


def test_the_benchmark_refuses_to_page_what_is_no_language_model():
    recipe = Recipe(ModelSource("digits-vit"), (Stage("vit", "tome", keep=0.5),), max_memory="1GB")
    with pytest.raises(UserError, match="only llm-weights reads a model block by block"):
        bench.measure(recipe, 1)
