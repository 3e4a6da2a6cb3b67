"""Preprocessed images back as pictures: what the model saw, for people."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def normalisation(processor: Any) -> tuple[Any, Any] | None:
    """The mean and deviation per channel that `processor` normalises with; None where it says nothing."""
    for step in getattr(processor, "transforms", []):
        if hasattr(step, "mean") and hasattr(step, "std"):
            return step.mean, step.std
    reader = getattr(processor, "image_processor", processor)
    if getattr(reader, "image_mean", None) is not None and getattr(reader, "do_normalize", True):
        return reader.image_mean, reader.image_std
    return None


def as_image(pixels: Tensor, processor: Any) -> np.ndarray:
    """`pixels` [C, H, W] as `processor` made them -> uint8 [H, W, 3].

    Where the processor does not say how it normalises, the darkest value is black and the brightest white.
    """
    pixels = pixels.detach().float().cpu()
    known = normalisation(processor)
    if known is not None:
        mean, deviation = (torch.as_tensor(part, dtype=torch.float32).view(-1, 1, 1) for part in known)
        pixels = pixels * deviation + mean
    else:
        low, high = pixels.min(), pixels.max()
        pixels = (pixels - low) / (high - low).clamp_min(1e-8)
    image = (255 * pixels.clamp(0, 1)).round().to(torch.uint8).permute(1, 2, 0)
    return image.expand(-1, -1, 3).numpy()
