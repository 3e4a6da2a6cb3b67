"""Tokens and heads that leave from layer to layer, against the cascade computed plainly, head by head."""

import pytest
import torch
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import tprune
from tests.decoders import decoder, tokens
from tprune.core.progressive import largest_of_rows, leading_bits, sharpened
from tprune.errors import UserError
from tprune.methods import registry
from tprune.methods.llm_context.spatten import falling
from tprune.methods.tokens import Shape

LAYERS, PROMPT, HEADS = 6, 24, 4
GIVEN = {"final": 0.3, "heads_final": 0.4}


def schedule():
    """Tokens before and heads in every layer."""
    method = registry.build("spatten", "llm-context", GIVEN)
    shape = Shape(LAYERS, PROMPT - 1, heads=HEADS)
    stages = method.stages(shape, None)
    return [PROMPT - 1, *(stage.count for stage in stages)], method.heads(shape, stages)


def cascaded(model, ids, fraction=1.0):
    """The last hidden state of the last token, the tokens and the heads that every layer of Llama has."""
    base, alive, heads = model.model, list(range(PROMPT)), list(range(HEADS))
    hidden, seen = base.embed_tokens(ids), []
    worth, size = torch.zeros(PROMPT), torch.zeros(HEADS)
    for layer, (count, left) in enumerate(zip(*schedule(), strict=True)):
        keep = sorted(alive[:-1], key=lambda token: (-worth[token].item(), token))[:count]
        keep = sorted([*keep, PROMPT - 1])
        hidden = hidden[:, [alive.index(token) for token in keep]]
        alive = keep
        heads = sorted(sorted(heads, key=lambda head: -size[head].item())[:left])
        seen.append((list(alive), list(heads)))
        block = base.layers[layer]
        attention, normed = block.self_attn, block.input_layernorm(hidden)
        query, key, value = (
            p(normed).view(1, len(alive), -1, attention.head_dim).transpose(1, 2)
            for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *base.rotary_emb(hidden, torch.tensor([alive])))
        read = torch.zeros(len(alive), HEADS, attention.head_dim)
        future = torch.ones(len(alive), len(alive)).triu(1).bool()
        for head in heads:
            logits = query[0, head] @ key[0, head // 2].T * attention.scaling
            paid = logits.masked_fill(future, -torch.inf).softmax(-1)
            worth[alive] += paid.sum(0)
            if fraction < 1:
                places = paid.topk(-int(-len(alive) * fraction // 1)).indices
                paid = torch.zeros_like(paid).scatter(1, places, paid.gather(1, places))
            read[:, head] = paid @ value[0, head // 2]
            size[head] += read[:, head].abs().sum()
        hidden = hidden + attention.o_proj(read.flatten(1))[None]
        hidden = hidden + block.mlp(block.post_attention_layernorm(hidden))
    return base.norm(hidden)[0, -1], seen


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_tokens_and_heads_leave_as_in_the_paper(fraction):
    model, ids = decoder(num_hidden_layers=LAYERS), tokens(1, PROMPT)
    expected, seen = cascaded(model, ids, fraction)
    with tprune.prune(model, "spatten", values=fraction, **GIVEN):
        output = model.model(ids, past_key_values=DynamicCache(config=model.config))
    track = output.past_key_values.tprune_track
    for layer, (alive, heads) in enumerate(seen):
        kept = track.at(layer)
        assert (list(range(PROMPT)) if kept is None else kept.index[0].tolist()) == alive
        assert track.heads[layer][0].nonzero().flatten().tolist() == heads
    assert torch.allclose(output.last_hidden_state[0, -1], expected, atol=1e-4)
    assert len(seen[-1][1]) < HEADS
    assert all(set(late[0]) <= set(early[0]) for early, late in zip(seen, seen[1:], strict=False))


def test_later_tokens_use_the_heads_that_are_left():
    model, ids = decoder(num_hidden_layers=LAYERS), tokens(1, PROMPT + 1)
    read = []

    def keep(module, args):
        read.append(args[0].view(1, -1, HEADS, 8))

    with tprune.prune(model, "spatten", **GIVEN):
        cache = model(ids[:, :PROMPT]).past_key_values
        hook = model.model.layers[-1].self_attn.o_proj.register_forward_pre_hook(keep)
        model(ids[:, PROMPT:], past_key_values=cache)
        hook.remove()
        left = cache.tprune_track.heads[LAYERS - 1]
    assert not left.all()
    assert torch.equal(read[0].abs().sum((1, 3)) > 0, left)


def test_the_schedule_is_that_of_ltp_s_code_for_twelve_layers():
    # 1.0 for three layers, then equal steps, the first of them at the fourth.
    assert falling(0.1, 12) == pytest.approx([1, 1, 1, *(1 - 0.1 * step for step in range(1, 10))])
    assert falling(0.5, 30)[4:6] == pytest.approx([1, 0.98])


def test_bits_that_are_read_first_are_the_leading_ones_of_all():
    x = torch.linspace(-1, 1, 21).view(1, 1, 7, 3)
    whole = leading_bits(x, 8, 0) * 127
    assert torch.allclose(whole, (x * 127).round(), atol=1e-4)
    assert torch.allclose(leading_bits(x, 8, 4) * 127, (whole.round() / 16).floor() * 16, atol=1e-4)
    assert torch.allclose(leading_bits(x, 24, 0), x, atol=1e-6)


def test_only_flat_rows_are_read_again():
    rough, fine = torch.tensor([[[[0.9, 0.1], [0.5, 0.5]]]]), torch.tensor([[[[0.8, 0.2], [0.4, 0.6]]]])
    assert torch.equal(sharpened(rough, fine, 0.6), torch.tensor([[[[0.9, 0.1], [0.4, 0.6]]]]))


def test_rows_keep_their_largest_entries_as_they_are():
    row = torch.tensor([[0.1, 0.4, 0.3, 0.2]])
    assert torch.equal(largest_of_rows(row, 0.5), torch.tensor([[0.0, 0.4, 0.3, 0.0]]))
    assert torch.equal(largest_of_rows(row, 1.0), row)


def test_many_bits_are_the_unquantised_method_and_few_are_not():
    model, ids = decoder(num_hidden_layers=LAYERS), tokens(1, PROMPT)
    found = {}
    for bits in ((), (12, 12), (2, 8), (2, 0)):
        with tprune.prune(model, "spatten", bits=bits, flat=1.0, **GIVEN):
            found[bits] = model(ids).logits[0, -1]
    assert torch.allclose(found[12, 12], found[()], atol=1e-3)
    assert (found[2, 8] - found[()]).norm() < (found[2, 0] - found[()]).norm() / 3
    with pytest.raises(UserError, match="bits=8: expected two numbers"):
        registry.build("spatten", "llm-context", {"bits": "8"})
