"""Tiny random text encoders of every kind that must work, and a tokenizer of letters for them."""

import torch

from tests.decoders import VOCABULARY

CLASSES = 5
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "num_labels": CLASSES,
}
DISTILLED = {"dim": 32, "hidden_dim": 48, "n_layers": 3, "n_heads": 4}
CONFIGS = {
    "bert": ("Bert", COMMON),
    "roberta": ("Roberta", COMMON),
    "distilbert": (
        "DistilBert",
        {
            name: COMMON[name]
            for name in ("vocab_size", "max_position_embeddings", "pad_token_id", "num_labels")
        }
        | DISTILLED,
    ),
}
NAMES = tuple(CONFIGS)


def encoder(name="bert", head=True, **changes):
    """A sequence classifier, or the encoder without its head; weights from a fixed seed, large enough that attention
    is not flat.
    """
    import transformers

    kind, config = CONFIGS[name]
    config = getattr(transformers, f"{kind}Config")(**{**config, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{kind}ForSequenceClassification" if head else f"{kind}Model")(config)
        model.eval().requires_grad_(False)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
            else:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    config.architectures = [type(model).__name__]
    return model


def tokenizer():
    """A token for every letter, and a class token in front."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = {"[PAD]": 0, "[CLS]": 1, "[UNK]": 2} | {chr(97 + n): 3 + n for n in range(26)}
    made = Tokenizer(models.WordLevel(letters, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.post_processor = processors.TemplateProcessing("[CLS] $A", special_tokens=[("[CLS]", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", cls_token="[CLS]", unk_token="[UNK]", model_max_length=64
    )


def texts(rows=4, length=20, seed=0):
    """Token ids int64 [rows, length] and their mask: every row but the first is 3 tokens shorter than the last one."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    tokens[:, 0] = 1
    mask = torch.arange(length) < (length - 3 * torch.arange(rows)).unsqueeze(1)
    return {"input_ids": tokens * mask, "attention_mask": mask.long()}


def outputs(model, ids, padding=None):
    """Logits [B, C] and the last hidden states [B, L, D]."""
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=padding, output_hidden_states=True)
    return out.logits, out.hidden_states[-1]
