"""Prompts with images made from numbers alone: what is timed, stored as a probe and tested, without a processor."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tprune.models.layout import Packed, packed_crops, pair, pools, tokens_per_crop
from tprune.models.run import Inputs

TEXT_BEFORE, TEXT_BEHIND = 4, 12
QWEN_GRID = 16


def noise_prompts(
    model: nn.Module, batch: int, seed: int, *, images: int = 1, behind: int = TEXT_BEHIND
) -> Inputs:
    """`batch` prompts of random text around `images` noise images each, as keyword arguments of the model.

    Every image is surrounded by text; the last one is followed by `behind` text tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    parameter = next(model.parameters())
    inputs, lengths = _pixels(model, batch * images, generator)
    rows = []
    for row in range(batch):
        parts = [_text(model, TEXT_BEFORE, generator)]
        for length in lengths[row * images : (row + 1) * images]:
            parts += [torch.full((length,), model.config.image_token_id), _text(model, 2, generator)]
        rows.append(torch.cat([*parts, _text(model, behind - 2, generator)]))
    ids = torch.stack(rows)
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "image_grid_thw" in inputs:
        inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    if pools(getattr(getattr(model, "model", model), "multi_modal_projector", None)):
        inputs["token_type_ids"] = (ids == model.config.image_token_id).int()
    inputs["pixel_values"] = inputs["pixel_values"].to(parameter.dtype)
    if hasattr(getattr(model, "model", model), "connector"):
        inputs["pixel_values"] = inputs["pixel_values"].unflatten(0, (batch, images))
    return {
        name: value.to(parameter.device) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }


def _text(model: nn.Module, count: int, generator: torch.Generator) -> Tensor:
    """Random text tokens, none of which means an image."""
    config = model.config
    size = config.get_text_config().vocab_size
    special = {
        value
        for name, value in vars(config).items()
        if isinstance(value, int) and name.endswith(("token_id", "_index"))
    }
    allowed = torch.tensor([token for token in range(3, min(size, 4096)) if token not in special])
    return allowed[torch.randint(len(allowed), (count,), generator=generator)]


def _pixels(model: nn.Module, count: int, generator: torch.Generator) -> tuple[Inputs, list[int]]:
    """Noise images and how many tokens each becomes."""
    config, outer = model.config, getattr(model, "model", model)
    vision = config.vision_config
    channels = getattr(vision, "in_channels", None) or getattr(vision, "num_channels", 3)
    if hasattr(vision, "spatial_merge_size"):
        patch = channels * vision.temporal_patch_size * vision.patch_size**2
        grid = torch.tensor([[1, QWEN_GRID, QWEN_GRID]] * count)
        pixels = torch.randn(count * QWEN_GRID**2, patch, generator=generator)
        return {"pixel_values": pixels, "image_grid_thw": grid}, [
            QWEN_GRID**2 // vision.spatial_merge_size**2
        ] * count
    rows, columns = pair(vision.image_size)
    if hasattr(outer, "pack_image_features"):
        sizes = torch.tensor([config.image_grid_pinpoints[0]] * count)
        packed: list[Packed] = packed_crops(outer, config, {"image_sizes": sizes})
        pixels = torch.randn(count, packed[0].cut, channels, rows, columns, generator=generator)
        return {"pixel_values": pixels, "image_sizes": sizes}, [image.length for image in packed]
    pixels = torch.randn(count, channels, rows, columns, generator=generator)
    return {"pixel_values": pixels}, [tokens_per_crop(config)] * count
