"""What glimpseprune learns: a token of its own behind the prompt, and a predictor of which image tokens it needs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from tprune.core.attending import attention_logits

BASE = 10_000.0
"""Of the rotary embeddings of rows and columns."""


class Glimpse(nn.Module):
    """The token and the predictor.

    Args:
        depth, width, heads: of the decoder.
        tower: width of the tower.
        inner: width of the predictor's tokens.
        condition: width of what it takes of the tower.
        blocks: how many it has.
        own_heads: of their attention; inner + condition is a multiple of four times as many.
    """

    def __init__(
        self,
        depth: int,
        width: int,
        heads: int,
        tower: int,
        inner: int,
        condition: int,
        blocks: int,
        own_heads: int,
    ):
        super().__init__()
        self.token = nn.Parameter(torch.empty(depth, width))
        self.project = nn.Linear(width, width)
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.enter = nn.Linear(heads, inner)
        self.conditions = nn.ModuleList(nn.Linear(tower, condition) for _ in range(blocks))
        self.blocks = nn.ModuleList(Block(inner, condition, own_heads) for _ in range(blocks))
        self.leave = nn.Linear(inner, 1)

    def begin(self, generator: torch.Generator) -> Glimpse:
        """Itself, with the authors' initial values drawn from `generator`."""
        for name, parameter in self.named_parameters():
            if name == "token":
                nn.init.normal_(parameter, std=0.02, generator=generator)
            elif parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter, generator=generator)
            else:
                nn.init.constant_(parameter, float("norm" in name and name.endswith("weight")))
        return self

    def added(self) -> Tensor:
        """What is added to the token before every layer: RMSNorm(W e_l + b), [L, D]."""
        return self.norm(self.project(self.token))

    def asked(self, view, attention, log_probabilities: bool) -> Tensor:
        """The logit of every token of a prompt, float32 [B, N]; only those of image tokens mean something.

        Args:
            view: of the prompt, with the signals "encoded" and "cells".
            attention: of the token of its own.
            log_probabilities: whether the predictor reads the logarithm of the attention, or its logits.
        """
        looks = attention_logits(attention.query, attention.key, attention.scale, attention.bias)
        looks = looks.log_softmax(-1) if log_probabilities else looks
        looks = looks[:, :, 0, : view.prunable.shape[1]].transpose(1, 2)
        encoded = [one.float() for one in view.signal("encoded")]
        looks = looks.masked_fill(~view.prunable.unsqueeze(2), 0)
        return self(looks, encoded, view.signal("cells"), view.prunable)

    def forward(self, looks: Tensor, encoded: list[Tensor], cells: Tensor, image: Tensor) -> Tensor:
        """The logit of every token, float32 [B, N].

        Args:
            looks: float32 [B, N, H], what the token pays each in every head.
            encoded: for every block float32 [B, N, C], what the tower made of it.
            cells: int64 [B, N, 3], its crop, row and column; tokens of one crop see each other.
            image: bool [B, N], which are image tokens.
        """
        x = self.enter(looks)
        crop = cells[..., 0]
        seen = (crop.unsqueeze(1) == crop.unsqueeze(2)) & image.unsqueeze(1) & image.unsqueeze(2)
        seen = seen | torch.eye(seen.shape[1], dtype=torch.bool, device=seen.device)
        for take, block, made in zip(self.conditions, self.blocks, encoded, strict=True):
            x = block(x, take(made), cells[..., 1:], seen.unsqueeze(1))
        return self.leave(x)[..., 0]


class Block(nn.Module):
    """Attention among image tokens, asked by what they are and what the tower made of them, and a gated MLP."""

    def __init__(self, width: int, condition: int, heads: int):
        super().__init__()
        self.heads, both = heads, width + condition
        self.norm_attention, self.norm_mlp = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        self.query, self.key = nn.Linear(both, both, bias=False), nn.Linear(both, both, bias=False)
        self.value, self.out = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.gate, self.up = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor, condition: Tensor, place: Tensor, seen: Tensor) -> Tensor:
        """x [B, N, W], condition [B, N, Q], place int64 [B, N, 2], seen bool [B, 1, N, N] -> [B, N, W]."""
        normal = self.norm_attention(x)
        both = torch.cat([normal, condition], dim=2)
        query, key, value = (
            part(of).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part, of in ((self.query, both), (self.key, both), (self.value, normal))
        )
        query, key = turned(query, place), turned(key, place)
        # Fused kernels want values as wide as keys; without one the whole map would be computed.
        width = value.shape[3]
        value = functional.pad(value, (0, key.shape[3] - width))
        read = functional.scaled_dot_product_attention(query, key, value, seen)[..., :width]
        x = x + self.out(read.transpose(1, 2).flatten(2))
        normal = self.norm_mlp(x)
        return x + self.down(functional.silu(self.gate(normal)) * self.up(normal))


def turned(x: Tensor, place: Tensor) -> Tensor:
    """x [B, H, N, d] with rotary embeddings of rows and columns `place` [B, N, 2], as Qwen2-VL's tower has them."""
    half = x.shape[-1] // 2
    speed = BASE ** (-torch.arange(0, half, 2, dtype=torch.float32, device=x.device) / half)
    angle = (place.unsqueeze(3) * speed).flatten(2)[:, None]
    angle = torch.cat([angle, angle], dim=-1)
    low, high = x.split(half, dim=-1)
    return x * angle.cos() + torch.cat([-high, low], dim=-1) * angle.sin()
