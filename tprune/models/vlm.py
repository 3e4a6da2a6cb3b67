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
from tprune.models.layout import pair, patches_per_crop, tokens_per_crop
from tprune.models.run import Inputs

TOWERS = ("vision_tower", "visual", "vision_model")
"""What models call their vision towers."""


@dataclass(frozen=True, eq=False)
class Anatomy:
    """Where the parts of a vision-language model are.

    Attributes:
        outer: the module that merges image embeddings into the prompt.
        core: the decoder.
        tower: the vision tower.
        blocks: of the tower; none where they cannot be told.
        projected: the index of the block whose output is projected (the last of several).
        projector: the module that makes image tokens of the tower's output.
        prefix: how many class tokens the tower has that the projector does not see.
        merge: how many rows, and columns, of patches the projector takes for one token, where the tower sees all images
            as one sequence.
        patch: size of a patch in pixels, one number or rows and columns; 0 where it cannot be told.
        depth, heads: of the decoder.
        tokens: image tokens of one image or crop of the default size, 0 where it depends on the image.
    """

    outer: nn.Module
    core: nn.Module
    tower: nn.Module
    blocks: tuple[nn.Module, ...]
    projected: int
    projector: nn.Module | None
    prefix: int
    merge: int
    patch: Any
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
    tower = next(filter(None, (getattr(outer, name, None) for name in TOWERS)), None)
    if tower is None or not hasattr(outer, "get_image_features") or not hasattr(config, "image_token_id"):
        raise UserError(
            f"{type(model).__name__} is no vision-language model with image tokens in its prompt; tprune vlm prunes "
            "LLaVA, LLaVA-NeXT, LLaVA-OneVision, Qwen2-, Qwen2.5- and Qwen3-VL, InternVL, Gemma-3, SmolVLM …"
        )
    decoder, vision = find_decoder(model), config.vision_config
    blocks = _blocks(tower, vision)
    return Anatomy(
        outer,
        decoder.core,
        tower,
        blocks,
        _projected(config, len(blocks)),
        _projector(outer, tower),
        int(getattr(config, "vision_feature_select_strategy", "full") == "default"),
        getattr(vision, "spatial_merge_size", 1),
        getattr(vision, "patch_size", 0),
        len(decoder.blocks),
        decoder.config.num_attention_heads,
        tokens_per_crop(config),
    )


def _projector(outer: nn.Module, tower: nn.Module) -> nn.Module | None:
    """The module that makes image tokens; of several steps the one behind the rearranging of patches."""
    connector = getattr(outer, "connector", None)
    merger = getattr(connector, "modality_projection", getattr(tower, "merger", None))
    return getattr(outer, "multi_modal_projector", merger)


def _blocks(tower: nn.Module, vision: Any) -> tuple[nn.Module, ...]:
    """The blocks of a vision tower: its list of modules that is as long as its config says."""
    depth = getattr(vision, "num_hidden_layers", getattr(vision, "depth", 0))
    lists = (module for module in tower.modules() if isinstance(module, nn.ModuleList))
    return tuple(next((found for found in lists if len(found) == depth), ()))


def _projected(config: Any, depth: int) -> int:
    """The index of the block whose output is projected; of several layers the last that is named."""
    layer = getattr(config, "vision_feature_layer", -1)
    layer = layer[-1] if isinstance(layer, list | tuple) else layer
    # hidden_states has the embeddings in front: entry i > 0 is the output of block i - 1.
    return layer - 1 if layer > 0 else depth + layer


def tower_width(parts: Anatomy) -> int:
    """The width of the residual stream in the tower's blocks; 0 where they cannot be told."""
    linear = (m for block in parts.blocks[:1] for m in block.modules() if isinstance(m, nn.Linear))
    return next((module.in_features for module in linear), 0)


def token_size(parts: Anatomy) -> tuple[int, int, int]:
    """Channels, rows and columns of the pixels that one image token stands for; zeros where they cannot be told."""
    if not parts.patch:
        return 0, 0, 0
    config = parts.outer.config
    vision = config.vision_config
    names = ("num_channels", "in_channels", "in_chans")
    channels = next((getattr(vision, name) for name in names if hasattr(vision, name)), 3)
    joined = (patches_per_crop(config) / parts.tokens) ** 0.5 if parts.tokens else 1
    rows, columns = (round(side * parts.merge * joined) for side in pair(parts.patch))
    return channels, rows, columns


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
