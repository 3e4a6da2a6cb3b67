"""Text for calibration and perplexity: files, folders, HF datasets, or the standard library's own manual."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tprune.errors import UserError

BUILT_IN = "pydoc"
SPLITS = ("calibration", "evaluation")
SEPARATOR = "\n\n"


@dataclass(frozen=True)
class Text:
    """Documents of one split and where they came from.

    Attributes:
        documents: in a fixed order.
        protocol: source, split and sha256, for the report.
    """

    documents: tuple[str, ...]
    protocol: dict[str, Any]


def read(source: str | None, split: str, option: str = "--data") -> Text:
    """The documents of `source` that belong to `split`.

    Args:
        source: None for the built-in text; a .txt, .md, .json or .jsonl file, a folder of such, or `hf:NAME` for a
            dataset (`hf:NAME:CONFIG:COLUMN`).
        split: "calibration" or "evaluation". Documents are dealt out in turn, so calibration never sees the
            evaluation part; a source of one document is cut in half.
        option: begins the errors.

    Raises:
        UserError: missing, unreadable or empty.
    """
    documents = _built_in() if source in (None, BUILT_IN) else _documents(source, option)
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise UserError(f"{option} {source}: no text in it; give a text file, a folder of them, or hf:NAME")
    digest = hashlib.sha256("\0".join(documents).encode()).hexdigest()
    if len(documents) == 1:
        middle = len(documents[0]) // 2
        documents = [documents[0][:middle], documents[0][middle:]]
    chosen = tuple(documents[SPLITS.index(split) :: 2])
    return Text(chosen, {"source": source or BUILT_IN, "split": split, "sha256": digest})


def windows(text: Text, tokenizer: Any, length: int, limit: int | None, option: str = "--data") -> Tensor:
    """Consecutive windows of `length` tokens, int64 [W, length]; a remainder at the end is left out.

    Raises:
        UserError: the text is shorter than one window.
    """
    joined = SEPARATOR.join(text.documents)
    tokens = tokenizer(joined, add_special_tokens=False, verbose=False)["input_ids"]
    count = len(tokens) // length
    if count == 0:
        raise UserError(f"{option}: {len(tokens)} tokens do not fill one window of {length}; give more text")
    chosen = torch.tensor(tokens[: count * length]).view(count, length)
    return chosen if limit is None else chosen[:limit]


@dataclass(frozen=True)
class Sequences:
    """Windows of text as a fit draws them.

    Attributes:
        tokens: int64 [W, L].
        protocol: of the text.
    """

    tokens: Tensor
    protocol: dict[str, Any]

    def __len__(self) -> int:
        """W."""
        return len(self.tokens)

    def sample(self, place: int) -> tuple[Tensor, Tensor]:
        """A window, int64 [L], and what is learned from it: its own tokens."""
        return self.tokens[place], self.tokens[place]


def training(source: str, tokenizer: Any, length: int) -> Sequences:
    """What `--fit` names, in windows of `length` tokens: "built-in", or anything that `read` reads.

    Raises:
        UserError: as `read` and `windows`.
    """
    found = read(None if source == "built-in" else source, "calibration", "--fit")
    tokens = windows(found, tokenizer, length, None, "--fit")
    return Sequences(tokens, found.protocol | {"windows": len(tokens), "length": length})


def sample(text: Text, tokenizer: Any, length: int, count: int, seed: int) -> Tensor:
    """`count` windows of `length` tokens at places drawn from `seed`, int64 [count, length], with replacement.

    The draws are bounded: a text of a few windows is reused, one that does not fill a window is refused.
    """
    joined = SEPARATOR.join(text.documents)
    tokens = torch.tensor(tokenizer(joined, add_special_tokens=False, verbose=False)["input_ids"])
    if len(tokens) < length:
        raise UserError(f"--data: {len(tokens)} tokens do not fill one calibration sequence of {length}")
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(tokens) - length + 1, (count,), generator=generator)
    return torch.stack([tokens[start : start + length] for start in starts.tolist()])


def _built_in() -> list[str]:
    """The topics of Python's manual, about 113,000 tokens of English; they change with the Python version."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def _documents(source: str, option: str) -> list[str]:
    if source.startswith("hf:"):
        return _dataset(source, option)
    path = Path(source)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in (".txt", ".md", ".json", ".jsonl"))
        if not files:
            raise UserError(
                f"{option} {source}: no .txt, .md, .json or .jsonl files in this folder; put some there"
            )
    else:
        files = [path]
    return [document for file in files for document in _file(file, option)]


def _file(path: Path, option: str) -> list[str]:
    try:
        content = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in content.splitlines() if line.strip()]
        elif path.suffix == ".json":
            rows = json.loads(content)
        else:
            return [content]
        return [row if isinstance(row, str) else row["text"] for row in rows]
    except OSError as error:
        raise UserError(
            f"{option} {path}: {error.strerror}; give a text file, a folder of them, or hf:NAME"
        ) from None
    except (UnicodeDecodeError, ValueError) as error:
        raise UserError(f"{option} {path}: not readable as text ({error})") from None
    except (KeyError, TypeError):
        raise UserError(f"{option} {path}: expected strings, or objects with a 'text' key") from None


def _dataset(source: str, option: str) -> list[str]:
    try:
        import datasets
    except ImportError:
        raise UserError(f"{option} {source} needs the datasets library: pip install datasets") from None
    name, config, column = [*source.removeprefix("hf:").split(":"), "", ""][:3]
    try:
        rows = datasets.load_dataset(name, config or None, split="train")
    except Exception as error:
        raise UserError(f"{option} {source}: {' '.join(str(error).split())[:200]}") from None
    return list(rows[column or "text"])
