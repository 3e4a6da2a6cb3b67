"""A method's selection alone, at the size of LLaVA-1.5: 576 image tokens of width 4,096 in a prompt of 652."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from tprune.core.budget import PROJECTOR
from tprune.core.reduction import Reduction
from tprune.methods.base import Shape, TokenMethod
from tprune.methods.views import Attention, TokenView

IMAGE, WIDTH, HEADS, BEFORE, BEHIND, KEPT = 576, 4096, 32, 35, 41, 64
PATCH_WIDTH, PATCH_HEADS = 1024, 16


def selection(method: TokenMethod, device: torch.device | str) -> Callable[[], Reduction]:
    """A call that chooses 64 of 576 tokens of noise, as at the first site of `method`."""
    shape = Shape(32, IMAGE, heads=HEADS, has_cls=True)
    site = min(stage.site for stage in method.stages(shape, KEPT / IMAGE))
    view = _image(device) if site == PROJECTOR else _prompt(device)
    return lambda: method.reduce(site, view, KEPT, {})


def _noise(*shape: int, device: torch.device | str) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)


def _image(device: torch.device | str) -> TokenView:
    """The projected tokens of one image, with what CLIP-L/14-336 saw of it."""
    patches = _noise(1, PATCH_HEADS, 1 + IMAGE, PATCH_WIDTH // PATCH_HEADS, device=device)
    everything = torch.ones(1, IMAGE, dtype=torch.bool, device=device)
    hidden = _noise(1, IMAGE, WIDTH, device=device)
    attention = Attention(patches, patches, patches, patches.shape[-1] ** -0.5)
    encoder = TokenView(hidden, everything, prefix=1, attention=attention)
    seeds = torch.zeros(1, dtype=torch.int64)
    return TokenView(
        hidden, everything, depth=32, real=everything, encoder=encoder, pool=lambda score: score, seeds=seeds
    )


def _prompt(device: torch.device | str) -> TokenView:
    """A whole prompt in the decoder of a 7B model."""
    length = BEFORE + IMAGE + BEHIND
    hidden = _noise(1, length, WIDTH, device=device)
    heads = hidden.unflatten(2, (HEADS, -1)).transpose(1, 2).contiguous()
    norm = nn.RMSNorm(WIDTH, device=device)
    prunable = torch.zeros(1, length, dtype=torch.bool, device=device)
    prunable[:, BEFORE : BEFORE + IMAGE] = True
    return TokenView(
        hidden,
        prunable,
        depth=32,
        whole=False,
        real=torch.ones_like(prunable),
        attention=Attention(heads, heads, heads, heads.shape[-1] ** -0.5, causal=True),
        seeds=torch.zeros(1, dtype=torch.int64),
        signals={"final_norm": lambda: norm(hidden)},
    )
