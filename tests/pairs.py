"""Tiny random encoders with a decoder beside them, of every kind that must work."""

import torch

from tests.decoders import VOCABULARY

COMMON = {"vocab_size": VOCABULARY, "d_model": 32, "pad_token_id": 0, "eos_token_id": 1}
T5 = COMMON | {
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
BART = COMMON | {
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 40,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
}
CONFIGS = {
    "t5": ("T5", T5),
    "t5-gated": ("T5", T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "umt5": ("UMT5", T5),
    "bart": ("Bart", BART),
    "mbart": ("MBart", BART),
}
NAMES = tuple(CONFIGS)
"""T5's position bias is its first block's, UMT5's every block's own; behind mBART's blocks stands a norm."""


def pair(name="t5", **changes):
    """A model with a language-modelling head; weights from a fixed seed, large enough that attention is not flat."""
    import transformers

    kind, config = CONFIGS[name]
    config = getattr(transformers, f"{kind}Config")(**{**config, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval().requires_grad_(False)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
            else:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model
