"""The methods against what the authors' code (lazyllm: a public port) gives on the same inputs."""

import pytest
import torch
import transformers

from tests.decoders import decoder
from tests.golden_values import golden
from tprune.core.attending import attention_rows, mean_over_group, pool_neighbours, window_attention
from tprune.core.budget import Site, Stage
from tprune.core.cache import stack_rows
from tprune.core.ranks import rank
from tprune.core.select import representatives
from tprune.core.sparse import Sparse
from tprune.methods import registry
from tprune.methods.attention import Attention
from tprune.methods.cache_view import LayerView, Turning
from tprune.methods.llm_context.keydiff import distinctness
from tprune.methods.llm_context.kvcrush import anchor_of
from tprune.methods.llm_context.lagkv import scatter
from tprune.methods.token_view import TokenView
from tprune.models.cache_layer import Owner, PrunedLayer
from tprune.models.decoder import DecoderDriver
from tprune.models.held import biased
from tprune.models.prompt_cache import hold
from tprune.models.room import Arrival, make_room
from tprune.models.rope import Rotation
from tprune.pipelines.context_prompts import prompt_tokens


class Played:
    """A method at work on queries, keys and values that are given, one layer, no model."""

    def __init__(self, method, query, key, value, rotation=None):
        self.method, self.query, self.key, self.value, self.rotation = method, query, key, value, rotation
        self.layer = PrunedLayer(Owner())
        self.scale = query.shape[-1] ** -0.5

    def view(self, attention, state):
        layer = self.layer
        return LayerView(0, 1, attention, layer.keys, layer.values, layer.places, state)

    def start(self, length, count):
        self.layer.update(self.key[:, :, :length], self.value[:, :, :length])
        attention = Attention(
            self.query[:, :, :length], self.layer.keys, self.layer.values, self.scale, causal=True
        )
        view = self.view(attention, {})
        edit = self.method.start(view, count)
        hold(self.layer, [view], [edit])
        self.layer.started, self.layer.limit = True, count
        if self.rotation is not None:
            self.layer.shift_to_compact(self.turn)

    def turn(self, keys, shift):
        return self.rotation.turn(keys, shift, None)

    def step(self, token):
        """Attention output [H, d] of one more token, and what it pushes out."""
        one = slice(token, token + 1)
        self.layer.update(self.key[:, :, one], self.value[:, :, one])
        layer = self.layer
        query = self.query[:, :, one]
        bias = biased(None, layer, query)
        attention = Attention(query, layer.keys, layer.values, self.scale, bias=bias)
        rows = attention.rows()
        output = rows @ layer.values.repeat_interleave(rows.shape[1] // layer.values.shape[1], dim=1)
        make_room(self.method, [Arrival(layer, attention, self.turn if self.rotation else None)])
        return output[0, :, 0]


@pytest.mark.parametrize("case", ["drop_h4_r4", "drop_h6_r2", "drop_h2_r8"])
def test_h2o_keeps_scores_and_answers_as_the_authors_real_drop(case):
    tensors, facts = golden("llm-context", "h2o")
    sizes = facts["settings"]["cases"][case]
    count = sizes["hh_size"] + sizes["recent_size"]
    method = registry.build("h2o", "llm-context", {"recent": sizes["recent_size"] / count})
    played = Played(method, tensors["q"], tensors["k"], tensors["v"])
    played.start(facts["settings"]["prompt"], count)
    for name in ["prefill", *(f"step{i}" for i in range(facts["settings"]["steps"]))]:
        if name != "prefill":
            output = played.step(facts["settings"]["prompt"] + int(name[4:]))
            assert torch.allclose(output, tensors[f"{case}.{name}.out"], atol=1e-5)
        kept, order = played.layer.places[0].sort()
        assert torch.equal(kept, tensors[f"{case}.{name}.kept"])
        received = played.layer.state["received"][0].gather(1, order)
        assert torch.allclose(received, tensors[f"{case}.{name}.score"], atol=1e-5)


@pytest.mark.parametrize("case", ["h2o_vatp", "h2o_vatp_sink0"])
def test_vatp_lets_the_next_query_see_what_the_authors_let_it_see(case):
    tensors, facts = golden("llm-context", "vatp")
    sizes = facts["settings"]["cases"][case]
    count = sizes["heavy_budget"] + sizes["recent_budget"]
    settings = {"sink": sizes["sink_len"], "recent": (sizes["recent_budget"] + 1e-6) / count}
    played = Played(registry.build("vatp", "llm-context", settings), tensors["q"], tensors["k"], tensors["v"])
    played.start(facts["settings"]["prompt"], count)
    for name in ["prefill", *(f"step{i}" for i in range(facts["settings"]["steps"]))]:
        if name != "prefill":
            output = played.step(facts["settings"]["prompt"] + int(name[4:]))
            assert torch.allclose(output.flatten(), tensors[f"{case}.{name}.out"], atol=1e-5)
        seen = tensors[f"{case}.{name}.mask_next"][:, :-1].bool()
        expected = torch.stack([row.nonzero()[:, 0] for row in seen])
        assert torch.equal(played.layer.places[0].sort().values, expected)


@pytest.mark.parametrize("case", golden("llm-context", "a2sf")[1]["settings"]["cases"])
def test_a2sf_sums_and_keeps_what_the_authors_do(case):
    tensors, facts = golden("llm-context", "a2sf")
    sizes = facts["settings"]["cases"][case]
    settings = {"forgetting": sizes["forgetting_factor"], "recent": sizes["recent_budget"]}
    played = Played(registry.build("a2sf", "llm-context", settings), tensors["q"], tensors["k"], tensors["v"])
    played.start(40, sizes["total_budget"])
    kept = tensors[f"{case}.kept"]
    assert torch.equal(played.layer.places[0], kept)
    expected = tensors[f"{case}.score"].gather(1, kept)
    assert torch.allclose(played.layer.state["received"][0], expected, atol=1e-5)


@pytest.mark.parametrize("case", golden("llm-context", "zeromerge")[1]["settings"]["cases"])
def test_zeromerge_merges_scores_and_answers_as_the_authors(case):
    tensors, facts = golden("llm-context", "zeromerge")
    sizes = facts["settings"]["cases"][case]
    settings = {
        "tail": sizes["cache_tail"],
        "means": sizes["cache_dense"],
        "scale": sizes["scale_factor"],
        "forgetting": sizes["shrink_factor"],
        "metric": sizes["metric"][:3].removesuffix("_"),
        "update": sizes["score_update"],
    }
    method = registry.build("zeromerge", "llm-context", settings)
    played = Played(method, tensors["q"], tensors["k"], tensors["v"])
    played.start(facts["settings"]["prompt"], sizes["cache_budget"])
    for name in ["prefill", *(f"step{i}" for i in range(facts["settings"]["steps"]))]:
        if name != "prefill":
            output = played.step(facts["settings"]["prompt"] + int(name[4:]))
            assert torch.allclose(output, tensors[f"{case}.{name}.out"], atol=1e-5)
        state = played.layer.state
        assert torch.equal(state["others"][0].sort(-1).values + 1, tensors[f"{case}.{name}.mass"])
        assert torch.allclose(state["score"][0].sort(-1).values, tensors[f"{case}.{name}.score"], atol=1e-5)
        assert torch.allclose(played.layer.keys[0].sum(1), tensors[f"{case}.{name}.keys"], atol=1e-4)


@pytest.mark.parametrize("case", golden("llm-context", "kvcrush")[1]["settings"]["cases"])
def test_kvcrush_represents_patterns_as_the_public_code_represents_pages(case):
    tensors, facts = golden("llm-context", "kvcrush")
    sizes = facts["settings"]["cases"][case]
    scores, evicted = tensors[f"{case}.scores"], tensors[f"{case}.evicted"]
    bits = torch.zeros(len(scores), dtype=torch.bool)
    bits[scores.argsort(descending=True)[: len(scores) // 2]] = True
    bits = bits.view(1, sizes["blocks"], sizes["block"])
    free = torch.zeros(1, sizes["blocks"], dtype=torch.bool)
    free[:, evicted] = True
    anchor = anchor_of(sizes["anchor"], bits, None, 0)
    kept = representatives(bits, anchor, free, sizes["budget"])
    assert torch.equal(kept[0], tensors[f"{case}.kept"])


@pytest.mark.parametrize("case", golden("llm-context", "mustafar")[1]["settings"]["cases"])
def test_mustafar_stores_the_elements_that_the_authors_leave(case):
    tensors, facts = golden("llm-context", "mustafar")
    sizes = facts["settings"]["cases"][case]
    part = Sparse.of(tensors["k"], tensors["v"], (sizes["keys"], sizes["values"]))
    key, value, visible = next(part.tiles())
    assert visible is None
    assert torch.equal(key, tensors[f"{case}.key"])
    assert torch.equal(value, tensors[f"{case}.value"])


@pytest.mark.parametrize("case", golden("llm-context", "agile-quant")[1]["settings"]["cases"])
def test_agile_quant_removes_what_the_authors_remove(case):
    tensors, facts = golden("llm-context", "agile-quant")
    sizes, attention = facts["settings"]["cases"][case], tensors["attention"][None]
    length = attention.shape[2]
    method = registry.build("agile-quant", "llm-context", {"conventional": sizes["conventional"]})
    every = torch.ones(1, length, dtype=torch.bool)
    seen = Attention(torch.zeros(1, attention.shape[1], length, 1), None, None, 1.0, map=attention)
    view = TokenView(torch.zeros(1, length, 1), every, attention=seen)
    kept = method.reduce(Site(1), view, length - sizes["removed"], {}).index[0]
    gone = sorted(set(range(length)) - set(kept.tolist()))
    assert gone == tensors[f"{case}.removed"].tolist()


SNAPKV = golden("llm-context", "snapkv")[1]["settings"]["cases"]


@pytest.mark.parametrize("case", [name for name in SNAPKV if name.startswith("w")])
def test_snapkv_keeps_per_query_head_what_the_authors_keep(case):
    tensors, _ = golden("llm-context", "snapkv")
    facts = SNAPKV[case]
    key = tensors["k"].repeat_interleave(3, dim=1)
    settings = {
        "window": facts["window_size"],
        "kernel": facts["kernel_size"],
        "pooling": facts["pooling"][:3],
    }
    played = Played(registry.build("snapkv", "llm-context", settings), tensors["q"], key, key)
    played.start(40, facts["kept"])
    kept, authors = played.layer.places, tensors[f"{case}.index"].sort(-1).values
    if facts["pooling"] == "maxpool":
        # Neighbours of a maximum tie exactly, and the authors' topk breaks ties at random: compare what was kept.
        votes = window_attention(tensors["q"], key, 8**-0.5, facts["window_size"])
        votes = torch.nn.functional.pad(
            pool_neighbours(votes, facts["kernel_size"], "max"), (0, facts["window_size"])
        )
        kept, authors = (votes.gather(2, index).sort(-1).values for index in (kept, authors))
    assert torch.equal(kept, authors)


@pytest.mark.parametrize("case", [name for name in SNAPKV if name.startswith("kvpress")])
def test_snapkv_keeps_per_key_value_head_what_kvpress_keeps(case):
    tensors, _ = golden("llm-context", "snapkv")
    facts = SNAPKV[case]
    window, kernel = facts["window_size"], facts["kernel_size"]
    votes = window_attention(tensors["q"], tensors["k"], 8**-0.5, window) / window
    votes = mean_over_group(pool_neighbours(votes, kernel, "avg"), 2)
    assert torch.allclose(votes, tensors[f"{case}.score"], atol=1e-6)
    method = registry.build("snapkv", "llm-context", {"window": window, "kernel": kernel})
    played = Played(method, tensors["q"], tensors["k"], tensors["k"])
    played.start(40, facts["kept"])
    assert torch.equal(played.layer.places, tensors[f"{case}.kept"])


@pytest.mark.parametrize("case", ["call_T20", "call_T12", "call_T13", "call_sink0"])
def test_streaming_llm_keeps_the_authors_sinks_and_window(case):
    tensors, facts = golden("llm-context", "streaming-llm")
    sizes = facts["settings"]["cases"][case]
    method = registry.build("streaming-llm", "llm-context", {"sink": sizes["start_size"]})
    any_tensor = torch.zeros(1, 1, sizes["T"], 4)
    played = Played(method, any_tensor, any_tensor, any_tensor)
    played.start(sizes["T"], min(sizes["T"], sizes["start_size"] + sizes["recent_size"]))
    assert torch.equal(played.layer.places[0, 0], tensors[case])


def test_streaming_llm_answers_as_with_positions_inside_the_cache():
    tensors, facts = golden("llm-context", "streaming-llm")
    sizes = facts["settings"]["cases"]["rolling"]
    rotation = Rotation(decoder("llama"))
    count, length = sizes["start_size"] + sizes["recent_size"], tensors["rolling.q"].shape[2]

    def rotated(x):
        return rotation.turn(x, torch.arange(length).expand(x.shape[:3]), None)

    query, key = rotated(tensors["rolling.q"]), rotated(tensors["rolling.k"])
    method = registry.build("streaming-llm", "llm-context", {"sink": sizes["start_size"]})
    played = Played(method, query, key, tensors["rolling.v"], rotation)
    played.start(count, count)
    expected = tensors["rolling.out"]
    rows = attention_rows(query[:, :, :count], key[:, :, :count], 8**-0.5, causal=True)
    prompt = rows @ tensors["rolling.v"][:, :, :count].repeat_interleave(2, dim=1)
    assert torch.allclose(prompt[0].transpose(0, 1).flatten(1), expected[:count], atol=1e-5)
    for token in range(count, length):
        assert torch.allclose(played.step(token).flatten(), expected[token], atol=1e-5)


LAZYLLM = golden("llm-context", "lazyllm")[1]


@pytest.mark.parametrize("case", LAZYLLM["settings"]["cases"])
def test_lazyllm_sends_on_the_tokens_and_makes_the_logits_of_the_port(case):
    tensors, _ = golden("llm-context", "lazyllm")
    shape = {name: value for name, value in LAZYLLM["settings"]["config"].items() if name != "attn"}
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**shape)).eval().requires_grad_(False)
    weights = {
        name.removeprefix("model."): t.float() for name, t in tensors.items() if name.startswith("model.")
    }
    model.load_state_dict(weights)
    alive = LAZYLLM["settings"]["cases"][case]["alive"]
    stages = [Stage(Site(layer), alive[layer] - 1) for layer in range(1, len(alive))]
    driver = DecoderDriver(
        model, registry.build("lazyllm", "llm-context"), prompt_tokens, lambda count: stages
    )
    cache = transformers.DynamicCache(config=model.config)
    logits = model(tensors["input_ids"], past_key_values=cache).logits[:, -1]
    for layer in range(1, len(alive)):
        assert torch.equal(cache.tprune_track.layers[layer].index[0], tensors[f"{case}.alive{layer}"])
    driver.remove()
    assert torch.allclose(logits, tensors[f"{case}.logits"], atol=1e-4)


def test_rows_of_different_lengths_are_filled_on_the_left():
    rows = [torch.tensor([[[0, 2, 5]]]), torch.tensor([[[1]]])]
    assert stack_rows(rows).tolist() == [[[0, 2, 5]], [[0, 0, 1]]]


KNORM = golden("llm-context", "knorm")[1]["settings"]["cases"]


@pytest.mark.parametrize("case", [*KNORM, "kvpress.kept"])
def test_knorm_keeps_the_entries_that_the_authors_and_kvpress_keep(case):
    tensors, _ = golden("llm-context", "knorm")
    played = Played(registry.build("knorm", "llm-context"), tensors["k"], tensors["k"], tensors["v"])
    played.start(40, tensors[case].shape[2])
    assert torch.equal(played.layer.places, tensors[case])
    assert torch.allclose(
        tensors["kvpress.score"].gather(2, played.layer.places), -played.layer.state["norm"]
    )


@pytest.mark.parametrize("case", ["kept_0.5", "kept_0.75"])
def test_keydiff_keeps_the_entries_that_kvpress_keeps(case):
    tensors, _ = golden("llm-context", "keydiff")
    played = Played(registry.build("keydiff", "llm-context"), tensors["k"], tensors["k"], tensors["k"])
    shrink = tensors["k"].norm(dim=3).reciprocal()
    assert torch.allclose(distinctness(tensors["k"], shrink), tensors["score"], atol=1e-6)
    played.start(40, tensors[case].shape[2])
    assert torch.equal(played.layer.places, tensors[case])


def test_tova_keeps_after_the_prompt_and_every_token_what_the_authors_keep():
    tensors, facts = golden("llm-context", "tova")
    facts = facts["settings"]
    for row in range(2):
        one = (tensors[name][row : row + 1] for name in "qkv")
        played = Played(registry.build("tova", "llm-context"), *one)
        played.start(facts["prompt"], facts["size"])
        for name in ["prefill", *(f"step{step}" for step in range(facts["steps"]))]:
            if name != "prefill":
                played.step(facts["prompt"] + int(name[4:]))
            assert torch.equal(played.layer.places.sort(2).values[0], tensors[f"{name}.kept"][row])


LAGKV = golden("llm-context", "lagkv")[1]["settings"]


@pytest.mark.parametrize("case", LAGKV["cases"])
def test_lagkv_keeps_of_every_chunk_what_the_authors_keep(case):
    tensors, _ = golden("llm-context", "lagkv")
    facts = LAGKV["cases"][case]
    settings = {"sink": facts["sink_size"], "lag": facts["lag_size"], "value": facts["score_v_ratio"]}
    method = registry.build("lagkv", "llm-context", settings)
    played = Played(method, tensors["k"], tensors["k"], tensors["v"])
    played.start(45, facts["kept"])
    assert torch.equal(played.layer.places, tensors[case])


def test_lagkv_ranks_the_entries_of_a_chunk_as_kvpress_does():
    tensors, _ = golden("llm-context", "lagkv")
    sink, lag = LAGKV["kvpress"]["n_sink"], LAGKV["kvpress"]["lag_size"]
    inside = slice(sink, sink + 5 * lag)
    score = sum(scatter(tensors[name][:, :, inside], lag) for name in "kv")
    place = (lag - 1 - rank(score)) / lag
    assert torch.equal(place.flatten(2), tensors["kvpress.score"][:, :, sink : sink + 4 * lag])


EXPECTED = golden("llm-context", "expected-attention")[1]["settings"]["cases"]


@pytest.mark.parametrize("case", EXPECTED)
def test_expected_attention_keeps_what_the_authors_keep(case):
    tensors, _ = golden("llm-context", "expected-attention")
    names = {
        "use_covariance": "covariance",
        "use_vnorm": "values",
        "n_future_positions": "future",
        "n_sink": "sink",
        "epsilon": "epsilon",
    }
    settings = {names[name]: value for name, value in EXPECTED[case].items()}
    method = registry.build("expected-attention", "llm-context", settings)
    rotation = Rotation(decoder("llama", head_dim=8))
    turning = Turning(lambda x, shift: rotation.turn(x, shift, None))
    query, key, value = (tensors[name] for name in "qkv")
    attention = Attention(query, key, value, 8**-0.5, causal=True)
    places = torch.arange(40).expand(2, 2, -1)
    view = LayerView(0, 1, attention, key, value, places, {}, turning=turning)
    assert torch.equal(method.start(view, 20).index, tensors[f"{case}.kept"])
    paid = method.expected(view, key[:, :, method.sink :]) + method.epsilon
    if method.values:
        paid = paid * value[:, :, method.sink :].norm(dim=3)
    assert torch.allclose(paid, tensors[f"{case}.score"][:, :, method.sink :], rtol=1e-4, atol=1e-7)
