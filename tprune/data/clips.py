"""Videos with labels: a folder per class, in it a folder per clip, in it the frames as images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from tprune.data.images import BUILT_IN, in_folder, open_file
from tprune.data.labelled import Labelled, data_folder, dealt, describe, folders
from tprune.errors import UserError

LAYOUT = "a folder of CLASS/CLIP/FRAME.png"


@dataclass(frozen=True)
class Clips(Labelled):
    """Clips in a fixed order; items are the files of the frames that a model sees, opened clip by clip."""

    def sample(self, place: int) -> tuple[list[Image.Image], int]:
        """The frames of one clip, as RGB, and its class."""
        return self.open(place), self.label(place)

    def open(self, place: int) -> list[Image.Image]:
        """The frames of one clip, as RGB.

        Raises:
            UserError: a file that is no image.
        """
        return [open_file(file, f"{self.option}:") for file in self.items[place]]


def read(source: str | None, limit: int | None, frames: int, option: str = "--data") -> Clips:
    """The first `limit` clips of `source`, dealt evenly over the classes, each as `frames` of its frames.

    Args:
        source: a folder of CLASS/CLIP/FRAME.png; the frames of a clip are in the order of their names.
        limit: how many at most; None for all.
        frames: how many frames the model sees at once.
        option: begins the errors.

    Raises:
        UserError: missing, unreadable, without clips, or a clip of fewer frames.
    """
    if source in (None, BUILT_IN):
        raise UserError(
            f"this model sees videos, and there are none built in; give {option} FOLDER, {LAYOUT}"
        )
    with data_folder(source, option, LAYOUT) as root:
        groups = [folders(one) for one in folders(root)]
        if not any(groups):
            raise UserError(f"{option} {source}: no clips in it; this model sees videos, give {LAYOUT}")
        chosen = dealt(groups, limit)
        items = tuple(tuple(spread(folder, frames, option)) for _, folder in chosen)
    labels = tuple(label for label, _ in chosen)
    files = [file for item in items for file in item]
    return Clips(items, labels, describe(source, root, files, len(items)), option)


def spread(folder: Path, frames: int, option: str) -> list[Path]:
    """So many frames of a clip, the middle ones of equally long parts of it.

    Raises:
        UserError: it has fewer.
    """
    found = in_folder(folder)
    if len(found) < frames:
        raise UserError(
            f"{option}: {len(found)} frames in {folder}, and this model sees {frames}; give more, or leave the clip out"
        )
    return [found[(2 * place + 1) * len(found) // (2 * frames)] for place in range(frames)]
