"""Models larger than memory: blocks come from the shards when they run, and go again."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PhiConfig, PhiForCausalLM

import tprune
from tests.decoders import COMMON, decoder, tokens
from tests.llm_weights.test_command import SMALL, run
from tests.llm_weights.tiny import save
from tests.pairs import pair
from tprune import artifact
from tprune.commands import bench
from tprune.errors import UserError
from tprune.evaluate import perplexity
from tprune.evaluate.cost import peak_tensors
from tprune.evaluate.protocol import fingerprint
from tprune.models import in_file
from tprune.models.blocks import find_decoder
from tprune.models.calibrate import Stream
from tprune.models.encoder_decoder import fed
from tprune.models.in_file import InFile
from tprune.models.load_paged import load_paged
from tprune.models.shards import Shards, write
from tprune.models.source import resolve
from tprune.models.subject import pages_of
from tprune.pipelines import memory
from tprune.progress import Progress
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


def paged(model, folder, dtype="float32"):
    """A model, saved and read block by block."""
    model.save_pretrained(folder)
    return again(folder, dtype)


def again(folder, dtype="float32"):
    """A model on disk, read block by block."""
    return load_paged(
        resolve(ModelSource(str(folder)), "llm-weights"), "llm-weights", device="cpu", dtype=dtype
    ).model


def biased():
    """A decoder whose head has a bias."""
    torch.manual_seed(0)
    model = PhiForCausalLM(PhiConfig(**COMMON)).eval()
    model.lm_head.bias.data.normal_()
    return model


def in_files(model):
    """Names of the modules whose weight is in a file."""
    return [
        name for name, module in model.named_modules() if isinstance(getattr(module, "weight", None), InFile)
    ]


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda: decoder("llama"), ["model.embed_tokens", "lm_head"]),
        (lambda: decoder("llama", tie_word_embeddings=True), ["model.embed_tokens", "lm_head"]),
        (lambda: decoder("gpt2"), ["transformer.wte", "lm_head"]),
        (lambda: decoder("opt"), ["model.decoder.embed_tokens", "lm_head"]),
        (biased, ["model.embed_tokens", "lm_head"]),
        (lambda: pair("t5"), ["shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"]),
        # Scaled embeddings stay in memory, and heads that are tied to them.
        (lambda: decoder("gemma2"), []),
        (lambda: decoder("gemma2", tie_word_embeddings=False), ["lm_head"]),
        (lambda: pair("bart"), []),
    ],
)
@torch.no_grad()
def test_logits_with_the_embedding_and_the_head_in_files_are_those_of_the_whole_model(
    build, expected, tmp_path, monkeypatch
):
    monkeypatch.setattr(in_file, "TILE", 1000)  # seven rows of a matrix of 96
    whole = build()
    model = paged(whole, tmp_path)
    assert in_files(model) == expected
    ids = tokens(3, 12)
    ids[1, :4] = 0
    given = fed(whole, ids) | {"attention_mask": (fed(whole, ids)["input_ids"] != 0).long()}
    assert torch.allclose(model(**given).logits, whole(**given).logits, atol=1e-5)
    for one in (torch.tensor([[5]]), torch.tensor([[7, 7, 95, 0, 7]])):
        assert torch.equal(model.get_input_embeddings()(one), whole.get_input_embeddings()(one))
    assert torch.equal(
        model.get_input_embeddings()(torch.tensor(9)), whole.get_input_embeddings()(torch.tensor(9))
    )
    assert fingerprint(model) == fingerprint(whole)
    for inside, out in zip(*(one.named_parameters() for one in (model, whole)), strict=True):
        assert (inside[0], inside[1].shape, inside[1].dtype) == (out[0], out[1].shape, out[1].dtype)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_saved_again_a_paged_model_has_the_weights_of_its_files(tied, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(in_file, "TILE", 1000)
    source, out = tmp_path / "source", tmp_path / "out"
    out.mkdir()
    model = paged(decoder(tie_word_embeddings=tied).bfloat16(), source, dtype)
    pages_of(model).save(out)
    expected = load_file(source / "model.safetensors")
    found = {name: tensor for file in out.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert found.keys() == expected.keys()
    assert ("lm_head.weight" in found) is not tied
    assert all(torch.equal(found[name], expected[name].to(found[name].dtype)) for name in found)
    assert {tensor.dtype for tensor in found.values()} == {getattr(torch, dtype)}
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    stock = AutoModelForCausalLM.from_pretrained(out)
    assert (stock.lm_head.weight is stock.model.embed_tokens.weight) is tied
    for name, tensor in stock.state_dict().items():
        assert torch.equal(tensor, found.get(name, found["model.embed_tokens.weight"]))


def test_neither_the_embedding_nor_the_head_is_ever_whole_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(in_file, "TILE", 2**18)
    whole = decoder(vocab_size=2**14, hidden_size=128, num_hidden_layers=1).bfloat16()
    size = whole.lm_head.weight.nbytes  # 4 MB, and 8 in float32
    whole.save_pretrained(tmp_path / "model")
    (tmp_path / "out").mkdir()

    model = again(tmp_path / "model")

    def run():
        fingerprint(model)
        with torch.no_grad():
            model(input_ids=tokens(1, 8), use_cache=False)
        pages_of(model).save(tmp_path / "out")

    assert peak_tensors(run, "cpu") < size / 2**20 / 2


def test_perplexity_reads_the_head_as_seldom_as_the_memory_that_is_left_allows(tmp_path, monkeypatch):
    monkeypatch.setattr(perplexity, "LOGITS_AT_ONCE", 1)
    whole, ids, read = decoder(), tokens(4, 20), []
    model = paged(whole, tmp_path)
    tiles = InFile.tiles
    monkeypatch.setattr(InFile, "tiles", lambda self: read.append(self.stored) or tiles(self))
    expected = perplexity.score_windows(whole, ids, 2)
    for limit, times in (("1GB", 2), ("0.02MB", 2 * 19)):
        read.clear()
        found = memory.score_paged(Stream(find_decoder(model), ids, 2), limit, Progress())
        assert torch.allclose(found[0], expected[0], atol=1e-5)
        assert torch.equal(found[1], expected[1])
        assert read == ["lm_head.weight"] * times


def test_whatever_wants_a_matrix_in_a_file_as_a_whole_is_refused_in_one_line(tmp_path):
    model = paged(decoder(), tmp_path)
    for use in (lambda weight: weight + 1, lambda weight: weight.double(), lambda weight: weight[0]):
        with pytest.raises(UserError, match="lm_head.weight stays in its file, .* leave --max-memory out"):
            use(model.lm_head.weight)


def test_rows_are_read_in_any_order_again_and_in_another_dtype(tmp_path):
    matrix, file = torch.randn(9, 4), tmp_path / "model.safetensors"
    write(file, {"before": torch.ones(3, dtype=torch.uint8), "a": matrix}, in_file.pieces)
    shards = Shards([file])
    for index in ([3], [8, 0, 1, 2, 7, 7, 6, 5], [], list(range(9)), [4, 4, 5, 6]):
        for dtype in (torch.float32, torch.bfloat16):
            out = torch.empty(len(index), 4, dtype=dtype)
            shards.rows("a", torch.tensor(index, dtype=torch.int64), out)
            assert torch.equal(out, matrix[index].to(dtype))
    for index in (-1, 9):
        with pytest.raises(IndexError, match="a has the rows 0 to 8"):
            shards.rows("a", torch.tensor([index]), torch.empty(1, 4))
    with pytest.raises(UserError, match=r"a is \[9, 4\], and the configuration says \[9, 5\]"):
        shards.rows("a", torch.tensor([0]), torch.empty(1, 5))
    os.truncate(file, file.stat().st_size - 40)
    with pytest.raises(UserError, match="ends within a"):
        shards.rows("a", torch.tensor([0, 8]), torch.empty(2, 4))


def test_a_file_written_in_pieces_is_what_safetensors_reads(tmp_path):
    given = {
        "odd": torch.tensor([True, False, True]),
        "scalar": torch.tensor(3.0),
        "half": torch.randn(5, 3).bfloat16(),
        "turned": torch.randn(4, 6).T,
        "empty": torch.empty(0, 4),
        "long": torch.arange(5),
    }
    write(tmp_path / "a.safetensors", given, lambda tensor: tensor.split(2) if tensor.dim() else [tensor])
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == given.keys()
    assert all(
        torch.equal(found[name], given[name]) and found[name].dtype == given[name].dtype for name in given
    )
    starts = {
        name: entry.start % entry.dtype.itemsize
        for name, entry in Shards([tmp_path / "a.safetensors"]).entries.items()
    }
    assert set(starts.values()) == {0}


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
from tprune.pipelines import memory
from tprune.progress import Progress
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
