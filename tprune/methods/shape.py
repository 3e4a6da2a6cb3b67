"""What a token method may know of a model before it runs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """What a token method may know of a model before it runs.

    Attributes:
        depth: number of blocks the tokens pass through.
        tokens: number of prunable tokens of one sequence.
        prefix: number of tokens that are never pruned (CLS, distillation, registers, a detector's queries), in front.
        heads: attention heads of one block.
        has_cls: whether the first token is a class token.
        grid: rows and columns of the prunable tokens, where they form an image.
        video: frames (as the model joins them), rows and columns of the prunable tokens, where they form a video.
        width: of a token's hidden state.
        tower: the width of what a vision-language model's tower makes of a patch.
        classes: how many the model tells apart; 0 for a bare tower.
        patch: channels, rows and columns of the pixels that one prunable token stands for, where it is an image.
        names: how many things a patch may show in the data of a fit, the background included; 0 where it does not say.
        kind: "plain" (every token sees every other), "windows" (attention within windows) or "state-space".
        window: rows and columns of a window, where `kind` is "windows".
        span: the first block before which tokens may leave and the one behind the last, where it is not all of them.
        lengths: how many tokens each block has where nothing leaves, where they differ; `tokens` is that in `span`.
    """

    depth: int
    tokens: int
    prefix: int = 0
    heads: int = 1
    has_cls: bool = False
    grid: tuple[int, int] | None = None
    video: tuple[int, int, int] | None = None
    width: int = 0
    tower: int = 0
    classes: int = 0
    patch: tuple[int, int, int] = (0, 0, 0)
    names: int = 0
    kind: str = "plain"
    window: int = 0
    span: tuple[int, int] | None = None
    lengths: tuple[int, ...] | None = None
