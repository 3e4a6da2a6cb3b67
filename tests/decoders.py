"""Tiny random decoders of every kind that must work."""

import copy

import torch

VOCABULARY = 96

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
HALF_SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
}

CONFIGS = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "gemma2": ("Gemma2Config", {"head_dim": 8, "sliding_window": 8, "layer_types": HALF_SLIDING}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 8, "sliding_window": 8, "layer_types": HALF_SLIDING}),
    "phi3": ("Phi3Config", {}),
    "gpt2": (
        "GPT2Config",
        {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256, "vocab_size": VOCABULARY}
        | {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0},
    ),
    "gpt-neox": ("GPTNeoXConfig", {"rotary_pct": 0.5}),
    "opt": (
        "OPTConfig",
        {"ffn_dim": 48, "word_embed_proj_dim": 32},
    ),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen-moe": ("Qwen2MoeConfig", EXPERTS),
    "qwen3-moe": ("Qwen3MoeConfig", EXPERTS | {"head_dim": 8}),
}
NO_ROPE = ("gpt2", "opt")


def decoder(name="llama", **changes):
    """A causal language model with weights from a fixed seed, large enough that attention is not flat."""
    import transformers

    kind, own = CONFIGS[name]
    common = {} if name == "gpt2" else COMMON
    config = getattr(transformers, kind)(**{**common, **own, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = (
            transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval().requires_grad_(False)
        )
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return model


def tokens(*shape, seed=1):
    """Random token ids, never padding."""
    return torch.randint(2, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def count_hooks(model):
    """Of all its modules."""
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
