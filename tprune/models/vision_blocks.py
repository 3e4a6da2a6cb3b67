"""The blocks of vision transformers of timm and transformers, as those of decoders: with the matrices in them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from tprune.errors import UserError
from tprune.models.anatomy import Anatomy, anatomy, clip_length
from tprune.models.blocks import Decoder
from tprune.models.source import Source

PER_BLOCK = ("relative_position_bias_table", "mid_position_embeddings")
"""Parameters outside the projections that have an entry for every head or block."""


def is_vision(model: nn.Module) -> bool:
    """Whether a model reads images and no text."""
    config = getattr(model, "config", None)
    if config is None:
        return hasattr(model, "patch_embed")
    images = getattr(model, "main_input_name", None) == "pixel_values"
    return images and config.get_text_config(decoder=True) is config and not hasattr(config, "text_config")


_CONFIGS: WeakKeyDictionary[nn.Module, SimpleNamespace] = WeakKeyDictionary()
"""Of timm's models; a copy of one whose shapes have changed has none."""


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
    config = getattr(model, "config", None) or _timm_config(parts)
    return Decoder(model, model, config, parts.blocks, lists[id(parts.blocks)])


def check_structure(model: nn.Module) -> None:
    """Refuse to take heads, channels or blocks out of a model that has more than projections for each of them.

    Raises:
        UserError: naming what.
    """
    names = [name for name, _ in model.named_parameters() if name.endswith(PER_BLOCK)]
    if getattr(model, "rope_mixed", False):
        names.append("rope.freqs")
    if type(model).__name__ == "Eva" and _kv_heads_by_block(model):
        names.append("num_kv_heads")
    if names:
        raise UserError(
            f"{type(model).__name__} has positions or sizes of its own for every block or head ({names[0]}), "
            "which cannot leave with them; choose a method that masks weights, such as wanda"
        )


def _kv_heads_by_block(model: nn.Module) -> bool:
    """Whether blocks of timm differ in them, or its Sapiens2 lists them for as many blocks as it is built with."""
    listed = "sapiens2" in getattr(model, "pretrained_cfg", {}).get("architecture", "")
    return listed or len({_kv_heads(block) for block in model.blocks}) > 1


def _kv_heads(block: nn.Module) -> int | None:
    """How many key-value heads a block of timm has, where it says so."""
    return getattr(block.attn, "num_kv_heads", None)


def _timm_config(parts: Anatomy) -> SimpleNamespace:
    """What transformers' configurations say, of a timm model; it changes with the model's shapes."""
    model = parts.model
    if model not in _CONFIGS:
        _CONFIGS[model] = SimpleNamespace(
            model_type=type(model).__name__,
            num_hidden_layers=parts.shape.depth,
            num_attention_heads=parts.shape.heads,
            num_key_value_heads=_kv_heads(parts.blocks[0]),
            hidden_size=parts.shape.width,
            built_depth=parts.shape.depth,
        )
    return _CONFIGS[model]


def written(model: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a timm model's config.json has to say of its shapes: timm's own arguments, and entries of ours."""
    config = _CONFIGS.get(model)
    if config is None:
        return {}, {}
    said = {"mlp_ratio": config.mlp_ratio} if hasattr(config, "mlp_ratio") else {}
    if config.num_hidden_layers != config.built_depth:
        said["depth"] = config.num_hidden_layers
    return said, {"tprune": config.tprune} if hasattr(config, "tprune") else {}


def own_shapes(source: Source) -> list[dict[str, Any]]:
    """Per block the shapes of a folder of timm's format that stock timm has no words for; none for any other."""
    file = Path(source.location) / "config.json"
    if source.kind != "folder":
        return []
    return json.loads(file.read_text(encoding="utf-8")).get("tprune", {}).get("layers", [])
