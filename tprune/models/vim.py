"""Vision Mamba (Vim), the state-space model for images that no maintained package offers, in plain torch.

After Zhu et al., "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model" (ICML
2024, arXiv 2401.09417, hustvl/Vim): a forward and a backward scan in every block, halved and summed, the class token in
the middle of the patches, absolute positions. Parameters have the names of the authors' checkpoints of the models
"…bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from timm.layers import PatchEmbed, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional

from tprune.core.scan import causal_convolution, selective_scan

__all__ = ["VisionMamba"]

Gaps = tuple[Tensor, Tensor]
"""How many tokens have left just before and just after each token, float [B, L] each."""


class Mixer(nn.Module):
    """A gated pair of selective scans, one in each direction.

    Args:
        width: of a token.
        states: of the scan, per channel.
        kernel: of the convolution before it.

    Attributes:
        observe: called with the backward scan's gated output [B, E, L] in the order of the tokens, or None.
    """

    def __init__(self, width: int, states: int = 16, kernel: int = 4):
        super().__init__()
        inner, rank = 2 * width, math.ceil(width / 16)
        self.states, self.rank = states, rank
        self.observe: Callable[[Tensor], None] | None = None
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        for suffix in ("", "_b"):
            convolution = nn.Conv1d(inner, inner, kernel, groups=inner, padding=kernel - 1)
            step = nn.Linear(rank, inner)
            nn.init.uniform_(step.weight, -(rank**-0.5), rank**-0.5)
            begin = torch.exp(torch.rand(inner) * math.log(100) + math.log(1e-3)).clamp_min(1e-4)
            step.bias.data.copy_(begin + torch.log(-torch.expm1(-begin)))
            setattr(self, f"conv1d{suffix}", convolution)
            setattr(self, f"x_proj{suffix}", nn.Linear(inner, rank + 2 * states, bias=False))
            setattr(self, f"dt_proj{suffix}", step)
            setattr(self, f"D{suffix}", nn.Parameter(torch.ones(inner)))
        rates = torch.arange(1, states + 1, dtype=torch.float32).log().repeat(inner, 1)
        self.A_log, self.A_b_log = nn.Parameter(rates), nn.Parameter(rates.clone())
        self.out_proj = nn.Linear(inner, width, bias=False)

    def forward(self, hidden: Tensor, gaps: Gaps | None = None) -> Tensor:
        """[B, L, D] -> [B, L, D]; tokens that have left in between (`gaps`) let the state decay."""
        x, gate = self.in_proj(hidden).transpose(1, 2).chunk(2, 1)
        before, after = (None, None) if gaps is None else (gaps[0], gaps[1].flip(-1))
        forth = self._scan(x, gate, "", self.A_log, before)
        back = self._scan(x.flip(-1), gate.flip(-1), "_b", self.A_b_log, after).flip(-1)
        if self.observe is not None:
            self.observe(back)
        return self.out_proj(((forth + back) / 2).transpose(1, 2))

    def _scan(self, x: Tensor, gate: Tensor, suffix: str, rates: Tensor, gap: Tensor | None) -> Tensor:
        """One direction: x, gate [B, E, L] -> [B, E, L].

        A token that has left has no content, and the step of one without content: softplus of the bias.
        """
        convolution, project, step = (
            getattr(self, f"{name}{suffix}") for name in ("conv1d", "x_proj", "dt_proj")
        )
        skip = getattr(self, f"D{suffix}")
        x = functional.silu(causal_convolution(x, convolution.weight, convolution.bias))
        sizes = (self.rank, self.states, self.states)
        low, into, out = project(x.transpose(1, 2)).split(sizes, -1)
        width = functional.softplus((low @ step.weight.T).float() + step.bias.float()).transpose(1, 2)
        idle = None
        if gap is not None:
            idle = gap.unsqueeze(1) * functional.softplus(step.bias.float()).unsqueeze(-1)
        y = selective_scan(x, width, -rates.float().exp(), into.transpose(1, 2), out.transpose(1, 2), idle)
        return ((y + x.float() * skip.float().unsqueeze(-1)) * functional.silu(gate.float())).to(x.dtype)


class Block(nn.Module):
    """Adds what the block before made to the residual stream, normalises it and mixes it."""

    def __init__(self, width: int):
        super().__init__()
        self.norm, self.mixer = nn.RMSNorm(width, eps=1e-5), Mixer(width)

    def forward(
        self, hidden: Tensor, residual: Tensor | None = None, gaps: Gaps | None = None
    ) -> tuple[Tensor, Tensor]:
        """hidden [B, L, D] and residual float32 [B, L, D] -> the same two."""
        residual = add(hidden, residual)
        return self.mixer(normalise(self.norm, residual, hidden.dtype), gaps), residual


def add(hidden: Tensor, residual: Tensor | None) -> Tensor:
    """The residual stream, in float32."""
    return hidden.float() if residual is None else residual + hidden.float()


def normalise(norm: nn.RMSNorm, residual: Tensor, dtype: torch.dtype) -> Tensor:
    """`norm` of the float32 residual stream, in the model's precision."""
    return functional.rms_norm(residual, norm.normalized_shape, norm.weight.float(), norm.eps).to(dtype)


class VisionMamba(nn.Module):
    """Image classifier of bidirectional Mamba blocks.

    Args:
        img_size, patch_size, in_chans, num_classes, embed_dim, depth: as timm's models have them.
    """

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 192,
        depth: int = 24,
    ):
        super().__init__()
        self.num_classes, self.embed_dim, self.num_features = num_classes, embed_dim, embed_dim
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.patch_embed.num_patches + 1, embed_dim))
        self.layers = nn.ModuleList(Block(embed_dim) for _ in range(depth))
        self.norm_f = nn.RMSNorm(embed_dim, eps=1e-5)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        for parameter in (self.cls_token, self.pos_embed):
            trunc_normal_(parameter, std=0.02)
        for block in self.layers:
            block.mixer.out_proj.weight.data.div_(math.sqrt(depth))

    def no_weight_decay(self) -> set[str]:
        """Parameters that are no matrices of a linear map."""
        return {"cls_token", "pos_embed"} | {n for n, _ in self.named_parameters() if n.endswith("_log")}

    def forward_features(self, pixels: Tensor) -> Tensor:
        """Normalised tokens [B, L, D], the class token in the middle."""
        x = self.patch_embed(pixels)
        middle = x.shape[1] // 2
        head = self.cls_token.expand(len(x), -1, -1)
        hidden = torch.cat([x[:, :middle], head, x[:, middle:]], 1) + self.pos_embed
        residual = None
        for block in self.layers:
            hidden, residual = block(hidden, residual)
        return normalise(self.norm_f, add(hidden, residual), hidden.dtype)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits [B, C] of images [B, 3, H, W]."""
        features = self.forward_features(pixels)
        return self.head(features[:, (features.shape[1] - 1) // 2])


def _settings(**more: Any) -> dict[str, Any]:
    usual = {
        "input_size": (3, 224, 224),
        "num_classes": 1000,
        "pool_size": None,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    return usual | more


default_cfgs = generate_default_cfgs(
    {"vim_tiny_patch16_224": _settings(), "vim_small_patch16_224": _settings()}
)


def _built(variant: str, pretrained: bool, **arguments: Any) -> VisionMamba:
    return build_model_with_cfg(VisionMamba, variant, pretrained, **arguments)


@register_model
def vim_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-Ti: 24 blocks of width 192."""
    return _built("vim_tiny_patch16_224", pretrained, **{"embed_dim": 192, "depth": 24} | kwargs)


@register_model
def vim_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-S: 24 blocks of width 384."""
    return _built("vim_small_patch16_224", pretrained, **{"embed_dim": 384, "depth": 24} | kwargs)
