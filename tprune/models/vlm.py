"""Vision-language models of transformers: where their image tokens are, and what their vision towers saw.

Image tokens are told by `input_ids`; their embeddings are read after the model merged them into the prompt, so that any
projector, merger or packing of crops stays the model's own business. `tprune.models.layout` says
which of them belong together, `tprune.models.projector` lets them leave.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tprune.errors import UserError
from tprune.models.blocks import find_decoder
from tprune.models.layout import tokens_per_crop
from tprune.models.run import Inputs


@dataclass(frozen=True, eq=False)
class Anatomy:
    """Where the parts of a vision-language model are.

    Attributes:
        outer: the module that merges image embeddings into the prompt.
        core: the decoder.
        tower: the vision tower.
        block: the attention module of the tower's block whose output is projected; None without a class token.
        prefix: how many class tokens the tower has that the projector does not see.
        depth, heads: of the decoder.
        tokens: image tokens of one image or crop of the default size, 0 where it depends on the image.
    """

    outer: nn.Module
    core: nn.Module
    tower: nn.Module
    block: nn.Module | None
    prefix: int
    depth: int
    heads: int
    tokens: int


def anatomy(model: nn.Module) -> Anatomy:
    """Find the parts of `model`.

    Raises:
        UserError: not a vision-language model with image tokens in its prompt.
    """
    outer = getattr(model, "model", model)
    config = getattr(model, "config", None)
    tower = getattr(outer, "vision_tower", None) or getattr(outer, "visual", None)
    if tower is None or not hasattr(outer, "language_model") or not hasattr(config, "image_token_id"):
        raise UserError(
            f"{type(model).__name__} is no vision-language model with image tokens in its prompt; "
            "tprune vlm prunes LLaVA, LLaVA-NeXT, LLaVA-OneVision, Qwen2-VL, Qwen2.5-VL, InternVL and their like"
        )
    decoder = find_decoder(model)
    prefix = int(getattr(config, "vision_feature_select_strategy", "full") == "default")
    block = _projected_block(tower, config) if prefix else None
    return Anatomy(
        outer,
        decoder.core,
        tower,
        block,
        prefix,
        len(decoder.blocks),
        decoder.config.num_attention_heads,
        tokens_per_crop(config),
    )


def _projected_block(tower: nn.Module, config: Any) -> nn.Module:
    """The attention of the block whose output is projected."""
    layer = config.vision_feature_layer
    layer = layer[-1] if isinstance(layer, list | tuple) else layer
    depth = config.vision_config.num_hidden_layers
    blocks = next(
        module for module in tower.modules() if isinstance(module, nn.ModuleList) and len(module) == depth
    )
    # hidden_states has the embeddings in front: entry i > 0 is the output of block i - 1.
    block = blocks[layer - 1 if layer > 0 else depth + layer]
    return next(part for part in block.modules() if type(part).__name__.endswith("Attention"))


def image_tokens(model: nn.Module, inputs: Inputs) -> Tensor | None:
    """Which tokens of the prompt are image tokens, bool [B, N]; None where the prompt has no images.

    Raises:
        UserError: images without `input_ids`, which tell where they are.
    """
    pixels = inputs.get("pixel_values")
    if inputs.get("input_ids") is None:
        if pixels is not None:
            raise UserError("image tokens cannot be told from inputs_embeds alone; pass input_ids")
        return None
    if pixels is None and (inputs.get("mm_encoder_outputs") or {}).get("image") is None:
        return None
    return inputs["input_ids"] == model.config.image_token_id


def check_later(model: nn.Module, inputs: Inputs) -> None:
    """Refuse images in a later call on a cache: tokens leave in its first call only.

    Raises:
        UserError: the call brings image tokens.
    """
    found = image_tokens(model, inputs)
    if found is not None and bool(found.any()):
        raise UserError(
            "an image in a later turn on the same cache cannot be pruned: give the whole conversation as one prompt "
            "with an empty cache, or remove the method for this call"
        )
