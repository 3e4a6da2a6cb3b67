"""Checkpoints of a training run in one safetensors file: weights, the optimizer's moments, and how far it is."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

SAVE_EVERY_SECONDS = 120
MOMENTS = {"mean": "exp_avg", "square": "exp_avg_sq", "velocity": "momentum_buffer"}
"""What AdamW and SGD keep of every parameter: our name and PyTorch's."""


def warm_cosine(step: int, steps: int, warmup: int, floor: float) -> float:
    """Share of the peak learning rate at `step` of `steps`: linear over `warmup` steps, then a cosine to `floor`."""
    return _warm(step, steps, warmup, floor, lambda done: 0.5 * (1 + math.cos(math.pi * done)))


def warm_linear(step: int, steps: int, warmup: int, floor: float) -> float:
    """As `warm_cosine`, but falling in a straight line."""
    return _warm(step, steps, warmup, floor, lambda done: 1 - done)


def _warm(step: int, steps: int, warmup: int, floor: float, left: Callable[[float], float]) -> float:
    """The same for any fall: `left` is 1 at 0 and 0 at 1."""
    if step < warmup:
        return (step + 1) / warmup
    return floor + (1 - floor) * left((step - warmup) / max(1, steps - warmup))


def moments(optimizer: torch.optim.Optimizer, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The running moments of AdamW, or of SGD, by parameter name."""
    kept = {}
    for name, parameter in named.items():
        state = optimizer.state.get(parameter) or {}
        kept |= {f"{ours}.{name}": state[theirs] for ours, theirs in MOMENTS.items() if theirs in state}
    return kept


def restore_moments(
    optimizer: torch.optim.Optimizer, named: Mapping[str, Tensor], kept: Mapping[str, Tensor], step: int
) -> None:
    """Give `optimizer` back what `moments` read from it after `step` steps."""
    for name, parameter in named.items():
        own = {
            theirs: kept[f"{ours}.{name}"].to(parameter.device)
            for ours, theirs in MOMENTS.items()
            if f"{ours}.{name}" in kept
        }
        if own:
            optimizer.state[parameter] = {"step": torch.tensor(float(step))} | own


def save(path: Path, named: Mapping[str, Tensor], kept: Mapping[str, Tensor], facts: dict[str, str]) -> None:
    """Write parameters and moments, and `facts` beside them; the file appears whole or not at all."""
    tensors = {f"weight.{name}": parameter.detach() for name, parameter in named.items()} | dict(kept)
    beside = path.with_suffix(".new")
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, beside, facts)
    os.replace(beside, path)


def load(path: Path, named: Mapping[str, Tensor]) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Fill parameters from a checkpoint, if there is one: its facts and moments, else nothing."""
    if not path.exists():
        return {}, {}
    with safe_open(path, "pt") as file, torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(file.get_tensor(f"weight.{name}"))
        rest = {key: file.get_tensor(key) for key in file.keys() if not key.startswith("weight.")}  # noqa: SIM118
        return file.metadata(), rest
