"""The protocol of a figure: everything it depends on besides the method.

Two figures are comparable where their protocols are equal; where they are not, the fields that differ are named.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tprune.models.in_file import ends
from tprune.models.subject import Subject, named_parameters
from tprune.recipe import Recipe

SAMPLED = 256
"""Values read from each end of every parameter for the fingerprint."""
SPEED_ONLY = ("hardware", "latency")
"""Fields that decide speed and, but for rounding, not quality."""
OF_QUALITY = ("family", "data")
"""Fields in which a difference makes two qualities answers to different questions."""
OF_SPEED = ("family", "device", "hardware", "batch_size", "dtype", "attention", "software", "model")
"""Fields in which a difference makes two times of different things."""


def protocol(recipe: Recipe, subject: Subject, data: dict[str, Any]) -> dict[str, Any]:
    """What a figure depends on: model, data, precision, software, hardware, seed.

    Args:
        recipe: its stages are not part of the protocol, but for their family.
        subject: the model, before any method is applied.
        data: the evaluation data as its pipeline describes it.
    """
    source = recipe.model
    model = {"name": source.name, "fingerprint": fingerprint(subject.model)}
    model |= {name: getattr(source, name) for name in ("revision", "weights") if getattr(source, name)}
    return {
        "family": recipe.stages[-1].family,
        "model": model | ({"random_weights": recipe.seed} if source.random_weights else {}),
        "data": data,
        "dtype": recipe.dtype,
        "attention": attention_kernel(subject.model),
        "batch_size": recipe.batch_size,
        "seed": recipe.seed,
        "device": device_name(recipe.device),
        "hardware": hardware(),
        "software": versions(),
    }


def fingerprint(model: nn.Module) -> str:
    """A short hash of names, shapes, and the values at both ends of every parameter: retraining changes it."""
    digest = hashlib.sha256()
    for name, parameter in named_parameters(model):
        values = ends(parameter.detach(), SAMPLED).float().cpu()
        digest.update(f"{name}{tuple(parameter.shape)}".encode() + values.numpy().tobytes())
    return digest.hexdigest()[:16]


def attention_kernel(model: nn.Module) -> str | None:
    """How the model attends: transformers' name for it; "sdpa" or "eager" for timm."""
    if hasattr(model, "config"):
        return getattr(model.config.get_text_config(), "_attn_implementation", None)
    fused = [module.fused_attn for module in model.modules() if hasattr(module, "fused_attn")]
    return None if not fused else "sdpa" if all(fused) else "eager"


def device_name(device: str) -> str:
    """A GPU by its product's name."""
    return device if torch.device(device).type != "cuda" else torch.cuda.get_device_name(device)


def hardware() -> dict[str, Any]:
    """The processor, how many cores this process may use, and on how many threads torch computes."""
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "cpu": processor(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }


def processor() -> str:
    """The processor's own name where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or "unknown")


def versions() -> dict[str, str]:
    """The software that computed."""
    from importlib.metadata import version

    names = ("tprune", "torch", "transformers", "timm")
    return {name: version(name) for name in names} | {"python": platform.python_version()}


def key(content: Any) -> str:
    """sha256 of plain nested values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def of_quality(protocol: dict[str, Any]) -> dict[str, Any]:
    """What points of one plot share: all but the seed, and but for what decides speed where none was measured."""
    hidden = ("seed",) if protocol.get("latency") else ("seed", *SPEED_ONLY)
    return {name: value for name, value in protocol.items() if name not in hidden}


def flat(protocol: dict[str, Any], outer: str = "") -> dict[str, Any]:
    """Nested fields as `outer.inner`."""
    fields: dict[str, Any] = {}
    for name, value in protocol.items():
        fields |= flat(value, f"{outer}{name}.") if isinstance(value, dict) else {f"{outer}{name}": value}
    return fields


def differing(protocols: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """The fields in which the protocols differ, each with every protocol's value."""
    rows = [flat(protocol) for protocol in protocols]
    names = dict.fromkeys(name for row in rows for name in row)
    table = {name: [row.get(name) for row in rows] for name in names}
    return {name: values for name, values in table.items() if any(value != values[0] for value in values)}


def incomparable(differences: dict[str, list[Any]]) -> dict[str, list[str]]:
    """Which of the differing fields forbid to compare quality, and which speed."""
    outer = {name: name.split(".")[0] for name in differences}
    return {
        "quality": [name for name in differences if outer[name] in OF_QUALITY],
        "speed": [name for name in differences if outer[name] in OF_SPEED],
    }
