"""BAViT's small ViT, and how it learns what foreground is: from what covers every patch of annotated images."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import nn
from torch.nn import functional

from tprune.methods.fit import Fit, Plan


class Small(nn.Module):
    """A ViT without class token and with two outputs per patch: background, foreground.

    Args:
        tokens: patches of an image.
        patch: channels, rows and columns of a patch.
        width, heads, blocks: its size.
    """

    def __init__(self, tokens, patch, width, heads, blocks):
        super().__init__()
        self.embed = nn.Conv2d(patch[0], width, patch[1:], patch[1:])
        self.position = nn.Parameter(torch.zeros(1, tokens, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, 2)

    def forward(self, pixels):
        """Logits [B, N, 2] of images [B, C, H, W] of the size it was built for."""
        x = self.embed(pixels).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        """[B, N, D] -> [B, N, D]."""
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        seen = functional.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
        x = x + self.proj(seen.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norm2(x))


@lru_cache(maxsize=8)
def skeleton(tokens, patch, width, heads, blocks):
    """A `Small` without values of its own."""
    with torch.device("meta"):
        return Small(tokens, patch, width, heads, blocks).eval()


class Foreground(Fit):
    """The small ViT by itself, per-token cross-entropy; the detector stands by."""

    apart = True
    sites = ()

    def __init__(self, method, shape, seed):
        super().__init__(shape)
        self.overlap = method.overlap
        self.plan = Plan(
            method.epochs, method.batch, method.lr, warmup=method.warmup, weight_decay=method.weight_decay
        )
        generator = torch.Generator().manual_seed(seed)
        self.small = Small(shape.tokens, shape.patch, method.width, method.heads, method.blocks)
        for name, parameter in self.small.named_parameters():
            if parameter.dim() > 1:
                nn.init.trunc_normal_(parameter, std=0.02, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def losses(self, outputs, labels, memory, dense):
        """The mean over images and patches of -log p(what the patch is): the paper's accumulative cross-entropy.

        `labels` [B, N, names] says how much of a patch each name covers, the last one being none.
        """
        foreground = (1 - labels[..., -1] >= self.overlap).long()
        return {
            "patches": functional.cross_entropy(
                self.small(memory["inputs"]).flatten(0, 1), foreground.flatten()
            )
        }

    def state(self):
        """The small ViT."""
        return {name: tensor.detach().clone() for name, tensor in self.small.state_dict().items()}
