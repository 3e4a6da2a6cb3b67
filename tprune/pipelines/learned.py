"""What a fit leaves in an artifact: what the method learned, and the model's own weights where they learned too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tprune.methods.base import Method
from tprune.models.subject import Subject

TUNED = "model."
"""Begins the names of the model's own weights among the tensors of an artifact by reference."""


def stored(
    method: Method, model: nn.Module, fitted: dict[str, Any] | None, by_reference: bool
) -> dict[str, Tensor]:
    """What the method learned; of the model's own weights those that were tuned, where it is only named."""
    found = dict(method.state or {})
    if by_reference and fitted is not None and fitted["tuned"]:
        found |= {TUNED + name: p.detach() for name, p in model.named_parameters()}
    return found


def untuned(subject: Subject, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a method learned, of an artifact's tensors; the model's own weights among them go where they belong."""
    own = {name.removeprefix(TUNED): t for name, t in state.items() if name.startswith(TUNED)}
    with torch.no_grad():
        for name, parameter in subject.model.named_parameters():
            if name in own:
                parameter.copy_(own[name])
    return {name: t.to(subject.device) for name, t in state.items() if not name.startswith(TUNED)}
