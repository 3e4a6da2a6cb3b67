"""Calibration holds one buffer of activations, and no statistics longer than they are read."""

import gc
import weakref

import pytest
import torch

from tests.decoders import decoder, tokens
from tests.llm_weights.tiny import EXPERTS, NAMES, prune
from tprune.core.statistics import Inputs
from tprune.models import pieces
from tprune.models.blocks import find_decoder, is_linear
from tprune.models.calibrate import Stream, rows_at_once, workers_at_once
from tprune.models.inputs import united
from tprune.models.threads import Turns, side_by_side


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


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_workers_gather_what_one_gathers_and_send_on_the_same(name):
    found, ids = find_decoder(decoder(name)), tokens(7, 20)
    alone, several = Stream(found, ids, 2), Stream(found, ids, 2)
    alone.workers, several.workers = 1, 3
    for index in range(2):
        for kind in ("norm", "gram"):
            expected, given = (stream.gather(index, (kind,)) for stream in (alone, several))
            assert list(given) == list(expected)
            assert len(set(given.values())) == len(set(expected.values()))
            for inputs, same in zip(given.values(), expected.values(), strict=True):
                assert (inputs.tokens, inputs.sequences) == (same.tokens, same.sequences)
                found, wanted = (
                    one.result()[kind] if one.tokens else torch.zeros(1) for one in (inputs, same)
                )
                assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-4)
        for stream in (alone, several):
            stream.advance(index)
        assert torch.allclose(several.hidden, alone.hidden, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_workers_take_the_feed_forward_network_in_pieces(name, monkeypatch):
    monkeypatch.setattr(pieces, "TOKENS_IN_PIECE", 8)
    model = decoder(name)
    found, ids = find_decoder(model), tokens(3, 20)
    alone, several = Stream(found, ids, 1), Stream(found, ids, 1)
    alone.workers, several.workers = 1, 2
    seen = set()
    for _, module in model.named_modules():
        if is_linear(module):
            module.register_forward_pre_hook(lambda module, given: seen.add(given[0].shape[-2]))
    for kind in ("norm", "gram"):
        expected, given = (stream.gather(0, (kind,)) for stream in (alone, several))
        for inputs, same in zip(given.values(), expected.values(), strict=True):
            assert (inputs.tokens, inputs.sequences) == (same.tokens, same.sequences)
            assert torch.allclose(inputs.result()[kind], same.result()[kind], rtol=1e-5, atol=1e-4)
    seen.clear()
    for stream in (alone, several):
        stream.advance(0)
    assert torch.allclose(several.hidden, alone.hidden, atol=1e-5)
    # OPT's network is no module of its own, experts take the tokens that are sent to them.
    pieces_seen = seen >= {8, 4} or seen >= {16, 4}
    assert pieces_seen == (name not in (*EXPERTS, "opt"))


def test_a_gram_matrix_of_several_workers_has_the_same_bits_however_fast_they_are(monkeypatch):
    monkeypatch.setattr(pieces, "TOKENS_IN_PIECE", 4)
    found, grams = find_decoder(decoder()), []
    for slow in (0, 1):
        stream, run = Stream(found, tokens(7, 20), 1), Stream.run

        def late(self, index, x, first=0, run=run, slow=slow):
            for _ in range(200 if first % 2 == slow else 0):
                torch.randn(64, 64).mm(torch.randn(64, 64))
            return run(self, index, x, first)

        with monkeypatch.context() as patch:
            patch.setattr(Stream, "run", late)
            stream.workers = 2
            grams.append({name: one.result()["gram"] for name, one in stream.gather(0, ("gram",)).items()})
    assert all(torch.equal(gram, grams[1][name]) for name, gram in grams[0].items())


def test_a_pass_stops_at_its_last_input_from_the_first_batch_on():
    model, ran = decoder(), []
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda *given: ran.append(given))
    stream = Stream(find_decoder(model), tokens(4, 20), 1)
    for workers in (1, 2):
        stream.workers = workers
        stream.gather(0, ("norm",))
    assert all(made.shape[:2] == (1, 2) for _, _, made in ran)  # a trial of whether it takes less memory


@pytest.mark.parametrize("limit", [0.1, 10])
def test_a_network_with_limits_inside_keeps_them_in_pieces(limit, monkeypatch):
    block = decoder().model.layers[0]

    def forward(self, x):
        inner = self.act_fn(self.gate_proj(x).clamp(max=limit)) * self.up_proj(x).clamp(-limit, limit)
        return self.down_proj(inner)

    monkeypatch.setattr(type(block.mlp), "forward", forward)
    x = 300 * torch.randn(1, 300, block.mlp.gate_proj.in_features)
    with torch.no_grad():
        expected = block.mlp(x)
        with pieces.in_pieces(block):
            assert torch.allclose(block.mlp(x), expected, atol=1e-5)


@pytest.mark.parametrize("workers", [2, 7])  # more than there are cores, too
def test_numbered_jobs_pass_a_place_in_order_and_a_failure_keeps_nobody_waiting(workers):
    turns, order = Turns(), []

    def work(worker):
        for number in range(worker, 20, workers):
            with turns.job(number):
                if number != 3:  # not every job comes by
                    with turns.at("place", number):
                        order.append(number)

    side_by_side(work, workers)
    assert order == [number for number in range(20) if number != 3]
    turns = Turns()

    def fail(worker):
        for number in range(worker, 20, workers):
            with turns.job(number), turns.at("place", number):
                if number == 1:
                    raise RuntimeError("job 1")

    with pytest.raises(RuntimeError, match="job 1"):
        side_by_side(fail, workers)


def test_a_stopped_pass_holds_nothing_of_what_it_computed():
    stream = Stream(find_decoder(decoder()), tokens(4, 20), 1)
    stream.workers = 2
    stream.gather(0, ("norm",))
    held = weakref.ref(stream.hidden)
    gc.disable()
    try:
        del stream
        assert held() is None
    finally:
        gc.enable()


def test_the_same_sequences_once_more_go_by_as_many_workers(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    stream = Stream(find_decoder(decoder("llama")), tokens(5, 200), 5)
    again = stream.again()
    assert (again.rows, again.workers) == (stream.rows, stream.workers) == (2, 2)


def test_what_fails_in_a_worker_is_raised_and_the_threads_are_as_before():
    before = torch.get_num_threads()

    def work(worker):
        if worker == 1:
            raise RuntimeError("worker 1")

    for count in (1, 2):
        told = side_by_side(lambda worker: (worker, torch.is_grad_enabled()), count)
        assert told == [(worker, False) for worker in range(count)]
    with pytest.raises(RuntimeError, match="worker 1"):
        side_by_side(work, 2)
    assert torch.get_num_threads() == before


def test_no_more_workers_than_batches_threads_and_tokens_in_memory(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    assert workers_at_once(16, 1, (16, 512), "cpu") == 8
    assert workers_at_once(3, 1, (16, 512), "cpu") == 3
    assert workers_at_once(16, 4, (6, 128), "cpu") == 1
    assert workers_at_once(16, 1, (16, 512), "cuda") == 1


def test_a_module_that_only_some_workers_ran_keeps_what_these_gathered():
    rows = torch.randn(3, 4, 2)
    parts = [{}, {}, {}]
    for part, name, x in ((0, "all", rows[0]), (1, "all", rows[1]), (2, "some", rows[2])):
        parts[part][name] = Inputs(("norm",))
        parts[part][name].add(x)
    found = united(parts)
    assert {name: inputs.tokens for name, inputs in found.items()} == {"all": 8, "some": 4}
    assert torch.allclose(found["all"].result()["norm"], rows[:2].flatten(0, 1).norm(dim=0))
    assert torch.allclose(found["some"].result()["norm"], rows[2].norm(dim=0))
