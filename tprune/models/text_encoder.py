"""Text encoders of transformers (BERT and its kin): which they are, what they are fed, and what they answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tprune.errors import UserError
from tprune.models.subject import Subject

ENCODERS = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert")
"""Model types whose blocks are BERT's: attention, addition and norm, MLP, addition and norm."""


def is_encoder(config: Any) -> bool:
    """Whether a model of this configuration reads text in both directions."""
    return config.model_type in ENCODERS and not getattr(config, "is_decoder", False)


def classifies(config: Any) -> bool:
    """Whether such a model was saved with a head that tells classes of texts apart."""
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())


def classes(model: nn.Module) -> dict[str, int]:
    """A classifier's classes by name; none for an encoder without a head."""
    return dict(model.config.label2id) if classifies(model.config) else {}


def longest(subject: Subject) -> int:
    """How many tokens the model has positions for."""
    embeddings = subject.model.base_model.embeddings
    # RoBERTa counts positions from behind the one of its padding.
    skipped = getattr(embeddings, "padding_idx", -1) + 1
    return min(subject.model.config.max_position_embeddings - skipped, subject.processor.model_max_length)


def encode(subject: Subject, texts: Sequence[str], length: int | None) -> dict[str, Tensor]:
    """Texts as the model wants them, padded to the longest and cut at `length` tokens, on its device.

    Raises:
        UserError: a model without a tokenizer, or more tokens than it has positions for.
    """
    if subject.processor is None:
        raise UserError(
            f"{subject.source.name} comes without a tokenizer; add its files to the model's folder"
        )
    limit = longest(subject)
    if length is not None and length > limit:
        raise UserError(f"--length {length}: this model has {limit} positions; ask for no more")
    found = subject.processor(
        list(texts),
        padding=True,
        padding_side="right",  # the class token is the first
        truncation=True,
        max_length=length or limit,
        return_tensors="pt",
    )
    return dict(found.to(subject.device))


def answers(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Logits float32 [B, classes]; of an encoder without a head the mean of every text's tokens, float32 [B, D]."""
    found = model(**inputs)
    if hasattr(found, "logits"):
        return found.logits.float()
    real = inputs["attention_mask"].unsqueeze(-1).float()
    return (found.last_hidden_state.float() * real).sum(1) / real.sum(1)


def noise(model: nn.Module, rows: int, length: int, seed: int) -> dict[str, Tensor]:
    """Rows of token ids drawn from the seed, all but the first two a little shorter than the one before."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    tokens = torch.randint(vocabulary, (rows, length), generator=generator)
    lengths = (length - torch.arange(rows).clamp_min(1) + 1).clamp_min(2)
    mask = torch.arange(length) < lengths.unsqueeze(1)
    device = next(model.parameters()).device
    return {"input_ids": tokens.to(device), "attention_mask": mask.long().to(device)}
