"""The kinds of vision model: which is which, which methods work there, and what runs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from tprune.core.budget import Stage
from tprune.errors import UserError
from tprune.methods import registry
from tprune.methods.fit import Fit
from tprune.methods.tokens import TokenMethod
from tprune.models.anatomy import WINDOWED, Anatomy, anatomy
from tprune.models.relaxed import FitDriver
from tprune.models.state_space import StateSpaceDriver, StateSpaceFitDriver, vim
from tprune.models.vit import TokenDriver
from tprune.models.windows import WindowDriver, WindowFitDriver, swin


@dataclass(frozen=True)
class Kind:
    """What is said of a kind of model (`Shape.kind`), and the drivers of methods and of fits in it."""

    says: str
    example: str
    driver: Any
    fit_driver: Any


KINDS = {
    "plain": Kind("is a plain vision transformer", "a plain ViT such as deit_s", TokenDriver, FitDriver),
    "windows": Kind(
        "attends within fixed windows",
        "a Swin such as swin_tiny_patch4_window7_224",
        WindowDriver,
        WindowFitDriver,
    ),
    "state-space": Kind(
        "is a state-space model without attention",
        "a Vim such as vim_tiny_patch16_224",
        StateSpaceDriver,
        StateSpaceFitDriver,
    ),
}


def dissect(model: nn.Module) -> Anatomy:
    """Find the parts of `model`.

    Raises:
        UserError: a model that no method prunes.
    """
    name = type(model).__name__
    if name.startswith("Swin") and not name.startswith("Swinv2") and name != "SwinTransformerV2":
        return swin(model)
    if name == "VisionMamba":
        return vim(model)
    if name.startswith(WINDOWED):
        able = ", ".join(registry.running_on("windows"))
        raise UserError(
            f"{name} attends within fixed windows, where single tokens cannot leave; use {KINDS['plain'].example}, "
            f"or with {able} {KINDS['windows'].example}"
        )
    return anatomy(model)


def admit(method: TokenMethod, parts: Anatomy) -> None:
    """Refuse a method that does not work in this model.

    Raises:
        UserError: naming those that do.
    """
    name, kind = type(parts.model).__name__, parts.shape.kind
    if kind not in method.runs_on:
        mend = " or ".join(KINDS[one].example for one in method.runs_on)
        if kind != "plain":
            mend = f"{', '.join(registry.running_on(kind))}, or {mend}"
        raise UserError(f"{name} {KINDS[kind].says}, where {method.id} does not work; use {mend}")
    if parts.suffix and method.sees:
        raise UserError(
            f"{method.id} does not work in detectors such as this {name}; use {KINDS[kind].example}"
        )
    method.check(parts.shape)


def token_driver(parts: Anatomy, method: TokenMethod, stages: Sequence[Stage], seed: int) -> TokenDriver:
    """`method` put into a model."""
    return KINDS[parts.shape.kind].driver(parts, method, stages, seed)


def fit_driver(parts: Anatomy, method: TokenMethod, fit: Fit, seed: int) -> FitDriver:
    """`method` in training, put into a model."""
    return KINDS[parts.shape.kind].fit_driver(parts, method, fit, seed)
