"""Questions about images with short answers: the built-in scenes, or a folder with `questions.jsonl`."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, UnidentifiedImageError

from tprune.data.images import BUILT_IN, DrawnScenes
from tprune.errors import UserError

if TYPE_CHECKING:
    from tprune.data.scenes import Question

FILE = "questions.jsonl"


@dataclass(frozen=True)
class Item:
    """One question about one image (a path, or the image itself); `kind` groups questions in the report.

    `boxes` say where its answer is read: (left, top, right, bottom) each, as fractions of the image; None where that is
    not known.
    """

    image: Any
    prompt: str
    answer: str
    kind: str | None = None
    boxes: tuple[tuple[float, ...], ...] | None = None


@dataclass(frozen=True)
class Questions:
    """Questions in a fixed order.

    Attributes:
        items: the questions; images are opened one by one.
        protocol: source, number and sha256, for the report.
    """

    items: tuple[Item, ...]
    protocol: dict[str, Any]

    def __len__(self) -> int:
        """How many there are."""
        return len(self.items)

    def sample(self, place: int) -> tuple[Image.Image, tuple[str, str]]:
        """The image of one question, and (prompt, answer)."""
        return self.open(place), (self.items[place].prompt, self.items[place].answer)

    def boxed(self, place: int, everything: bool) -> tuple[Image.Image, tuple]:
        """As `sample`, and where the answer is read behind it: `Item.boxes`, whether or not of `everything`."""
        image, asked = self.sample(place)
        return image, (*asked, self.items[place].boxes)

    def open(self, place: int) -> Image.Image:
        """The image of one question as RGB.

        Raises:
            UserError: a file that is no image.
        """
        image = self.items[place].image
        if isinstance(image, Image.Image):
            return image.convert("RGB")
        try:
            return Image.open(image).convert("RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise UserError(
                f"--data: {image} is not a readable image ({error}); remove its question or replace it"
            ) from None

    def chance(self) -> float:
        """The accuracy of always giving the most frequent answer of a question's kind."""
        kinds: dict[str | None, Counter[str]] = {}
        for item in self.items:
            kinds.setdefault(item.kind, Counter())[item.answer] += 1
        return sum(answers.most_common(1)[0][1] for answers in kinds.values()) / len(self.items)


@dataclass(frozen=True)
class TrainingQuestions(DrawnScenes):
    """Scenes with one question about each."""

    model = "digits-llava"

    def sample(self, place: int) -> tuple[Image.Image, tuple[str, str]]:
        """One scene, and (prompt, answer)."""
        asked = self.scene(place)
        return asked.image, (asked.prompt, asked.answer)

    def boxed(self, place: int, everything: bool) -> tuple[Image.Image, tuple]:
        """As `sample`, and where the answer is read behind it, or where any digit stands."""
        asked = self.scene(place)
        return asked.image, (asked.prompt, asked.answer, asked.digits if everything else asked.boxes)

    def scene(self, place: int) -> Question:
        """One scene with all that is known of it."""
        from tprune.data.scenes import question_scene

        return question_scene("train", place, self.seed)


@dataclass(frozen=True)
class BoxedQuestions:
    """Questions, and where their answers are read.

    Attributes:
        everything: whether the boxes of the built-in scenes are those of all digits; a folder has one kind of them.

    Raises:
        UserError: that is not known of some.
    """

    data: Questions | TrainingQuestions
    everything: bool = False

    def __post_init__(self) -> None:
        known = isinstance(self.data, TrainingQuestions) or all(item.boxes for item in self.data.items)
        if not known:
            raise UserError(
                f"--fit {self.data.protocol['source']}: this method learns from boxes: give every line of "
                f'{FILE} "boxes": [[left, top, right, bottom], …] in fractions of the image'
            )

    @property
    def protocol(self) -> dict[str, Any]:
        """Of the questions."""
        return self.data.protocol

    def __len__(self) -> int:
        """How many there are."""
        return len(self.data)

    def sample(self, place: int) -> tuple[Image.Image, tuple]:
        """The image of one question, and (prompt, answer, boxes)."""
        return self.data.boxed(place, self.everything)


def training(source: str) -> Questions | TrainingQuestions:
    """What `--fit` names: `built-in` scenes, or all questions of a folder.

    Raises:
        UserError: as `read`.
    """
    return TrainingQuestions() if source == BUILT_IN else read(source, None, "--fit")


def read(source: str | None, limit: int | None, option: str = "--data") -> Questions:
    """The first `limit` questions of `source`, a folder; None for the built-in scenes.

    Args:
        source: a folder; None for the built-in scenes.
        limit: how many at most; None for all of a folder.
        option: begins the errors.

    Raises:
        UserError: missing, unreadable, empty, or a line that is no question.
    """
    if source is None:
        return built_in(limit)
    root = Path(source)
    if not root.is_dir():
        raise UserError(f"{option} {source}: no such folder; give a folder with images and {FILE}")
    try:
        lines = (root / FILE).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise UserError(
            f"{option} {source}: cannot read {FILE} ({reason}); expected a line "
            '{"image": …, "prompt": …, "answer": …} per question'
        ) from None
    places = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()][:limit]
    if not places:
        raise UserError(f"{option} {source}: no questions in {FILE}")
    items = tuple(_item(root, number, line, option) for number, line in places)
    digest = hashlib.sha256("\n".join(line for _, line in places).encode()).hexdigest()
    return Questions(items, {"source": source, "samples": len(items), "sha256": digest})


def _item(root: Path, number: int, line: str, option: str) -> Item:
    """One line of the file."""
    try:
        content = json.loads(line)
        image, prompt, answer = (str(content[name]) for name in ("image", "prompt", "answer"))
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f'{option} {root}: line {number} of {FILE} is no {{"image": …, "prompt": …, "answer": …}}'
        ) from None
    if not (root / image).is_file():
        raise UserError(f"{option} {root}: line {number} of {FILE} names {image}, and there is no such file")
    boxes = content.get("boxes")
    if boxes is not None and not _are_boxes(boxes):
        raise UserError(
            f"{option} {root}: the boxes of line {number} of {FILE} are not [[left, top, right, bottom], …] in "
            "fractions of the image, 0 to 1"
        )
    boxes = None if boxes is None else tuple(map(tuple, boxes))
    return Item(root / image, prompt, answer, content.get("kind"), boxes)


def _are_boxes(boxes: Any) -> bool:
    """Whether these are boxes as `Item` has them, at least one."""
    rows = isinstance(boxes, list) and boxes and all(isinstance(row, list) and len(row) == 4 for row in boxes)
    numbers = [part for row in boxes for part in row] if rows else [None]
    if not all(isinstance(part, int | float) and 0 <= part <= 1 for part in numbers):
        return False
    return all(row[0] <= row[2] and row[1] <= row[3] for row in boxes)


def built_in(limit: int) -> Questions:
    """The fixed evaluation scenes of `digits-llava`."""
    from tprune.data.scenes import evaluation_scenes

    scenes = evaluation_scenes("digits-llava", min(limit, 2000))
    digest = hashlib.sha256(
        b"".join(scene.image.tobytes() + f"{scene.prompt}\0{scene.answer}\0".encode() for scene in scenes)
    ).hexdigest()
    items = tuple(Item(scene.image, scene.prompt, scene.answer, scene.kind) for scene in scenes)
    protocol = {"source": "digits-llava scenes", "split": "test", "samples": len(items), "sha256": digest}
    return Questions(items, protocol)
