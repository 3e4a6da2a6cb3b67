"""A method's selection alone, at the size of LLaVA-1.5: 576 image tokens of width 4,096 in a prompt of 652."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import torch
from torch import nn

from tprune.core import select
from tprune.core.budget import PROJECTOR
from tprune.core.reduction import Reduction
from tprune.methods.attention import Attention
from tprune.methods.token_view import TokenView
from tprune.methods.tokens import Shape, TokenMethod
from tprune.pipelines.tokens import for_timing

IMAGE, WIDTH, HEADS, BEFORE, BEHIND, KEPT = 576, 4096, 32, 35, 41, 64
NEURONS = 11008
PATCH = (3, 14, 14)
PATCH_WIDTH, PATCH_HEADS, TOWER_DEPTH, GRID = 1024, 16, 24, 24


def selection(method: TokenMethod, device: torch.device | str) -> Callable[[], Reduction]:
    """A call that chooses 64 of 576 tokens of noise, as at the first site of `method`."""
    if method.evicts():
        return partial(_best_of_heads, method, _prompt(device))
    shape = Shape(32, IMAGE, heads=HEADS, has_cls=True, width=WIDTH, tower=PATCH_WIDTH, patch=PATCH)
    # What it learned in a smaller model does not fit.
    method = for_timing(method, shape, 0, device)
    site = min(stage.site for stage in method.stages(shape, KEPT / IMAGE))
    view = (
        _image(method, device) if site == PROJECTOR else _prompt(device, method.encoder_blocks(TOWER_DEPTH))
    )
    return lambda: method.reduce(site, view, KEPT, {"episode": {}})


def _best_of_heads(method: TokenMethod, view: TokenView) -> Reduction:
    """What every head of one layer keeps in its cache; a head is a row."""
    worth, _ = method.worth(view.attention, view.prunable, view.last)
    index, valid = select.keep_prunable_top(worth[0], KEPT, view.prunable.expand(worth.shape[1], -1))
    return Reduction.keep(index, view.hidden.shape[1], valid)


def _noise(*shape: int, device: torch.device | str) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)


def _image(method: TokenMethod, device: torch.device | str) -> TokenView:
    """The projected tokens of one image, with what CLIP-L/14-336 saw of it, and a question of 41 tokens."""
    prefix = torch.arange(1 + IMAGE, device=device) == 0
    patches = _noise(1, PATCH_HEADS, 1 + IMAGE, PATCH_WIDTH // PATCH_HEADS, device=device)
    attention = Attention(patches, patches, patches, patches.shape[-1] ** -0.5)
    tower = TokenView(
        patches.transpose(1, 2).flatten(2),
        ~prefix[None],
        prefix=1,
        depth=TOWER_DEPTH,
        has_cls=True,
        attention=attention,
    )
    view = TokenView(_noise(1, IMAGE, WIDTH, device=device), ~prefix[None, 1:], depth=32, grid=(GRID, GRID))
    if method.projects:
        view.hidden, view.prunable, view.prefix, view.has_cls = tower.hidden, tower.prunable, 1, True
    view.real, view.encoder, view.pool = view.prunable, tower, lambda x: x
    view.encoders = dict.fromkeys([TOWER_DEPTH - 2, *method.encoder_blocks(TOWER_DEPTH)], tower)
    view.seeds = torch.zeros(1, dtype=torch.int64)
    project = nn.Sequential(nn.Linear(PATCH_WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)).to(device)
    text = TokenView(_noise(1, BEHIND, WIDTH, device=device), torch.zeros(1, BEHIND, dtype=torch.bool))
    text.real = ~text.prunable.to(device)
    text.signals["reworded"] = lambda: lambda rewrite: text
    view.signals = {
        "features": lambda: tower.hidden[:, 1:],
        "projector": lambda: project,
        "text": lambda: text,
        "patches": lambda: _noise(1, IMAGE, 3, 14 * 14, device=device).sigmoid(),
        "pixels": lambda: _noise(1, IMAGE, *PATCH, device=device),
        "thumbnail": lambda: ~prefix[None, 1:],
        "newlines": lambda: torch.zeros(1, IMAGE, dtype=torch.bool, device=device),
        "rows": lambda: torch.zeros(1, dtype=torch.int64, device=device),
    }
    return view


def _prompt(device: torch.device | str, blocks: Sequence[int] = ()) -> TokenView:
    """A whole prompt in the decoder of a 7B model; the method sees so many blocks of the tower there."""
    length = BEFORE + IMAGE + BEHIND
    hidden = _noise(1, length, WIDTH, device=device)
    heads = hidden.unflatten(2, (HEADS, -1)).transpose(1, 2).contiguous()
    norm = nn.RMSNorm(WIDTH, device=device)
    prunable = torch.zeros(1, length, dtype=torch.bool, device=device)
    prunable[:, BEFORE : BEFORE + IMAGE] = True
    attention = Attention(heads, heads, heads, heads.shape[-1] ** -0.5, causal=True)
    place = torch.arange(length, device=device) - BEFORE
    cells = torch.stack([place * 0, place // GRID, place % GRID], 1)
    cells = torch.where(prunable.unsqueeze(2), cells, -1)
    return TokenView(
        hidden,
        prunable,
        depth=32,
        whole=False,
        real=torch.ones_like(prunable),
        attention=attention,
        seeds=torch.zeros(1, dtype=torch.int64),
        signals={
            "final_norm": lambda: norm(hidden),
            "next_attention": lambda: attention,
            "unrotated_attention": lambda: attention,
            "rotated_ones": lambda: torch.ones_like(heads[:, 0]),
            "sublayers": lambda: [(hidden, hidden)] * 2,
            "neurons": lambda: hidden.repeat(1, 1, 3)[..., :NEURONS],
            "embeddings": lambda: hidden,
            "hidden": lambda: torch.zeros_like(prunable),
            "cells": lambda: cells,
            "encoded": lambda: [_noise(1, length, PATCH_WIDTH, device=device) for _ in blocks],
            "crops": lambda: (torch.tensor([[0, -1, -1]]), torch.zeros_like(prunable)),
            # Copies of layers, as if they had run.
            "copies": lambda: SimpleNamespace(read=lambda *given: [attention]),
            # A token of the method's own, as if it had run through the layers: that is the decoder's time.
            "beside": lambda: SimpleNamespace(look=lambda added: replace(attention, query=heads[:, :, -1:])),
        },
    )
