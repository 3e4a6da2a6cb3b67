"""What a token method is given to look at, with its signals computed on demand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tprune.core import select
from tprune.errors import UserError
from tprune.methods.attention import Attention


@dataclass(eq=False)
class TokenView:
    """The tokens at a site, and the attention of the block they came from.

    Attributes:
        hidden: [B, N, D], the residual stream.
        prunable: bool [B, N]; False for CLS, registers, padding, text.
        prefix: how many leading tokens are never prunable, the same in all rows; behind them everything is
            prunable where `whole` is set.
        depth: how many blocks the model has.
        has_cls: whether the first token is a class token.
        grid: rows and columns of the prunable tokens before any left, where they form an image.
        video: their frames, rows and columns, where they form a video.
        window: rows and columns of the windows that attention stays in; 0 where it does not.
        whole: whether all tokens behind the prefix are prunable (no host sync is needed to know it).
        position: int64 [B, N], every token's place in the original sequence.
        real: bool [B, N], False for padding; None where there is none.
        size: float [B, N], how many original tokens each stands for, or None before the first merge.
        attention: of the block these tokens last went through ("before" sites: the previous block's), if any.
        encoder: at a VLM's projector, the vision tower's view of the same images: [E, prefix + P] tokens behind the
            block that is projected. A row is a crop: E is B, or the sum over images of their crops.
        encoders: the same behind other blocks of the tower, by index (`TokenMethod.encoder_blocks`).
        pool: what the encoder's patches have [E, P, ...], for these tokens [B, N, ...]: the mean where several patches
            make one token, 0 for tokens that no patch makes (newlines).
        seeds: int64 per sample, for methods that draw at random: equal samples draw equally in any batch.
        present: float [B, N], while a method is fitted: 1 for tokens that would still be there, else 0, with a
            gradient; None before the first site that marks any.
        signals: rarer signals, by name, each computed at its first use.
    """

    hidden: Tensor
    prunable: Tensor
    prefix: int = 0
    depth: int = 0
    has_cls: bool = False
    grid: tuple[int, int] | None = None
    video: tuple[int, int, int] | None = None
    window: int = 0
    whole: bool = True
    position: Tensor | None = None
    real: Tensor | None = None
    size: Tensor | None = None
    attention: Attention | None = None
    encoder: TokenView | None = None
    encoders: dict[int, TokenView] = field(default_factory=dict)
    pool: Callable[[Tensor], Tensor] | None = None
    seeds: Tensor | None = None
    present: Tensor | None = None
    signals: dict[str, Callable[[], Any]] = field(default_factory=dict)

    @property
    def last(self) -> Tensor:
        """The place of every row's last real token, int64 [B, 1]."""
        if self.real is None:
            return self.prunable.new_full(
                (len(self.prunable), 1), self.prunable.shape[1] - 1, dtype=torch.int64
            )
        return self._places().mul(self.real).argmax(1, keepdim=True)

    @property
    def text(self) -> Tensor:
        """The instruction: real tokens behind the last prunable one, bool [B, N]."""
        behind = self._places() > self._places().mul(self.prunable).amax(1, keepdim=True)
        return behind if self.real is None else behind & self.real

    def received(self) -> Tensor:
        """What every token behind the prefix receives in this block, mean over heads and all queries: float32
        [B, N - prefix].
        """
        return (self.attention.column_sums().mean(1) / self.hidden.shape[1])[:, self.prefix :]

    def saliency(self) -> Tensor:
        """The class token's attention to every token behind the prefix, mean over heads: float32 [B, N - prefix];
        without a class token what they receive from all.
        """
        if not self.has_cls:
            return self.received()
        return self.attention.rows(slice(0, 1)).mean(1)[:, 0, self.prefix :]

    def askers(self) -> tuple[Tensor, Tensor]:
        """Where the instruction's tokens are, int64 [B, R], and which of these are real, bool [B, R]; the last token
        where no text stands behind the images.
        """
        text = self.text
        none = ~text.any(1, keepdim=True) & (self._places() == self.last)
        return select.places(text | none)

    def text_looks(self) -> tuple[Tensor, Tensor]:
        """What each token of the instruction pays to every token, mean over heads: float32 [B, R, N]; and which of
        these rows are real, bool [B, R], the others being 0 (`askers`).
        """
        rows, said = self.askers()
        paid = self.attention.rows(rows).mean(1)
        # Rows of padding, which see nothing, are NaN.
        return paid.masked_fill(~said.unsqueeze(2), 0), said

    def text_attention(self) -> Tensor:
        """What every token receives from the instruction (`text_looks`), mean over its tokens: float32 [B, N]."""
        paid, said = self.text_looks()
        return paid.sum(1) / said.sum(1, keepdim=True)

    def _places(self) -> Tensor:
        return torch.arange(self.prunable.shape[1], device=self.prunable.device)

    def signal(self, name: str) -> Any:
        """One of the rarer signals.

        Raises:
            UserError: this model or site does not have it.
        """
        if name not in self.signals:
            raise UserError(
                f"this model has no signal '{name}' here; it has: {', '.join(self.signals) or 'none'}"
            )
        return self.signals[name]()
