"""A tiny VideoMAE, and clips for it."""

import numpy as np
import torch
from PIL import Image

SMALL = {
    "image_size": 16,
    "patch_size": 8,
    "num_frames": 8,
    "tubelet_size": 2,
    "hidden_size": 24,
    "num_hidden_layers": 6,
    "num_attention_heads": 3,
    "intermediate_size": 48,
    "num_labels": 2,
}
"""4 frames of 4 tokens each."""


def videomae(**changes):
    """A classifier of clips with weights drawn from a fixed seed."""
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.VideoMAEConfig(**{**SMALL, **changes})
        model = transformers.VideoMAEForVideoClassification(config).eval().requires_grad_(False)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return model


def noise(count=2, frames=8):
    """Clips [count, frames, 3, 16, 16]."""
    return torch.randn(count, frames, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def save_clips(root, classes=("jump", "run"), clips=2, frames=8):
    """A folder of CLASS/CLIP/FRAME.png; the first pixel of a frame is its number."""
    draw = np.random.default_rng(0)
    for label in classes:
        for clip in range(clips):
            folder = root / label / f"clip-{clip}"
            folder.mkdir(parents=True)
            for frame in range(frames):
                pixels = draw.integers(0, 255, (20, 24, 3), dtype=np.uint8)
                pixels[0, 0] = frame
                Image.fromarray(pixels).save(folder / f"{frame:03}.png")
    return root


def save_model(folder):
    """The tiny classifier with its preprocessing on disk."""
    import transformers

    side = {"height": 16, "width": 16}
    videomae().save_pretrained(folder)
    transformers.VideoMAEImageProcessor(size={"shortest_edge": 16}, crop_size=side).save_pretrained(folder)
    return folder
