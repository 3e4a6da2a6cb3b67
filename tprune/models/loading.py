"""What every loader needs: a seed, weights of a file, and one line for what goes wrong."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from textwrap import shorten
from typing import Any, TypeVar

import torch
from torch import nn

from tprune.artifact import read_tensors
from tprune.errors import UserError
from tprune.models.source import Source

T = TypeVar("T")


class seeded:  # noqa: N801  (reads as a statement)
    """Initialise from `seed` and leave the global generator as it was."""

    def __init__(self, seed: int):
        self.seed = seed

    def __enter__(self) -> None:
        self.fork = torch.random.fork_rng()
        self.fork.__enter__()
        torch.manual_seed(self.seed)

    def __exit__(self, *exception: Any) -> None:
        self.fork.__exit__(*exception)


def replace_weights(model: nn.Module, file: str) -> None:
    """Weights of a safetensors file instead of the model's own.

    Raises:
        UserError: they are of another model.
    """
    try:
        model.load_state_dict(read_tensors(file))
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise UserError(
            f"{file} does not fit the model ({shorten(first, 120, placeholder='…')}); give weights saved from this "
            "architecture"
        ) from None


def guard(source: Source, make: Callable[[], T]) -> T:
    """`make()`, with what can go wrong on the way said in one line."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
    from safetensors import SafetensorError

    quiet = logging.getLogger("timm.models._hub"), logging.getLogger("timm.models._builder")
    for logger in quiet:
        logger.setLevel(logging.ERROR)
    unreachable = UserError(
        f"the hub cannot be reached for {source.name}; go on with --weights FILE.safetensors, "
        "--random-weights, or a built-in model (tprune zoo list)"
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return make()
    except SafetensorError as error:
        place = source.location if source.kind == "folder" else source.name
        raise UserError(
            f"the weights of {place} are not readable safetensors ({error}); get or save the model again"
        ) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, ConnectionError, TimeoutError):
        raise unreachable from None
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        if _is_network(error):
            raise unreachable from None
        raise UserError(f"cannot load {source.name}: {' '.join(str(error).split())[:300]}") from None


def _is_network(error: BaseException) -> bool:
    """Whether an unreachable hub is behind `error`."""
    words = ("couldn't connect", "connection", "offline", "resolve", "max retries", "timed out", "not reach")
    while error is not None:
        name = type(error).__module__
        if name.startswith(("httpx", "httpcore", "requests", "urllib3", "socket")):
            return True
        if any(word in str(error).lower() for word in words):
            return True
        error = error.__cause__ or error.__context__
    return False
