"""Tokens leaving inside a decoder: the same as hiding them, for every attention pattern, cache and padding."""

import pytest
import torch
import transformers
from transformers import DynamicCache

from tprune.core.budget import Site, Stage
from tprune.errors import UserError
from tprune.methods import registry
from tprune.models.decoder import DecoderDriver
from tprune.models.taps import Capture

BASE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
SLIDING = {"sliding_window": 6}
KINDS = {
    "llama": ("Llama", {}),
    "llama eager": ("Llama", {"attn_implementation": "eager"}),
    "mistral": ("Mistral", SLIDING),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "gemma2": ("Gemma2", {"head_dim": 8} | SLIDING),
    "gemma3": (
        "Gemma3",
        {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"] * 2} | SLIDING,
    ),
    "phi3": ("Phi3", {}),
    "mixtral": ("Mixtral", {}),
    "gpt2": ("GPT2", {}),
    "gpt-neox": ("GPTNeoX", {}),
    "opt": ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
}
LENGTH, IMAGE = 14, slice(3, 11)
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def tiny(kind):
    """A decoder with weights drawn from a fixed seed."""
    name, changes = KINDS[kind]
    transformers.utils.logging.set_verbosity_error()
    config = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")
    base = {**BASE, **changes}
    if name == "GPT2":
        base = {
            "vocab_size": 64,
            "n_embd": 32,
            "n_head": 4,
            "n_layer": 4,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}{'LMHeadModel' if name == 'GPT2' else 'ForCausalLM'}")(
            config(**base)
        )
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model.eval().requires_grad_(False)


def prompts(count=2):
    return torch.randint(3, 64, (count, LENGTH), generator=torch.Generator().manual_seed(0))


def marked(inputs):
    prunable = torch.zeros(inputs["input_ids"].shape, dtype=torch.bool)
    prunable[:, IMAGE] = True
    return prunable


def schedule(count):
    """Six of eight from layer 1 on, four from layer 3 on."""
    return (Stage(Site(1), count * 3 // 4), Stage(Site(3), count // 2)) if count else ()


def driver(model, prunable=marked, stages=schedule, **more):
    return DecoderDriver(model, registry.build("fastv", "vlm"), prunable, stages, **more)


def cache_of(model):
    return DynamicCache(config=model.config.get_text_config())


def hidden_instead(model, tokens, layers, kept):
    """Logits of the dense model when each layer hides, from all, the tokens that `kept` lacks there."""
    core = model.get_decoder()
    types = getattr(model.config, "layer_types", None)
    length = tokens.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    handles = []
    for place, layer in enumerate(layers):
        slots = kept.get(place)
        if slots is None:
            continue
        slides = types[place] == "sliding_attention" if types else model.config.model_type == "mistral"
        seen = causal & causal.triu(1 - 6) if slides else causal
        column = torch.zeros(len(tokens), length, dtype=torch.bool).scatter(1, slots, True)
        seen = seen[None, None] & (column[:, None, None] | torch.eye(length, dtype=torch.bool))
        if core.config._attn_implementation == "eager":
            seen = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)

        def hide(module, args, kwargs, seen=seen):
            names = ("hidden_states", "past_key_values", "attention_mask")[: len(args)]
            if "attention_mask" in names:
                args = (*args[:2], seen, *args[3:])
            else:
                kwargs["attention_mask"] = seen
            return args, kwargs

        handles.append(layer.register_forward_pre_hook(hide, with_kwargs=True))
    logits = model(tokens).logits
    for handle in handles:
        handle.remove()
    return logits


@every_kind
def test_dropping_is_hiding_in_prompt_steps_and_chunk(kind):
    model = tiny(kind)
    tokens = torch.cat([prompts(), prompts()[:, :3]], dim=1)
    work = driver(model)
    layers, cache = work.layers, cache_of(model)
    first = model(tokens[:, :LENGTH], past_key_values=cache, use_cache=True).logits
    kept = {place: cache.tprune_track.at(place) for place in (1, 2, 3)}
    new = torch.arange(LENGTH, LENGTH + 3).expand(2, 3)
    kept = {place: torch.cat([what.index, new], 1) for place, what in kept.items()}
    steps = [
        model(tokens[:, LENGTH + t, None], past_key_values=cache, use_cache=True).logits for t in range(3)
    ]
    cache = cache_of(model)
    model(tokens[:, :LENGTH], past_key_values=cache, use_cache=True)
    chunk = model(tokens[:, LENGTH:], past_key_values=cache, use_cache=True).logits
    assert work.tally.entering.tolist() == [32, 24, 24, 16]
    work.remove()
    expected = hidden_instead(model, tokens, layers, kept)
    assert torch.allclose(first[:, -1], expected[:, LENGTH - 1], atol=1e-5)
    assert torch.allclose(torch.cat(steps, 1), expected[:, LENGTH:], atol=1e-5)
    assert torch.allclose(chunk, expected[:, LENGTH:], atol=1e-5)
    assert not torch.allclose(model(tokens).logits[:, LENGTH:], expected[:, LENGTH:], atol=1e-3)


@every_kind
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_left_padding_changes_nothing(kind, positions):
    model, tokens = tiny(kind), prompts()
    short = tokens[:1, 2:]

    def inside(inputs):
        """The tokens below 50 are prunable, but for the first and the last two."""
        ids = inputs["input_ids"]
        mask = (ids >= 5) & (ids < 50) & (torch.arange(ids.shape[1]) < ids.shape[1] - 2)
        return mask & (ids.cumsum(1) > ids)

    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :2] = 0
    both = torch.cat([torch.cat([torch.zeros(1, 2, dtype=torch.long), short], 1), tokens[1:]])
    ask = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    work = driver(model, inside, positions=positions)
    alone = [
        model.generate(one, attention_mask=torch.ones_like(one), **ask)[:, -4:] for one in (short, tokens[1:])
    ]
    together = model.generate(both, attention_mask=mask, **ask)[:, -4:]
    work.remove()
    assert torch.equal(together, torch.cat(alone))


@every_kind
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_keeping_all_is_bitwise_dense(kind, positions):
    model, tokens = tiny(kind), prompts()
    dense = model(tokens).logits
    work = driver(
        model, stages=lambda count: (Stage(Site(1), count), Stage(Site(2), count)), positions=positions
    )
    assert torch.equal(model(tokens).logits, dense)
    work.remove()
    assert torch.equal(model(tokens).logits, dense)


def test_right_padding_leaves_the_last_real_token_as_it_is_alone():
    model, tokens = tiny("llama"), prompts(1)
    work = driver(model)
    alone = model(tokens).logits
    padded = torch.cat([tokens, torch.zeros(1, 3, dtype=torch.long)], 1)
    mask = (torch.arange(LENGTH + 3) < LENGTH).long()[None]
    found = model(padded, attention_mask=mask).logits[:, :LENGTH]
    work.remove()
    assert torch.allclose(found[:, -1], alone[:, -1], atol=1e-5)


def test_gaps_in_the_positions_are_not_taken_for_the_seams_of_packed_sequences():
    import tprune
    from tests.vlm.tiny import tiny as vlm
    from tprune.models.prompts import noise_prompts

    model = vlm("llava")
    inputs = noise_prompts(model, 2, 0)
    with tprune.prune(model, "divprune", keep=0.5, positions="original"):
        cached = model(**inputs, use_cache=True).logits
        del inputs["attention_mask"]
        bare = model(**inputs, use_cache=False).logits
    assert torch.allclose(cached, bare, atol=1e-5)


def test_a_cropped_cache_and_a_static_one_are_refused():
    model, tokens = tiny("llama"), prompts()
    work = driver(model)
    cache = cache_of(model)
    model(tokens, past_key_values=cache, use_cache=True)
    cache.crop(-2)
    with pytest.raises(UserError, match="cropped"):
        model(tokens[:, :1], past_key_values=cache, use_cache=True)
    with pytest.raises(UserError, match="static cache"):
        model.generate(tokens, max_new_tokens=2, cache_implementation="static", pad_token_id=0)
    work.remove()


def test_a_site_before_the_first_layer_is_refused():
    model = tiny("llama")
    work = driver(model, stages=lambda count: (Stage(Site(0), 1),))
    with pytest.raises(UserError, match="does not have"):
        model(prompts())
    work.remove()


def test_taps_see_one_model_and_not_another_built_from_the_same_config():
    first = tiny("llama")
    with torch.random.fork_rng():
        second = transformers.LlamaForCausalLM(first.config).eval()
    attentions = [layer.self_attn for layer in first.model.layers]
    configs = [module.config for module in attentions]
    dense = first(prompts()).logits
    capture = Capture(attentions)
    second(prompts())
    assert not capture.calls
    assert torch.equal(first(prompts()).logits, dense)
    [call] = capture.calls[attentions[2]]
    assert call.query.shape == (2, 4, LENGTH, 8)
    assert call.key.shape == (2, 2, LENGTH, 8)
    assert call.causal
    rows = call.view().rows()
    assert torch.allclose(rows.sum(-1), torch.ones(()), atol=1e-5)
    assert not rows.triu(1).any()
    capture.remove()
    assert all(module.config is config for module, config in zip(attentions, configs, strict=True))


def test_two_taps_on_one_module_come_off_in_any_order():
    model = tiny("gemma2")
    attention = model.model.layers[0].self_attn
    config = attention.config
    one, two = Capture([attention]), Capture([attention])
    one.remove()
    model(prompts())
    assert len(two.calls[attention]) == 1
    assert two.calls[attention][0].softcap == model.config.attn_logit_softcapping
    two.remove()
    assert attention.config is config
