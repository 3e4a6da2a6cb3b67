"""Calibration holds one buffer of activations, and no statistics longer than they are read."""

import pytest
import torch

from tests.decoders import decoder, tokens
from tests.llm_weights.tiny import prune
from tprune.models.blocks import find_decoder
from tprune.models.calibrate import Stream, rows_at_once


@pytest.mark.parametrize(
    ("batch", "length", "device", "rows"),
    [(8, 256, "cpu", 2), (8, 24, "cpu", 8), (8, 2048, "cpu", 1), (8, 512, "cuda", 8), (16, 512, "cuda", 8)],
)
def test_long_sequences_go_through_a_block_few_at_a_time(batch, length, device, rows):
    assert rows_at_once(batch, length, device) == rows


def test_the_stream_starts_with_the_embedded_tokens_and_ends_with_what_the_last_block_gives():
    model, ids, out = decoder(), tokens(5, 20), []
    model.model.layers[-1].register_forward_hook(lambda module, given, output: out.append(output))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    stream = Stream(find_decoder(model), ids, batch_size=2)
    assert torch.equal(stream.hidden, model.model.embed_tokens(ids))
    for index in range(len(model.model.layers)):
        stream.advance(index)
    assert torch.allclose(stream.hidden, out[0], atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "phi3", "mixtral"])
def test_statistics_are_let_go_when_the_last_matrix_that_reads_them_is_pruned(name, text, monkeypatch):
    gathered, gather = [], Stream.gather

    def remembered(self, *given):
        gathered.append(gather(self, *given))
        assert gathered[-1]
        return gathered[-1]

    monkeypatch.setattr(Stream, "gather", remembered)
    model = decoder(name)
    prune(model, "sparsegpt", text, sparsity=0.5)
    assert gathered == [{}] * len(find_decoder(model).blocks)
