"""What a pruned cache takes of transformers: rotary embeddings of every kind, both kernels, shared configurations."""

import copy

import pytest
import torch
import transformers

import tprune
from tests.decoders import COMMON, decoder, tokens
from tprune.errors import UserError
from tprune.models.rope import Rotation

PROMPT = 64
ROPES = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    | {"original_max_position_embeddings": 64},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
}


def rotating(kind, **more):
    """A decoder with this kind of RoPE."""
    return decoder(rope_parameters={"rope_type": kind, "rope_theta": 10_000.0} | more)


@pytest.mark.parametrize("kind", ROPES)
def test_a_key_turned_on_is_the_key_rotated_at_its_new_position(kind):
    rotation = Rotation(rotating(kind, **ROPES[kind]))
    keys = torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    place, shift = torch.arange(5)[None] + 3, torch.tensor([7, 7, 0, 20, 1])
    turned = rotation.turn(rotation.rotate(keys, place, None), shift.expand(1, 2, 5), None)
    assert torch.allclose(turned, rotation.rotate(keys, place + shift, None), atol=1e-5)


def test_angles_that_are_held_are_those_asked_for_and_never_many(monkeypatch):
    """Stretches that grow, of rows alike or not, in another type, in and out of inference mode."""
    monkeypatch.setattr("tprune.models.rope.KNOWN", 12 * 8)
    rotation = Rotation(rotating("default"))
    keys = torch.randn(2, 2, 12, 8, generator=torch.Generator().manual_seed(0))
    for first, count, apart, dtype in [
        (0, 4, 0, torch.float32),
        (0, 6, 0, torch.float32),
        (6, 6, 0, torch.float32),
        (0, 6, 3, torch.float32),
        (0, 6, 0, torch.bfloat16),
        (20, 12, 5, torch.float32),
    ]:
        place = torch.arange(first, first + count) + torch.tensor([[0], [apart]])
        for inference in (True, False, False):
            with torch.inference_mode(inference):
                some = keys[:, :, :count].to(dtype, copy=True)
                found = rotation.rotate(some, place.clone(), None)
                expected = rotation.apply(some, some, *rotation.embedding(some, place))[1]
            assert torch.equal(found, expected)
        held = [cos for _, cos, _ in rotation._rotated.values()]
        assert len(held) == 1 or sum(cos.numel() for cos in held) <= 12 * 8
    some = keys.clone().requires_grad_()
    rotation.rotate(some, place, None).sum().backward()
    assert some.grad.isfinite().all()


def test_a_rope_that_changes_with_the_length_is_refused_for_compact_positions_alone():
    model, ids = rotating("dynamic", factor=2.0), tokens(1, PROMPT)
    with pytest.raises(UserError, match="change with the length"):
        tprune.prune(model, "streaming-llm", keep=0.5)
    with tprune.prune(model, "streaming-llm", keep=0.5, positions="original"):
        cache = model(ids).past_key_values
        assert model(ids[:, :2], past_key_values=cache).logits.isfinite().all()


def test_layers_of_different_lengths_are_read_alike_by_both_kernels():
    ids, coming, found = tokens(2, PROMPT), tokens(2, 3, seed=2), []
    for kernel in ("sdpa", "eager"):
        model = decoder(attn_implementation=kernel)
        with tprune.prune(model, "snapkv", keep=0.5, pyramid=1.5, window=8):
            cache = model(ids).past_key_values
            assert [layer.length for layer in cache.layers] == [43, 32, 21]
            other = copy.deepcopy(cache)
            at_once = model(coming, past_key_values=cache).logits
            singly = [model(coming[:, i : i + 1], past_key_values=other).logits for i in range(3)]
        assert torch.allclose(at_once, torch.cat(singly, dim=1), atol=1e-4)
        found.append(at_once)
    assert torch.allclose(*found, atol=1e-4)


def test_a_model_of_the_same_configuration_object_is_left_alone():
    config = transformers.LlamaConfig(**COMMON)
    one, other = (transformers.LlamaForCausalLM(config).eval() for _ in range(2))
    assert one.config is other.config
    kernel, ids = config._attn_implementation, tokens(1, PROMPT)
    dense = other(ids).logits
    with tprune.prune(one, "h2o", keep=0.5):
        cache = other(ids).past_key_values
        assert one(ids).past_key_values.layers[0].keys.shape[2] == PROMPT // 2
        assert cache.layers[0].keys.shape[2] == PROMPT
        assert torch.equal(other(ids).logits, dense)
        assert config._attn_implementation == kernel
