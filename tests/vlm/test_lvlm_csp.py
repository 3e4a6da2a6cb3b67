"""LVLM_CSP against its description, layer by layer: few image tokens, then all, then the best."""

import torch

import tprune
from tests.vlm.tiny import IMAGE, tiny
from tprune.models.prompts import noise_prompts
from tprune.models.signals import attention_of
from tprune.models.taps import Capture


@torch.no_grad()
def run(model, layers, hidden, places):
    """Some decoder layers over the tokens that stand at `places` [T] of the prompt."""
    rope = model.model.language_model.rotary_emb(hidden, places[None])
    for layer in layers:
        output = layer(hidden, attention_mask=None, position_ids=places[None], position_embeddings=rope)
        hidden = output[0] if isinstance(output, tuple) else output
    return hidden


@torch.no_grad()
def test_few_take_part_then_all_with_the_values_they_had_then_the_best():
    model = tiny("llava")
    decoder, inputs = model.model.language_model, noise_prompts(model, 1, 0)
    image = (inputs["input_ids"][0] == IMAGE).nonzero().flatten()
    text = (inputs["input_ids"][0] != IMAGE).nonzero().flatten()
    with tprune.prune(model, "vlm/lvlm-csp", clustered=0.25, pruned=0.25) as handle:
        output = model(**inputs, use_cache=True)
        assert [row["tokens"] for row in handle.per_layer()] == [4, 16, 4, 4]
        held = [layer.keys.shape[2] for layer in output.past_key_values.layers]
        assert held == [len(text) + count for count in (4, 16, 4, 4)]

    everything = torch.arange(len(image) + len(text))
    hidden = model(**inputs, output_hidden_states=True).hidden_states[0]
    few = torch.cat([image[::4], text]).sort().values
    hidden[:, few] = run(model, decoder.layers[:1], hidden[:, few], few)
    capture = Capture([attention_of(decoder.layers[1])])
    hidden = run(model, decoder.layers[1:2], hidden, everything)
    [call] = capture.calls[attention_of(decoder.layers[1])]
    capture.remove()
    logits = call.query[0, :, -1:] @ call.key[0].repeat_interleave(2, 0).transpose(1, 2) * call.scale
    paid = logits.softmax(-1).mean(0)[0, image]
    left = torch.cat([image[paid.topk(4).indices], text]).sort().values
    hidden = run(model, decoder.layers[2:], hidden[:, left], left)
    expected = model.lm_head(decoder.norm(hidden))[0, -1]
    assert torch.allclose(output.logits[0, -1], expected, atol=1e-4)
