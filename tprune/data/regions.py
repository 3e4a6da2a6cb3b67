"""What the patches of training images show: built-in digits, boxes in COCO's format, or segmentation maps."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional

from tprune.data.images import BUILT_IN, ENDINGS, TRAINING_SCENES, open_file
from tprune.data.scenes import EVALUATION_SEED
from tprune.errors import UserError

BOXES, MAPS = "annotations.json", "annotations"
NOTHING = 255
"""The value of a segmentation map where there is nothing to learn."""


class Regions(ABC):
    """Images with named regions in them, in a fixed order.

    Attributes:
        names: how many names there are, the last one being that of what no region covers.
        protocol: source and number, for the report.
    """

    names: int
    protocol: dict[str, Any]

    @abstractmethod
    def __len__(self) -> int:
        """How many images."""

    @abstractmethod
    def open(self, place: int) -> Image.Image:
        """One image as RGB."""

    @abstractmethod
    def regions(self, place: int) -> list[tuple[int, Image.Image]]:
        """The regions of an image: a name, and an 8-bit grey image of the same size, white inside."""

    def sample(self, place: int) -> tuple[Image.Image, int]:
        """One image without its regions; it has no class, -1."""
        return self.open(place), -1


@dataclass(frozen=True)
class SceneRegions(Regions):
    """Scenes as `tprune.data.images.TrainingScenes` has them; a disc around the digit bears its name."""

    split: str = "train"
    count: int = TRAINING_SCENES
    seed: int = 10_000
    names: int = 11

    @property
    def protocol(self) -> dict[str, Any]:
        """Source, split and number, for the report."""
        source = "digits-vit scenes with named patches"
        return {"source": source, "split": self.split, "samples": self.count, "seed": self.seed}

    def __len__(self) -> int:
        """How many there are."""
        return self.count

    def open(self, place: int) -> Image.Image:
        """One scene."""
        return Image.fromarray(_scene(self.split, place, self.seed)[0])

    def regions(self, place: int) -> list[tuple[int, Image.Image]]:
        """The digit's disc, as wide as the one that `digits-vit` learned with."""
        pixels, label, (top, left, height, width) = _scene(self.split, place, self.seed)
        row, column, reach = top + height / 2, left + width / 2, 0.42 * height
        mask = Image.new("L", pixels.shape[1::-1])
        corners = (column - reach, row - reach, column + reach, row + reach)
        ImageDraw.Draw(mask).ellipse(corners, fill=255)
        return [(label, mask)]


@lru_cache(maxsize=512)
def _scene(split: str, place: int, seed: int) -> tuple[np.ndarray, int, tuple]:
    """A scene that is asked for as an image and for its regions."""
    from tprune.data.scenes import classification_scene

    return classification_scene(split, place, seed)


@dataclass(frozen=True)
class AnnotatedFolder(Regions):
    """Images of a folder with boxes or maps.

    Attributes:
        files: the images.
        drawn: for every image its boxes, (name, left, top, width, height) each, or the file of its map.
        names: see `Regions`.
        protocol: source, number and sha256 of the file names.
    """

    files: tuple[Path, ...]
    drawn: tuple[Any, ...]
    names: int
    protocol: dict[str, Any]

    def __len__(self) -> int:
        """How many there are."""
        return len(self.files)

    def open(self, place: int) -> Image.Image:
        """One image as RGB."""
        return open_file(self.files[place], "--fit:")

    def regions(self, place: int) -> list[tuple[int, Image.Image]]:
        """Rectangles, or what bears one value in a map."""
        drawn, size = self.drawn[place], Image.open(self.files[place]).size
        if isinstance(drawn, Path):
            values = np.asarray(Image.open(drawn).resize(size, Image.Resampling.NEAREST))
            return [
                (int(value), Image.fromarray(np.where(values == value, 255, 0).astype(np.uint8)))
                for value in np.unique(values)
                if value != NOTHING
            ]
        masks: dict[int, Image.Image] = {}
        for name, left, top, width, height in drawn:
            mask = masks.setdefault(name, Image.new("L", size))
            ImageDraw.Draw(mask).rectangle((left, top, left + width - 1, top + height - 1), fill=255)
        return list(masks.items())


def evaluation(source: str | None, limit: int) -> Regions | None:
    """The first `limit` images of `--data` with what they show, the built-in scenes by default; None: it does not say.

    Raises:
        UserError: annotations that cannot be read.
    """
    if source is None:
        return SceneRegions("test", min(limit, 2000), EVALUATION_SEED)
    if not ((Path(source) / BOXES).is_file() or (Path(source) / MAPS).is_dir()):
        return None
    whole = training(source)
    return replace(whole, files=whole.files[:limit], drawn=whole.drawn[:limit])


def training(source: str) -> Regions:
    """What `--fit` names, for methods that learn what patches show.

    Raises:
        UserError: neither `built-in` nor a folder with annotations.
    """
    if source == BUILT_IN:
        return SceneRegions()
    root = Path(source)
    if (root / BOXES).is_file():
        return _boxes(root)
    if (root / MAPS).is_dir():
        return _maps(root)
    raise UserError(
        f"--fit {source}: no annotations; give a folder with {BOXES} (boxes in COCO's format, file names relative to "
        f"the folder), or with images/ and {MAPS}/ (a map per image, PNG, a class index per pixel, 255 for none)"
    )


def _boxes(root: Path) -> AnnotatedFolder:
    try:
        told = json.loads((root / BOXES).read_text(encoding="utf-8"))
        known = {
            one["id"]: place for place, one in enumerate(sorted(told["categories"], key=lambda c: c["id"]))
        }
        files = {one["id"]: root / one["file_name"] for one in told["images"]}
        boxes: dict[Any, list] = {name: [] for name in files}
        for one in told["annotations"]:
            boxes[one["image_id"]].append((known[one["category_id"]], *one["bbox"]))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--fit {root / BOXES} is not in COCO's format ({error!r})") from None
    order = sorted(files, key=lambda name: files[name])
    return _folder(root, [files[name] for name in order], [tuple(boxes[name]) for name in order], len(known))


def _maps(root: Path) -> AnnotatedFolder:
    files = sorted(file for file in (root / "images").glob("*") if file.suffix.lower() in ENDINGS)
    maps = [root / MAPS / f"{file.stem}.png" for file in files]
    missing = next((file for file in maps if not file.is_file()), None)
    if missing is not None:
        raise UserError(f"--fit {root}: no map {missing.relative_to(root)}; every image needs one")
    values = {value for file in maps for _, value in Image.open(file).getcolors(1 << 24)}
    if not all(isinstance(value, int) for value in values):
        raise UserError(f"--fit {root / MAPS}: expected maps of one channel, a class index per pixel")
    return _folder(root, files, maps, 1 + max(values - {NOTHING}, default=0))


def _folder(root: Path, files: list[Path], drawn: list[Any], classes: int) -> AnnotatedFolder:
    if not files:
        raise UserError(f"--fit {root}: no images in it")
    digest = hashlib.sha256("\0".join(str(file.relative_to(root)) for file in files).encode()).hexdigest()
    protocol = {"source": str(root), "samples": len(files), "sha256": digest}
    return AnnotatedFolder(tuple(files), tuple(drawn), classes + 1, protocol)


@dataclass(frozen=True, eq=False)
class Covering:
    """Images as the model sees them, with how much of every patch each name covers.

    Regions go through the same preprocessing as the images, so that any resizing and cropping is followed.

    Attributes:
        data: what to read.
        prepare: an image as the model wants it, [C, H, W].
        grid: rows and columns of patches.
    """

    data: Regions
    prepare: Callable[[Image.Image], Tensor]
    grid: tuple[int, int]

    def __len__(self) -> int:
        """How many images."""
        return len(self.data)

    def sample(self, place: int) -> tuple[Tensor, Tensor]:
        """An image [C, H, W] and float [rows · columns, names], each row summing to one."""
        pixels, shares = self.prepare(self.data.open(place)), torch.zeros(*self.grid, self.data.names)
        black, white = self._ends
        for name, mask in self.data.regions(place):
            inside = ((self.prepare(mask.convert("RGB")) - black) / (white - black)).mean(0).clamp(0, 1)
            size = inside.shape[0] // self.grid[0], inside.shape[1] // self.grid[1]
            shares[..., name] = functional.avg_pool2d(inside[None, None], size)[
                0, 0, : self.grid[0], : self.grid[1]
            ]
        # What overlaps shares a patch, what is left of it bears the last name.
        shares = shares / shares.sum(-1, keepdim=True).clamp_min(1)
        shares[..., -1] = 1 - shares[..., :-1].sum(-1)
        return pixels, shares.flatten(0, 1)

    @cached_property
    def _ends(self) -> tuple[Tensor, Tensor]:
        """What black and white become, [C, 1, 1] each."""
        return tuple(
            self.prepare(Image.new("RGB", (64, 64), (value,) * 3)).mean((1, 2), keepdim=True)
            for value in (0, 255)
        )
