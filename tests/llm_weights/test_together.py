"""Several processes share the calibration sequences."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from tests.decoders import decoder, tokens
from tests.llm_weights.test_command import SMALL, run
from tests.llm_weights.tiny import tokenizer
from tests.pairs import pair
from tprune import artifact
from tprune.core.statistics import Inputs
from tprune.core.weights import unpack_bits
from tprune.errors import UserError
from tprune.methods import registry
from tprune.models.find import find_blocks
from tprune.models.pair_stream import stream_of
from tprune.models.together import Together
from tprune.pipelines.share import in_parts


@pytest.mark.parametrize("kind", ["decoder", "t5", "bart"])
def test_two_processes_prune_what_one_does_and_one_of_them_writes_it(kind, folder, text, tmp_path):
    one, two, model = tmp_path / "one", tmp_path / "two", folder
    if kind != "decoder":
        model = tmp_path / kind
        pair(kind).save_pretrained(model)
        tokenizer().save_pretrained(model)
    asked = f"--method sparsegpt --sparsity 0.5 --allocate owl {model} --data {text} --no-eval --json".split()
    run(*asked, *SMALL, "--out", one)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = [*launcher, "-m", "tprune.cli", "llm-weights", *asked, *SMALL, "--out", str(two)]
    subprocess.run(words, capture_output=True, text=True, check=True)
    alone, together = (artifact.read_tensors(place / artifact.TENSORS) for place in (one, two))
    assert alone.keys() == together.keys()
    bits = sum(8 * mask.numel() for mask in alone.values())
    apart = sum(
        int(unpack_bits(alone[name] ^ together[name], (8 * alone[name].numel(),)).sum()) for name in alone
    )
    assert apart <= 1e-5 * bits


@pytest.mark.parametrize(
    ("make", "name"),
    [(decoder, "llama"), (decoder, "mixtral"), (decoder, "opt"), (pair, "t5"), (pair, "bart")],
)
def test_statistics_of_parts_are_those_of_the_whole(make, name):
    ids, found = tokens(5, 20), find_blocks(make(name))
    whole, *parts = (
        stream_of(found, part, 2).gather(0, ("norm", "gram")) for part in [ids, *ids.tensor_split(3)]
    )
    for place, one in whole.items():
        joined = Inputs(("norm", "gram"))
        joined.join([part[place].share() for part in parts])
        assert (joined.tokens, joined.sequences) == (one.tokens, one.sequences)
        if one.tokens:
            first, second = joined.result(), one.result()
            assert all(torch.allclose(first[kind], second[kind], rtol=1e-5, atol=1e-6) for kind in second)


def test_parts_that_saw_nothing_do_not_count():
    x = torch.randn(2, 3, 4)
    one, empty = Inputs(("norm", "gram")), Inputs(("norm", "gram"))
    one.add(x)
    alone = Inputs(("norm", "gram"))
    alone.add(x)
    empty.join([Inputs(("norm", "gram")).share(), one.share()])
    assert all(torch.equal(value, alone.result()[name]) for name, value in empty.result().items())


def test_sequences_are_dealt_out_in_order_and_must_be_enough():
    ids = torch.arange(7).unsqueeze(1)
    shares = [Together.share(SimpleNamespace(rank=rank, count=3), ids) for rank in range(3)]
    assert torch.equal(torch.cat(shares), ids)
    with pytest.raises(UserError, match="--calibration 7: 8 processes share the sequences"):
        Together.share(SimpleNamespace(rank=0, count=8), ids)


@pytest.mark.parametrize(
    ("method", "read", "shared"),
    [
        ("wanda", {"norm"}, True),
        ("gblm", {"norm", "gradient"}, True),
        ("wanda", {"norm", "likeness"}, False),
        ("flap", {"norm"}, False),
        ("wanda-pp", {"norm"}, False),
    ],
)
def test_only_sums_over_tokens_are_gathered_in_parts(method, read, shared):
    assert in_parts(registry.load(method, "llm-weights")(), read) == shared
