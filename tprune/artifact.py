"""The output folder: written beside its place and renamed, so that it appears whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tprune.errors import UserError

try:
    import fcntl
except ImportError:  # Windows, where a folder cannot be locked
    fcntl = None

RECIPE, REPORT, TENSORS, PROBE = "recipe.yaml", "report.json", "tprune.safetensors", "probe.safetensors"


def check_free(out: str | Path, force: bool) -> None:
    """Refuse an output folder that exists, unless it may be replaced."""
    out = Path(out)
    if out.exists() and not force:
        raise UserError(f"--out {out} exists; give another folder, or --force to replace it")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give a folder")
    parent = out.absolute().parent
    if parent.exists() and not os.access(parent, os.W_OK):
        raise UserError(f"--out {out}: no permission to write in {parent}")


def partial_folder(out: str | Path) -> Path:
    """Where an unfinished artifact waits: hidden, beside its place."""
    out = Path(out).absolute()
    return out.with_name(f".{out.name}.partial")


@contextmanager
def staging(out: str | Path, key: str, force: bool) -> Iterator[tuple[Path, Path]]:
    """The folder to write an artifact in and one for finished parts; on success the first becomes `out`.

    After an interruption the finished parts stay, and the next run with the same `key` finds them.
    A full disk leaves nothing but them.

    Raises:
        UserError: it exists, cannot be written, or another process is writing it.
    """
    check_free(out, force)
    out, partial = Path(out).absolute(), partial_folder(out)
    with _alone(out, partial):
        check_free(out, force)  # another run may just have written it
        yield from _staging(out, partial, key)


@contextmanager
def _alone(out: Path, partial: Path) -> Iterator[None]:
    """Inside, no other process writes to `partial`, which is there; the lock goes with the process."""
    try:
        partial.mkdir(parents=True, exist_ok=True)
        held = None if fcntl is None else os.open(partial, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"--out {out}: cannot write there: {error.strerror}") from None
    if held is None:
        yield
        return
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"--out {out}: another run is writing it; wait for that one, or give another folder"
            ) from None
        except OSError:
            pass  # a file system without locks, such as some over a network
        yield
    finally:
        os.close(held)


def _staging(out: Path, partial: Path, key: str) -> Iterator[tuple[Path, Path]]:
    try:
        stamp = partial / "key"
        if not stamp.exists() or stamp.read_text() != key:
            _clear(partial)
            stamp.write_text(key)
        whole, parts = partial / "whole", partial / "parts"
        shutil.rmtree(whole, ignore_errors=True)
        whole.mkdir()
        parts.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot write there: {error.strerror}") from None
    try:
        yield whole, parts
        if out.exists():
            out.rename(partial / "old")
        whole.rename(out)
        shutil.rmtree(partial, ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(whole, ignore_errors=True)
        if not any(parts.iterdir()):
            shutil.rmtree(partial, ignore_errors=True)
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        if full:
            kept = f"; {partial} keeps what is finished" if partial.exists() else ""
            raise UserError(f"--out {out}: the disk is full; free some space and run again{kept}") from None
        if isinstance(error, OSError):
            raise UserError(f"--out {out}: {error.strerror or error}") from None
        raise


def _clear(folder: Path) -> None:
    """Leave nothing in a folder, which stays the same one."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def write_json(path: Path, content: Any) -> None:
    """Indented JSON, ending in a newline; infinities and NaN become null, as JSON knows neither."""
    path.write_text(json.dumps(finite(content), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def finite(content: Any) -> Any:
    """`content` with every infinity and NaN replaced by None."""
    if isinstance(content, dict):
        return {name: finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    if isinstance(content, float) and (content != content or content in (float("inf"), float("-inf"))):
        return None
    return content


def read_report(folder: str | Path) -> dict[str, Any]:
    """The report of an artifact.

    Raises:
        UserError: not a folder that tprune wrote.
    """
    path = Path(folder) / REPORT
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"{folder} is not an output folder of tprune (no {REPORT} in it)") from None
    except ValueError:
        raise UserError(f"{path} is not valid JSON; the folder is damaged, run its recipe again") from None


def is_artifact(folder: str | Path) -> bool:
    """Whether tprune wrote this folder."""
    return (Path(folder) / REPORT).is_file() and (Path(folder) / RECIPE).is_file()


def read_tensors(path: str | Path) -> dict[str, Any]:
    """The tensors of a safetensors file.

    Raises:
        UserError: missing or corrupt.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(str(path))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is not a readable safetensors file ({error}); get or write it again"
        ) from None
