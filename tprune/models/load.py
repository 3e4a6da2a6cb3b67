"""From where a model comes from to a model in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tprune.errors import UserError
from tprune.models import shapes, vision_blocks
from tprune.models.load_transformers import load_transformers
from tprune.models.loading import guard, replace_weights, seeded
from tprune.models.source import Source
from tprune.models.subject import Subject


def load(source: Source, family: str, *, device: str, dtype: str, seed: int) -> Subject:
    """The model in eval mode on `device` in `dtype`, with its processor.

    Raises:
        UserError: it cannot be had, is damaged, or is of no kind that the family prunes.
    """
    precision = getattr(torch, dtype)
    subject = (
        _timm(source, seed)
        if source.library == "timm"
        else load_transformers(source, family, precision, seed)
    )
    subject.model.requires_grad_(False).eval().to(device=device)
    if source.library == "timm":
        # transformers loads in `dtype` itself, all but what it keeps in float32, such as the frequencies of RoPE.
        subject.model.to(dtype=precision)
    return subject


def _timm(source: Source, seed: int) -> Subject:
    import timm

    import tprune.models.vim  # noqa: F401  (registers its models with timm)

    name = f"local-dir:{source.location}" if source.kind == "folder" else source.location
    if source.kind == "timm" and not timm.is_model(name):
        raise UserError(
            f"no model '{source.name}': not built in, no folder, and timm does not know it; tprune zoo list names the "
            "built-in ones"
        )
    rows = vision_blocks.own_shapes(source)
    with seeded(seed):
        if source.weights or source.random_weights or rows:
            model = guard(source, lambda: timm.create_model(name, pretrained=False))
        else:
            model = guard(source, lambda: timm.create_model(name, pretrained=True))
    if rows:
        shapes.restore(vision_blocks.find_vision(model), rows)
    if source.weights or (rows and not source.random_weights):
        replace_weights(model, source.weights or f"{source.location}/model.safetensors")
    return Subject(model, timm_transform(model), source)


def in_timm(name: str) -> bool:
    """Whether timm knows a model of this name."""
    import timm

    return timm.is_model(name)


def timm_transform(model: nn.Module) -> Callable[[Any], torch.Tensor]:
    """What a timm model's evaluation makes of an image, [3, H, W], of the size the model was built for."""
    from timm.data import create_transform, resolve_model_data_config

    patches = getattr(model, "patch_embed", None)
    built = getattr(patches, "img_size", None)
    size = {} if built is None else {"input_size": (patches.proj.in_channels, *built)}
    return create_transform(**resolve_model_data_config(model, size), is_training=False)
