"""Images with labels: a folder of class folders, a flat folder, or the built-in scenes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image, UnidentifiedImageError

from tprune.data.labelled import Labelled, data_folder, dealt, describe, folders
from tprune.errors import UserError

BUILT_IN = "built-in"
TRAINING_SCENES = 2048
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class Images(Labelled):
    """Images in a fixed order; items are paths or images, opened one by one."""

    def sample(self, place: int) -> tuple[Image.Image, int]:
        """One image as RGB and its class, -1 where there is none."""
        return self.open(place), self.label(place)

    def open(self, place: int) -> Image.Image:
        """One image as RGB.

        Raises:
            UserError: a file that is no image.
        """
        item = self.items[place]
        return item.convert("RGB") if isinstance(item, Image.Image) else open_file(item, f"{self.option}:")


def open_file(file: str | Path, option: str) -> Image.Image:
    """An image file as RGB; `option` begins the error.

    Raises:
        UserError: no image.
    """
    try:
        return Image.open(file).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{option} {file} is not a readable image ({reason}); remove or replace it") from None


@dataclass(frozen=True)
class DrawnScenes:
    """Scenes of the training digits, which share no scan with the evaluation's; drawn when they are needed.

    Attributes:
        count: how many.
        seed: which; not the one that the built-in models were trained on.
    """

    count: int = TRAINING_SCENES
    seed: int = 10_000
    model: ClassVar[str]
    """The built-in model whose scenes they are."""

    @property
    def protocol(self) -> dict[str, Any]:
        """Source, split and number, for the report."""
        source = f"{self.model} scenes"
        return {"source": source, "split": "train", "samples": self.count, "seed": self.seed}

    def __len__(self) -> int:
        """How many there are."""
        return self.count


@dataclass(frozen=True)
class TrainingScenes(DrawnScenes):
    """Scenes with their digits."""

    model = "digits-vit"

    def fits(self, classes: int) -> bool:
        """Whether a model tells digits apart."""
        return classes == 10

    def sample(self, place: int) -> tuple[Image.Image, int]:
        """One scene and its digit."""
        from tprune.data.scenes import classification_scene

        pixels, label, _ = classification_scene("train", place, self.seed)
        return Image.fromarray(pixels), label


def training(source: str) -> Images | TrainingScenes:
    """What `--fit` names: `built-in` scenes, or all images of a folder.

    Raises:
        UserError: missing, unreadable or without images.
    """
    return TrainingScenes() if source == BUILT_IN else read(source, None, "--fit")


def read(source: str | None, limit: int | None, option: str = "--data") -> Images:
    """The first `limit` images of `source`, dealt evenly over the classes of a folder of class folders.

    Args:
        source: a folder; None for the built-in scenes.
        limit: how many at most; None for all.
        option: begins the errors.

    Raises:
        UserError: missing, unreadable or without images.
    """
    if source is None:
        return built_in(limit)
    with data_folder(source, option, "a folder of images, or of one folder per class") as root:
        classes = folders(root)
        groups = [in_folder(one) for one in classes] or [in_folder(root)]
    if not any(groups):
        raise UserError(f"{option} {source}: no images ({', '.join(ENDINGS)}) in it; put some there")
    chosen = dealt(groups, limit)
    files = tuple(file for _, file in chosen)
    labels = tuple(label for label, _ in chosen) if classes else None
    return Images(files, labels, describe(source, root, files, len(files)), option)


def built_in(limit: int) -> Images:
    """The fixed evaluation scenes of `digits-vit`."""
    from tprune.data.scenes import evaluation_scenes

    scenes = evaluation_scenes("digits-vit", min(limit, 2000))
    digest = hashlib.sha256(b"".join(scene.image.tobytes() for scene in scenes)).hexdigest()
    protocol = {"source": "digits-vit scenes", "split": "test", "samples": len(scenes), "sha256": digest}
    return Images(tuple(scene.image for scene in scenes), tuple(scene.label for scene in scenes), protocol)


def in_folder(folder: Path) -> list[Path]:
    """The image files in a folder, by name."""
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in ENDINGS)
