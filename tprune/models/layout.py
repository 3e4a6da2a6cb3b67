"""Which image tokens of a prompt belong together: images, and the crops they were cut into."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from tprune.models.run import Inputs
from tprune.models.seeds import content_seeds


@dataclass(eq=False)
class Unit:
    """Image tokens that belong together.

    Attributes:
        row: of the batch.
        slot: int64 [n], where each is in the prompt; -1 for a patch that has no token (padding of the image).
        image: which image, counted over the batch.
        crop: which of all crops that went through the tower is its first.
        crops: how many of them it is made of.
        place: int64 [n], which of its image's tokens each is; -1 as in `slot`.
        before: how many crops its image has before it.
    """

    row: int
    slot: Tensor
    image: int
    crop: int
    crops: int
    place: Tensor
    before: int = 0


@dataclass(eq=False)
class Packed:
    """How an image's crops became tokens.

    Attributes:
        length: tokens of the image, newlines included.
        crops: per crop int64 [P], the token of each of its patches, -1 for none; the last may stand for several, whose
            mosaic was resized.
        cut: how many crops went through the tower.
    """

    length: int
    crops: list[Tensor]
    cut: int

    def spans(self) -> list[int]:
        """How many of the tower's crops each of `crops` stands for."""
        return [1] * (len(self.crops) - 1) + [self.cut - len(self.crops) + 1]


def units(outer: nn.Module, config: Any, inputs: Inputs, mask: Tensor, by_crop: bool) -> list[Unit]:
    """The images of a batch of prompts, or their crops, in the order of their tokens.

    Args:
        outer, config: of the model.
        inputs: what the model was called with.
        mask: bool [B, N], its image tokens.
        by_crop: every crop by itself; tokens between crops (newlines) then belong to none.
    """
    rows, slots = (found.cpu() for found in mask.nonzero(as_tuple=True))
    found, start, crop = [], 0, 0
    for image, packed in enumerate(_packing(outer, config, inputs, rows, slots)):
        own, row = slots[start : start + packed.length], int(rows[start])
        if by_crop:
            for place, (tokens, span) in enumerate(zip(packed.crops, packed.spans(), strict=True)):
                slot = torch.where(tokens >= 0, own[tokens.clamp_min(0)], -1)
                found.append(Unit(row, slot, image, crop + place, span, tokens, place))
        else:
            found.append(Unit(row, own, image, crop, packed.cut, torch.arange(packed.length)))
        start, crop = start + packed.length, crop + packed.cut
    return found


def token_count(outer: nn.Module, config: Any, inputs: Inputs) -> int | None:
    """How many image tokens the images become, or None where only the prompt tells."""
    sizes, pixels = inputs.get("image_sizes"), inputs.get("pixel_values")
    if hasattr(outer, "pack_image_features") and sizes is not None:
        return sum(image.length for image in packed_crops(outer, config, inputs))
    if inputs.get("image_grid_thw") is not None:
        return int(inputs["image_grid_thw"].prod(-1).sum()) // config.vision_config.spatial_merge_size**2
    per_crop = tokens_per_crop(config)
    if isinstance(pixels, Tensor) and pixels.dim() == 4 and per_crop and sizes is None:
        return len(pixels) * per_crop
    return None


def patches_per_crop(config: Any) -> int:
    """Patches of one image or crop of the default size, 0 where it depends on the image."""
    vision = config.vision_config
    if not hasattr(vision, "image_size") or not hasattr(vision, "patch_size"):
        return 0
    size, patch = pair(vision.image_size), pair(vision.patch_size)
    return (size[0] // patch[0]) * (size[1] // patch[1])


def tokens_per_crop(config: Any) -> int:
    """Image tokens of one image or crop of the default size, 0 where it depends on the image."""
    if getattr(config, "mm_tokens_per_image", None):
        return config.mm_tokens_per_image
    ratio = getattr(config, "downsample_ratio", 1 / getattr(config, "scale_factor", 1))
    return int(patches_per_crop(config) * ratio**2)


def members(outer: nn.Module, config: Any, patches: int) -> Tensor | None:
    """The patches of every token of one crop, int64 [tokens, n], where one is made of several; None elsewhere.

    Of a tower that sees all images as one sequence it is None, too: there patches of a token follow one another.
    """
    place, side = torch.arange(patches, dtype=torch.float64).view(1, -1, 1), round(patches**0.5)
    if pools(getattr(outer, "multi_modal_projector", None)):
        step = outer.multi_modal_projector.kernel_size
        shuffled = place.view(side, side).unfold(0, step, step).unfold(1, step, step).flatten(2)
    elif hasattr(outer, "pixel_shuffle"):
        shuffled = outer.pixel_shuffle(place.view(1, side, side, 1), scale_factor=config.downsample_ratio)
    elif hasattr(outer, "connector"):
        shuffled = outer.connector.pixel_shuffle(place, config.scale_factor)
    else:
        return None
    return shuffled.flatten(0, -2).long()


def pools(projector: nn.Module | None) -> bool:
    """Whether it makes a token of the mean of a square of patches (Gemma-3)."""
    return hasattr(projector, "avg_pool")


def real_crops(outer: nn.Module, inputs: Inputs) -> Inputs:
    """`inputs` with the crops of all prompts as one batch, where they come stacked and filled up with 0 (Idefics3)."""
    pixels = inputs.get("pixel_values")
    if not hasattr(outer, "connector") or pixels is None or pixels.dim() != 5:
        return inputs
    crops = pixels.flatten(0, 1)
    return {**inputs, "pixel_values": crops[(crops != 0).flatten(1).any(1)]}


def pair(value: Any) -> tuple[int, int]:
    """(rows, columns) of a size that may be given as one number."""
    return tuple(value) if isinstance(value, list | tuple) else (value, value)


def _packing(outer: nn.Module, config: Any, inputs: Inputs, rows: Tensor, slots: Tensor) -> list[Packed]:
    """How every image of the batch became tokens."""
    pixels, sizes = inputs.get("pixel_values"), inputs.get("image_sizes")
    if hasattr(outer, "pack_image_features") and sizes is not None:
        return packed_crops(outer, config, inputs)
    if inputs.get("image_grid_thw") is not None:
        merge = config.vision_config.spatial_merge_size**2
        lengths = (inputs["image_grid_thw"].prod(-1) // merge).tolist()
    elif sizes is not None:
        lengths = (torch.as_tensor(sizes) // outer.vision_tower.patch_size).prod(-1).tolist()
    elif isinstance(pixels, Tensor) and pixels.dim() == 4:
        return _tiles(len(pixels), rows, slots, together=hasattr(outer, "pixel_shuffle"))
    else:
        lengths = [int(length) for length in _runs(rows, slots)]
    return [Packed(length, [torch.arange(length)], 1) for length in lengths]


def _runs(rows: Tensor, slots: Tensor) -> Tensor:
    """Lengths of the stretches of consecutive image tokens."""
    seam = torch.ones(len(slots), dtype=torch.bool)
    seam[1:] = (slots[1:] != slots[:-1] + 1) | (rows[1:] != rows[:-1])
    starts = torch.cat([seam.nonzero().flatten(), torch.tensor([len(slots)])])
    return starts.diff()


def _tiles(count: int, rows: Tensor, slots: Tensor, together: bool) -> list[Packed]:
    """`count` crops of equal length; with `together` those that follow one another directly are one image."""
    length = len(slots) // count
    if not together:
        return [Packed(length, [torch.arange(length)], 1) for _ in range(count)]
    found = []
    for run in _runs(rows, slots).tolist():
        number = max(1, run // length)
        crops = [torch.arange(place * length, (place + 1) * length) for place in range(number)]
        found.append(Packed(run, crops, number))
    return found


def packed_crops(outer: nn.Module, config: Any, inputs: Inputs) -> list[Packed]:
    """LLaVA-NeXT's packing, asked of the model itself: numbers go in as features, and come out where tokens are."""
    sizes = inputs["image_sizes"]
    count_crops = sys.modules[type(outer).__module__].image_size_to_num_patches
    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    several = inputs.get("batch_num_images")
    cut = [True] * len(sizes) if several is None else [n == 1 for n in several for _ in range(int(n))]
    numbers = []
    for size, cuts in zip(sizes, cut, strict=True):
        crops = count_crops(size, config.image_grid_pinpoints, vision.image_size) if cuts else 1
        numbers.append(1 + torch.arange(crops * side * side, dtype=torch.float64).view(crops, -1, 1))
    packed = pack(outer, config, inputs, range(len(sizes)), numbers)
    return [
        _unpack(tokens.flatten(), len(number), side * side)
        for tokens, number in zip(packed, numbers, strict=True)
    ]


def crop_table(outer: nn.Module, config: Any, inputs: Inputs, crops: Sequence[Unit]) -> Tensor:
    """Every crop's image, and its row and column among the tiles that the image was cut into: int64 [C, 3].

    -1 where a crop shows the whole image, is several crops resized into one mosaic, or the model does not say.

    Args:
        outer, config: of the model.
        inputs: what the model was called with.
        crops: of the batch.
    """
    table, sizes = [], inputs.get("image_sizes")
    packs = hasattr(outer, "pack_image_features") and sizes is not None
    for unit in crops:
        place = (-1, -1)
        if packs and unit.before > 0 and unit.crops == 1:
            shape_of = sys.modules[type(outer).__module__].get_anyres_image_grid_shape
            _, wide = shape_of(
                sizes[unit.image % len(sizes)], config.image_grid_pinpoints, config.vision_config.image_size
            )
            place = divmod(unit.before - 1, wide)
        table.append((unit.image, *place))
    return torch.tensor(table)


def newlines(crops: Sequence[Unit], mask: Tensor) -> Tensor:
    """The image tokens, bool [B, N], that belong to none of their `crops`: bool [B, N] on the CPU."""
    between = mask.cpu().clone()
    for unit in crops:
        between[unit.row, unit.slot[unit.slot >= 0]] = False
    return between


def pack(
    outer: nn.Module, config: Any, inputs: Inputs, images: Sequence[int], features: list[Tensor]
) -> list[Tensor]:
    """What LLaVA-NeXT's packing makes of `features`, per image [crops, P, C]: per image [tokens, C], newlines 0."""
    sizes = inputs["image_sizes"]
    known = {
        "image_sizes": [sizes[image] for image in images],
        "image_newline": features[0].new_zeros(features[0].shape[-1]),
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "vision_aspect_ratio": inputs.get("vision_aspect_ratio")
        or getattr(config, "vision_aspect_ratio", None),
    }
    known = {name: known[name] for name in signature(outer.pack_image_features).parameters if name in known}
    return outer.pack_image_features(features, **known)[0]


def _unpack(tokens: Tensor, crops: int, patches: int) -> Packed:
    """Where every patch is in `tokens` [T], the numbers (from 1) of patches in packed order, 0 for newlines."""
    length = len(tokens)
    if bool((tokens != tokens.round()).any()):
        # The mosaic of the crops was resized: behind the thumbnail its tokens are mixtures, one unit of their own.
        rest = torch.arange(patches, length)[tokens[patches:] != 0]
        return Packed(length, [torch.arange(patches), rest], crops)
    place = torch.full((crops * patches + 1,), -1)
    place[tokens.long()] = torch.arange(length)
    return Packed(length, list(place[1:].view(crops, patches)), crops)


def unit_seeds(inputs: Inputs, chosen: list[Unit], seed: int) -> Tensor:
    """A seed per unit from its image's own pixels, int64 [units] on the CPU: the same draws the same in any batch."""
    pixels, grid = inputs.get("pixel_values"), inputs.get("image_grid_thw")
    # Prompts that were repeated for beams carry on the count of images.
    first: dict[int, int] = {}
    for unit in chosen:
        first[unit.image] = min(first.get(unit.image, unit.crop), unit.crop)
    crops = torch.tensor([unit.crop - first[unit.image] for unit in chosen])
    images = torch.tensor([unit.image for unit in chosen])
    if not isinstance(pixels, Tensor):
        return images + crops + 7919 * seed
    if grid is not None:
        parts = pixels.split(grid.prod(-1).tolist())
        seeds = torch.cat([content_seeds(part.flatten()[None], seed) for part in parts])
        return seeds[images % len(seeds)]
    seeds = content_seeds(pixels, seed)
    if pixels.dim() == 4:
        return seeds[torch.tensor([unit.crop for unit in chosen])]
    return seeds[images % len(seeds)] + crops
