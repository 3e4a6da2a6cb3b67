"""Options that name one of several things and its settings: `--allocate owl:factor=7,spread=0.1`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from tprune.errors import UserError
from tprune.methods.base import Method

T = TypeVar("T", bound=Method)


def chosen(option: str, text: str, kinds: Mapping[str, type[T]], neutral: str | None = None) -> T | None:
    """What `text`, "NAME" or "NAME:SETTING=VALUE,…", names among `kinds`; None for `neutral`.

    Raises:
        UserError: an unknown name or setting.
    """
    name, _, rest = text.partition(":")
    if name == neutral and not rest:
        return None
    if name not in kinds:
        offer = ([] if neutral is None else [neutral]) + list(kinds)
        raise UserError(f"{option} {text}: expected {', '.join(offer[:-1])} or {offer[-1]}")
    settings = dict(part.partition("=")[::2] for part in rest.split(",") if part)
    try:
        return kinds[name].build(settings)
    except UserError as error:
        raise UserError(f"{option} {text}: {str(error).removeprefix('--set ')}") from None
