"""`digits-vit`: a stock timm `VisionTransformer` that reads the one large digit in a cluttered 96x96 scene.

Every patch is asked which digit it belongs to, or none: this teaches the patches what a stroke is part of, long
before CLS could. Training goes in four legs:

1. a third of the blocks, the others being exact identities (their output projections start at zero), learns to name
   the patches of mosaics of four digits;
2. the same blocks learn the scenes themselves, CLS the class and the patches their names;
3. all twelve blocks;
4. again, from a lower learning rate.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.torch import save_file
from timm.layers import build_sincos2d_pos_embed
from torch import Tensor, nn
from torch.nn import functional as F

from tprune.data import scenes
from tprune.zoo.train import Learner, Stage, only_blocks

ARCHITECTURE = "vit_tiny_patch16_224"
PATCH = 8
SIDE = scenes.SIZE // PATCH
WIDTH = 96
MEAN, STD = 0.25, 0.2
MODEL_ARGS = {
    "img_size": scenes.SIZE,
    "patch_size": PATCH,
    "embed_dim": WIDTH,
    "depth": 12,
    "num_heads": 4,
    "mlp_ratio": 2.0,
}
FIRST_BLOCKS = (1, 4, 7, 10)
BACKGROUND = 10


class DigitsVit(Learner):
    """The classifier and a linear head that names each patch."""

    stages = (
        Stage("mosaics", 900, 16, 1.5e-3),
        Stage("four blocks", 600, 16, 1e-3),
        Stage("twelve blocks", 2500, 16, 5e-4),
        Stage("twelve blocks again", 1800, 16, 3e-4),
    )

    def __init__(self):
        super().__init__()
        self.model = timm.create_model(ARCHITECTURE, num_classes=10, **MODEL_ARGS)
        self.patch_head = nn.Linear(WIDTH, BACKGROUND + 1)
        with torch.no_grad():
            self.model.pos_embed[0, 1:] = position_embedding()
            for block in self.model.blocks:
                query, key, _ = block.attn.qkv.weight.chunk(3)
                look_near(query, key)
                block.attn.proj.weight.zero_()
                block.mlp.fc2.weight.zero_()

    def loss(self, stage: str, indices: Sequence[int], seed: int) -> Tensor:
        """Cross-entropy of every patch's name and, after the first leg, of the scene's class."""
        make = _mosaic if stage == "mosaics" else _example
        pixels, labels, names = zip(*(make(i, seed) for i in indices), strict=True)
        chosen = range(MODEL_ARGS["depth"]) if stage.startswith("twelve") else FIRST_BLOCKS
        with only_blocks(self.model, "blocks", chosen):
            tokens = self.model.forward_features(normalised(np.stack(pixels)))  # [B, 1 + 144, D]
        patch_logits = self.patch_head(tokens[:, 1:]).flatten(0, 1)
        patch_loss = F.cross_entropy(patch_logits, torch.from_numpy(np.stack(names)).flatten())
        if stage == "mosaics":
            return patch_loss
        return patch_loss + F.cross_entropy(self.model.forward_head(tokens), torch.tensor(labels))

    @torch.inference_mode()
    def accuracy(self, n: int) -> dict:
        """Top-1 accuracy on the evaluation scenes."""
        right = 0
        for start in range(0, n, 100):
            batch = [
                scenes.classification_scene("test", i, scenes.EVALUATION_SEED)
                for i in range(start, min(n, start + 100))
            ]
            guess = self.model(normalised(np.stack([pixels for pixels, _, _ in batch]))).argmax(-1)
            right += int((guess == torch.tensor([label for _, label, _ in batch])).sum())
        return {"accuracy": right / n}

    def save(self, folder: Path) -> None:
        """Write `config.json` and `model.safetensors` as `timm.create_model("local-dir:…")` reads them."""
        preprocessing = {
            "input_size": [3, scenes.SIZE, scenes.SIZE],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "mean": [MEAN] * 3,
            "std": [STD] * 3,
            "num_classes": 10,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "label_names": list(scenes.DIGITS),
        }
        config = {
            "architecture": ARCHITECTURE,
            "num_classes": 10,
            "num_features": WIDTH,
            "global_pool": "token",
            "model_args": MODEL_ARGS,
            "pretrained_cfg": preprocessing,
        }
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        weights = {name: tensor.contiguous() for name, tensor in self.model.state_dict().items()}
        save_file(weights, folder / "model.safetensors", {"format": "pt"})


def position_embedding() -> Tensor:
    """Sines and cosines of each patch's row and column, [144, D], in wavelengths that suit a grid of twelve."""
    return 0.7 * build_sincos2d_pos_embed([SIDE, SIDE], WIDTH, temperature=20.0)


def look_near(query: Tensor, key: Tensor) -> None:
    """Start queries and keys as the same random projection, so that attention begins where positions are alike."""
    nn.init.normal_(query, std=WIDTH**-0.5)
    query *= 1.2
    key.copy_(query)


def normalised(pixels: np.ndarray) -> Tensor:
    """Images [B, 96, 96, 3] uint8 to model input [B, 3, 96, 96]."""
    return ((torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - MEAN) / STD).contiguous()


def _example(index: int, seed: int) -> tuple[np.ndarray, int, np.ndarray]:
    """A training scene: pixels, class, and each patch's name [144], the digit's class inside it, else background."""
    pixels, label, (top, left, height, width) = scenes.classification_scene("train", index, seed)
    centre = (top + height / 2, left + width / 2)
    return pixels, label, _names([label], [centre], 0.42 * height)


def _mosaic(index: int, seed: int) -> tuple[np.ndarray, int, np.ndarray]:
    """A mosaic: pixels, no class (-1), and each patch's name [144]."""
    pixels, labels, centres = scenes.mosaic_scene("train", index, seed)
    return pixels, -1, _names(labels, centres, 17)


def _names(labels, centres, reach: float) -> np.ndarray:
    """Each patch's name [144]: the class of the digit whose centre is within `reach` pixels, else background."""
    middle = (np.arange(SIDE) + 0.5) * PATCH
    names = np.full((SIDE, SIDE), BACKGROUND)
    for label, (row, col) in zip(labels, centres, strict=True):
        names[np.hypot(middle[:, None] - row, middle - col) < reach] = label
    return names.flatten()
