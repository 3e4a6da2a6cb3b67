"""Queries, each with a text that answers it and one that does not: from a file of such, or passages of any text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from tprune.data import text
from tprune.data.passages import TOPICS, cut
from tprune.errors import UserError

KEYS = ("query", "positive", "negative")


@dataclass(frozen=True)
class Triples:
    """Triples in a fixed order.

    Attributes:
        items: query, positive and negative.
        instructions: what stands before each query and is no part of its embedding; may be empty.
        protocol: source, split, number and sha256, for the report.
    """

    items: tuple[tuple[str, str, str], ...]
    instructions: tuple[str, ...]
    protocol: dict[str, Any]


def read(source: str | None, split: str, option: str = "--data") -> Triples:
    """The triples of `source` that belong to `split`.

    Args:
        source: a .json or .jsonl file of objects with `query`, `positive` and `negative`, and perhaps an
            `instruction`; of any other text that `data.text.read` reads the first third of a passage is the query, the
            second its positive, and the last of the next passage its negative.
        split: "calibration" or "evaluation"; triples of a file are dealt out in turn.
        option: begins the errors.

    Raises:
        UserError: missing, unreadable, or fewer than two triples.
    """
    rows = _rows(source, option)
    if rows is None:
        found = text.read(source, split, option)
        items = _of(found.documents)
        instructions = [""] * len(items)
    else:
        dealt = rows[text.SPLITS.index(split) :: 2]
        items = [tuple(row[key] for key in KEYS) for row in dealt]
        instructions = [row.get("instruction", "") for row in dealt]
    if len(items) < 2:
        raise UserError(
            f"{option} {source}: {len(items)} triples to tell apart, and two are needed; give more text"
        )
    digest = hashlib.sha256("\0".join(part for item in items for part in item).encode()).hexdigest()
    told = {"source": source or text.BUILT_IN, "split": split, "triples": len(items), "sha256": digest}
    return Triples(tuple(items), tuple(instructions), told)


def built_in(domain: bool) -> Triples:
    """Triples of the built-in text's calibration part: of its longest topics (`passages.TOPICS`), or of all others."""
    from pydoc_data.topics import topics

    longest = {topics[name] for name in TOPICS}
    documents = text.read(None, "calibration").documents
    items = _of(document for document in documents if (document in longest) == domain)
    told = {"source": f"{text.BUILT_IN} {'topics' if domain else 'beside its topics'}", "triples": len(items)}
    return Triples(tuple(items), ("",) * len(items), told)


def _of(documents: Iterable[str]) -> list[tuple[str, str, str]]:
    """Of every passage its first and its second third, and the last one of the next passage: none is two things."""
    parts = [_thirds(passage) for document in documents for passage in cut(document, 0)]
    return [(*part[:2], parts[(place + 1) % len(parts)][2]) for place, part in enumerate(parts)]


def _thirds(passage: str) -> list[str]:
    words = passage.split()
    ends = [len(words) * third // 3 for third in range(4)]
    return [" ".join(words[first:last]) for first, last in pairwise(ends)]


def _rows(source: str | None, option: str) -> list[dict[str, str]] | None:
    """The objects of a file of triples; None where it is something else."""
    if source is None or not source.endswith((".json", ".jsonl")) or not Path(source).is_file():
        return None
    try:
        content = Path(source).read_text(encoding="utf-8")
        lines = [line for line in content.splitlines() if line.strip()]
        rows = json.loads(content) if source.endswith(".json") else [json.loads(line) for line in lines]
    except (OSError, ValueError):
        return None
    if not (isinstance(rows, list) and rows and isinstance(rows[0], dict) and "query" in rows[0]):
        return None
    if not all(isinstance(row, dict) and all(isinstance(row.get(key), str) for key in KEYS) for row in rows):
        raise UserError(
            f"{option} {source}: expected `query`, `positive` and `negative`, strings, in every row"
        )
    return rows
