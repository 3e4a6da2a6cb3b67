"""Passages of a trace that its end does not look at leave, and the asking leaves nothing behind."""

import pytest
import torch
from transformers import DynamicCache

import tprune
from tests.decoders import decoder, tokens
from tests.llm_weights import tiny
from tests.test_cli import call
from tprune import artifact
from tprune.errors import UserError
from tprune.methods import registry
from tprune.methods.cache_view import LayerView
from tprune.models.probe import Probing

TOKENIZER = tiny.tokenizer()
PROMPT, EVERY = 40, 8


def prune(model, keep=0.75, **settings):
    settings = {"every": EVERY, "recent": 2, "instruction": "stop.", "words": ("W",)} | settings
    return tprune.prune(model, "think-clearly", keep=keep, tokenizer=TOKENIZER, **settings)


def start(probed, passage, count, recent=0):
    """The slots that stay in one layer of one key-value head."""
    length = len(passage)
    states, places = torch.zeros(1, 1, length, 4), torch.arange(length)[None, None]
    view = LayerView(0, 1, None, states, states, places, {})
    view.probed, view.passage = torch.tensor([[probed]]), torch.tensor([passage])
    method = registry.build("think-clearly", "llm-context", {"recent": recent})
    return method.start(view, count).index[0, 0].tolist()


def test_the_passage_of_the_lowest_mean_leaves_first_and_in_it_the_lowest_tokens():
    probed = [0.3, 0.3, 0.1, 0.9, 0.2, 0.1, 0.0, 0.5]
    passage = [0, 0, 1, 1, 2, 2, 2, 3]
    assert start(probed, passage, 8) == list(range(8))
    assert start(probed, passage, 6) == [0, 1, 2, 3, 4, 7]
    assert start(probed, passage, 4) == [0, 2, 3, 7]  # of two equals the first
    assert start(probed, passage, 3) == [2, 3, 7]


def test_the_latest_entries_and_the_last_passage_stay_before_all_others():
    probed, passage = [0.9, 0.9, 0.0, 0.0, 0.1, 0.0], [0, 0, 1, 1, 1, 2]
    assert start(probed, passage, 2, recent=2) == [4, 5]
    assert start(probed, passage, 3, recent=0) == [0, 1, 5]


def test_what_stands_before_the_trace_never_leaves():
    assert start([0.0, 0.0, 0.0, 0.9, 0.9], [-1, -1, -1, 0, 1], 2) == [0, 1, 2]


def dense_attention(model, ids):
    """What the last of all tokens pays in every layer, mean over heads."""
    model.set_attn_implementation("eager")
    paid = [layer[:, :, -1].mean(1) for layer in model(ids, output_attentions=True).attentions]
    model.set_attn_implementation("sdpa")
    return paid


def test_what_leaves_behind_a_prompt_is_what_the_instruction_s_last_token_ignores():
    model, ids = decoder(), tokens(2, PROMPT)
    asked = torch.tensor([TOKENIZER("stop.", add_special_tokens=False)["input_ids"]] * 2)
    paid = [row[:, :PROMPT] for row in dense_attention(model, torch.cat([ids, asked], dim=1))]
    with prune(model, keep=0.5, words=("a",), recent=0) as handle:
        cache = model(ids).past_key_values
        passages = handle.compression._passages(ids)
    method = registry.build("think-clearly", "llm-context", {"recent": 0})
    for layer, row in zip(cache.layers, paid, strict=True):
        states, places = torch.zeros(2, 2, PROMPT, 4), torch.arange(PROMPT).expand(2, 2, -1)
        view = LayerView(0, 1, None, states, states, places, {}, probed=row.unsqueeze(1), passage=passages)
        assert torch.equal(layer.places, method.start(view, PROMPT // 2).index)


def test_what_is_heard_of_a_padded_row_is_what_is_heard_of_it_alone(monkeypatch):
    """Through layers with a sliding window too, which are not ours."""
    model, ids, gap, heard = decoder("gemma2"), tokens(2, PROMPT), PROMPT - 6, []
    ask = Probing._ask
    monkeypatch.setattr(Probing, "_ask", lambda *args: heard.append(ask(*args)) or heard[-1])
    mask = torch.ones_like(ids)
    mask[1, :gap] = 0
    with prune(model, instruction="s.", positions="original"):
        model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0))
        model(ids[1:, gap:])
    together, alone = (layers[1] for layers in heard)
    assert torch.allclose(together[1:, :, gap:], alone, atol=1e-5)


def test_an_asking_that_evicts_nothing_changes_no_token_and_no_cache():
    model, ids = decoder(), tokens(1, PROMPT)
    given = {"max_new_tokens": 3 * EVERY, "do_sample": True, "return_dict_in_generate": True}

    def generated():
        torch.manual_seed(0)
        return model.generate(ids, past_key_values=DynamicCache(config=model.config), **given)

    dense = generated()
    with prune(model, keep=1.0):
        asked = generated()
    assert torch.equal(asked.sequences, dense.sequences)
    for one, other in zip(asked.past_key_values.layers, dense.past_key_values.layers, strict=True):
        assert torch.equal(one.keys, other.keys)


def test_the_trace_is_pruned_again_at_every_step_to_its_part_of_all_tokens():
    model, ids, coming = decoder(), tokens(1, PROMPT), tokens(1, 2 * EVERY, seed=2)
    held = []
    with prune(model):
        cache = model(ids).past_key_values
        for token in coming.split(1, dim=1):
            model(token, past_key_values=cache)
            held.append(cache.layers[0].keys.shape[2])
    first = round(0.75 * PROMPT)
    assert held[: EVERY - 1] == list(range(first + 1, first + EVERY))
    assert held[EVERY - 1] == round(0.75 * (PROMPT + EVERY))
    assert held[-1] == round(0.75 * (PROMPT + 2 * EVERY))


def test_nothing_before_the_opening_token_leaves():
    model, ids = decoder(), tokens(1, PROMPT)
    opening = TOKENIZER.convert_ids_to_tokens(int(ids[0, 30]))
    ids[0, 31:][ids[0, 31:] == ids[0, 30]] += 1
    with prune(model, keep=0.5, opening=opening):
        places = model(ids).past_key_values.layers[0].places
    assert places.flatten().unique().tolist() == list(range(31))


def test_what_is_written_gives_the_same_outputs_again_and_is_timed(text, folder, tmp_path):
    asked = [
        "llm-context",
        "--method",
        "think-clearly",
        "--keep",
        "0.5",
        "--set",
        "instruction=stop.",
        folder,
    ]
    call(*asked, "--length", 96, "--data", text, "--out", tmp_path / "out", "--quiet")
    model, probe = tprune.load(tmp_path / "out"), artifact.read_tensors(tmp_path / "out" / artifact.PROBE)
    with torch.no_grad():
        cache = model(input_ids=probe["input"][:, :72]).past_key_values
        found = model(input_ids=probe["input"][:, 72:], past_key_values=cache).logits
    assert cache.layers[0].keys.shape[2] == 36 + found.shape[1]
    assert torch.allclose(found, probe["output"], atol=1e-4)
    timed = call("bench", folder, *asked[1:-1], "--length", 96, "--rounds", 1, "--json").stdout
    assert '"scoring_prefill"' in timed


def test_without_text_there_is_nothing_to_read():
    model = decoder()
    with pytest.raises(UserError, match="tokenizer"):
        tprune.prune(model, "think-clearly", keep=0.5)
    with prune(model), pytest.raises(UserError, match="input_ids"):
        model(inputs_embeds=torch.zeros(1, 4, 32))
    with pytest.raises(UserError, match="positions original"):
        tprune.prune(model, "think-clearly", keep=0.5, positions="compact", tokenizer=TOKENIZER)
