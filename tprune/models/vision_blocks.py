"""The blocks of vision transformers of timm and transformers, as those of decoders: with the matrices in them."""

from __future__ import annotations

from types import SimpleNamespace

from torch import nn

from tprune.errors import UserError
from tprune.models.anatomy import anatomy, clip_length
from tprune.models.blocks import Decoder


def is_vision(model: nn.Module) -> bool:
    """Whether a model reads images and no text."""
    config = getattr(model, "config", None)
    if config is None:
        return hasattr(model, "patch_embed")
    images = getattr(model, "main_input_name", None) == "pixel_values"
    return images and config.get_text_config(decoder=True) is config and not hasattr(config, "text_config")


def find_vision(model: nn.Module) -> Decoder:
    """The blocks of a plain vision transformer that reads images.

    Raises:
        UserError: it is none.
    """
    if clip_length(model):
        raise UserError(
            f"{type(model).__name__} reads videos, and weights are pruned of vision transformers that read images; "
            "tprune vit prunes the tokens of this one"
        )
    parts = anatomy(model)
    lists = {id(module): name for name, module in model.named_modules()}
    config = getattr(model, "config", None) or SimpleNamespace(
        model_type=type(model).__name__,
        num_hidden_layers=parts.shape.depth,
        num_attention_heads=parts.shape.heads,
        hidden_size=parts.shape.width,
    )
    return Decoder(model, model, config, parts.blocks, lists[id(parts.blocks)])
