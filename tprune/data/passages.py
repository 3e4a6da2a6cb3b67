"""Passages of text that a model classifies: a file of texts with labels, or passages of the built-in text."""

from __future__ import annotations

import csv
import hashlib
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from tprune.data import text
from tprune.data.labelled import Labelled
from tprune.errors import UserError

TOPICS = ("compound", "debugger", "formatstrings", "specialnames", "string-methods", "types", "typesseq")
"""The longest topics of the built-in text of which none contains another: what `minilm-topics` tells apart."""
SPLITS = ("train", "test")
SHORTEST, LONGEST = 32, 96
"""Words of a passage."""
TABLES = (".csv", ".json", ".jsonl")


@dataclass(frozen=True)
class Passages(Labelled):
    """Passages in a fixed order."""

    def sample(self, place: int) -> tuple[str, int]:
        """One text and its class, -1 where there is none."""
        return self.items[place], self.label(place)


def read(
    source: str | None,
    limit: int | None,
    names: Mapping[str, int],
    split: str = "test",
    option: str = "--data",
) -> Passages:
    """The first `limit` passages of `source`.

    Args:
        source: None for passages of the built-in text, whose class is their topic, in turn from every topic; a .csv,
            .json or .jsonl file of texts with labels (columns or keys `text` and `label`); for passages without
            labels whatever `data.text.read` reads.
        limit: how many at most; None for all.
        names: the model's classes by name, for labels that are not numbers.
        split: of the built-in text, "train" or "test": passages take turns, and share no word.
        option: begins the errors.

    Raises:
        UserError: missing, unreadable or empty; a label that is neither a number nor a class of the model.
    """
    if source is None:
        found = built_in(split)
        if set(names) != set(TOPICS):
            found = [(passage, None) for passage, _ in found]
        told = {"source": f"{text.BUILT_IN} passages", "split": split}
    else:
        rows = _table(Path(source), option) if source.endswith(TABLES) else None
        if rows is None:
            documents = text.read(source, "evaluation", option).documents
            rows = [(passage, None) for document in documents for passage in cut(document, 0)]
        found = [(passage, _index(label, names, f"{option} {source}")) for passage, label in rows]
        told = {"source": source}
    found = found[:limit]
    if not found:
        raise UserError(f"{option} {source}: no passages in it")
    passages, labels = zip(*found, strict=True)
    digest = hashlib.sha256("\0".join(passages).encode()).hexdigest()
    return Passages(
        passages, None if None in labels else labels, told | {"samples": len(passages), "sha256": digest}
    )


def training(source: str, names: Mapping[str, int]) -> Passages:
    """What `--fit` names: "built-in", or as `read` reads it.

    Raises:
        UserError: as `read`.
    """
    return read(None if source == "built-in" else source, None, names, "train", "--fit")


def built_in(split: str) -> list[tuple[str, int]]:
    """Passages of the topics and which topic each is from, in turn from every topic."""
    from pydoc_data.topics import topics

    groups = [
        [(passage, label) for passage in cut(topics[name], label)[SPLITS.index(split) :: 2]]
        for label, name in enumerate(TOPICS)
    ]
    return [passage for turn in zip_longest(*groups) for passage in turn if passage is not None]


def cut(document: str, seed: int) -> list[str]:
    """A document in passages of 32 to 96 words, one after another; their lengths are drawn from `seed`."""
    words, lengths, passages, start = document.split(), random.Random(seed), [], 0
    while len(words) - start >= SHORTEST or not passages:
        length = lengths.randint(SHORTEST, LONGEST)
        passages.append(" ".join(words[start : start + length]))
        start += length
    return passages


def _table(path: Path, option: str) -> list[tuple[str, Any]] | None:
    """Rows of (text, label) of a file; None where it is a JSON of plain strings."""
    readers: dict[str, Callable[[Any], list]] = {
        ".csv": lambda stream: list(csv.DictReader(stream)),
        ".json": json.load,
        ".jsonl": lambda stream: [json.loads(line) for line in stream if line.strip()],
    }
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            rows = readers[path.suffix](stream)
        if rows and all(isinstance(row, str) or set(row) == {"text"} for row in rows):
            return None
        found = [(row["text"], row["label"]) for row in rows]
    except OSError as error:
        raise UserError(f"{option} {path}: {error.strerror}") from None
    except (ValueError, csv.Error) as error:
        raise UserError(f"{option} {path}: not readable as text ({error})") from None
    except (KeyError, TypeError):
        found = [(None, None)]
    if not all(isinstance(passage, str) for passage, _ in found):
        raise UserError(f"{option} {path}: expected `text`, a string, and `label` in every row")
    return found


def _index(label: Any, names: Mapping[str, int], said: str) -> int | None:
    if label is None:
        return None
    if str(label) in names:
        return names[str(label)]
    try:
        number = int(str(label))  # not a fraction, nor a list
    except ValueError:
        number = -1
    if number < 0:
        known = ", ".join(names) or "none"
        raise UserError(
            f"{said}: label '{label}' is no class of this model; it has {known}, or give numbers from 0"
        )
    return number
