"""Vision transformers of timm and transformers: what they are fed, and what they answer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tprune.errors import UserError
from tprune.models.anatomy import clip_length, detects
from tprune.models.load import timm_transform
from tprune.models.subject import Subject


def pixels(subject: Subject, image: Any) -> Tensor:
    """One image as the model's own preprocessing makes it, [3, H, W]; the frames of a clip, [F, 3, H, W].

    Raises:
        UserError: a model of transformers without a processor.
    """
    if subject.source.library == "timm":
        subject.processor = subject.processor or timm_transform(subject.model)
        return subject.processor(image)
    if subject.processor is None:
        raise UserError(
            f"{subject.source.name} has no preprocessor_config.json; copy it from the model's origin"
        )
    size = {}
    if detects(subject.model):
        # Its processor would keep an image's proportions; a batch has one size, the model's.
        *_, rows, columns = input_size(subject.model)
        size = {"size": {"height": rows, "width": columns}}
    return subject.processor(images=image, return_tensors="pt", **size)["pixel_values"][0]


def answers(model: nn.Module, batch: Tensor) -> Tensor:
    """Logits [B, C], of a detector's queries [B, Q, C], or pooled features where there is no classifier [B, D]."""
    parameter = next(model.parameters())
    found = model(batch.to(parameter.device, parameter.dtype))
    if isinstance(found, Tensor):
        return found.float()
    for name in ("logits", "image_embeds", "pooler_output"):
        if getattr(found, name, None) is not None:
            return getattr(found, name).float()
    return found.last_hidden_state.mean(1).float()


def noise(model: nn.Module, count: int, seed: int) -> Tensor:
    """Images drawn from the seed, [count, 3, H, W]; clips, [count, F, 3, H, W]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *input_size(model), generator=generator)


def unit(model: nn.Module) -> str:
    """What the model sees, in the plural."""
    return "clips" if clip_length(model) else "images"


def input_size(model: nn.Module) -> tuple[int, ...]:
    """Channels, rows, columns of an input image; frames before them where it is a clip."""
    if hasattr(model, "config"):
        config = getattr(model.config, "vision_config", model.config)
        size = config.image_size
        rows, columns = size if isinstance(size, tuple | list) else (size, size)
        frames = clip_length(model)
        return *((frames,) if frames else ()), getattr(config, "num_channels", 3), rows, columns
    rows, columns = model.patch_embed.img_size
    return model.patch_embed.proj.in_channels, rows, columns
