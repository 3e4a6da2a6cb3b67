"""Tiny decoders, a character tokenizer and a little text, in memory and on disk."""

import string

import torch

import tprune
from tests.decoders import CONFIGS, VOCABULARY, decoder
from tprune.methods import registry

NAMES = sorted(CONFIGS)
EXPERTS = ("mixtral", "qwen-moe", "qwen3-moe")
SEARCH = {"generations": 2, "offspring": 3, "survivors": (2, 1), "tokens": (24, 48)}
QUICK = {
    "armor": {"iterations": 3},
    "bonsai": {"epochs": 3, "fraction": 0.2, "masks": 12},
    "cfsp": {"multiple": 1},
    "darwinlm": SEARCH | {"training": (0, 24)},
    "flexigpt": {"rank": 1},
    "gaprune": {"strategy": "matrix"},
    "llm-surgeon": {"shots": 2},
    "llm-surgeon-sp": {"shots": 2},
    "tyr": SEARCH | {"rounds": 2, "least": 4},
}
"""Hyperparameters of methods that would take long, whose steps are wider than the models, or that compare matrices."""
TEXT = "\n\n".join(
    f"{word} {place}: " + " ".join(f"{word[:letter]}{(place * letter) % 7}" for letter in range(40))
    for place, word in enumerate(
        ("weights", "channels", "blocks and heads", "calibration", "perplexity", "masks") * 3
    )
)


MANY_EXPERTS = {"num_local_experts": 16, "intermediate_size": 16}
"""Changes to Mixtral after which one expert is a small part of it."""
MANY_HEADS = {"num_attention_heads": 16, "num_key_value_heads": 16, "intermediate_size": 12}
"""Changes to Llama after which one head is, and heads are most of it."""


def kind_for(method):
    """The kind of decoder that a method works in, and what is changed of it: such that has many of what it removes."""
    units = registry.load(method, "llm-weights").units
    if "experts" in units:
        return "mixtral", MANY_EXPERTS
    return "llama", MANY_HEADS if units == ("heads",) else {}


def fitting(method, **changes):
    """A tiny decoder of that kind."""
    name, own = kind_for(method)
    return decoder(name, **own, **changes)


def tokenizer():
    """One token per character."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    letters = [c for c in string.printable if c.isprintable()][: VOCABULARY - 3] + ["\n"]
    vocabulary = {"<unk>": 0, "<s>": 1} | {letter: place + 2 for place, letter in enumerate(letters)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", pad_token="<unk>", bos_token="<s>"
    )


def prune(model, method, text, **options):
    """`tprune.prune` with a calibration that takes no time."""
    options = {"calibration": 4, "length": 24, "batch_size": 2} | QUICK.get(method, {}) | options
    return tprune.prune(model, f"llm-weights/{method}", tokenizer=tokenizer(), data=str(text), **options)


def save(folder, name="llama", **changes):
    """A tiny model on disk in transformers' format."""
    folder.mkdir()
    decoder(name, **changes).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def logits(model, tokens):
    """The logits of every token."""
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def stepwise_logits(model, tokens, chunk=5):
    """The same through the cache: a prefill in two chunks, then token by token."""
    parts, cache = [], None
    half = tokens.shape[1] // 2
    pieces = [tokens[:, :chunk], tokens[:, chunk:half], *tokens[:, half:].split(1, dim=1)]
    with torch.no_grad():
        for piece in pieces:
            out = model(input_ids=piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
    return torch.cat(parts, 1)
