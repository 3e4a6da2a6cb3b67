"""Text encoders with tokens leaving before their blocks, or between a block's attention and its MLP.

The vision transformers' driver, for blocks that add before they normalise, and rows that come padded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tprune.core.budget import Site
from tprune.core.reduction import Reduction
from tprune.errors import UserError
from tprune.methods.attention import Attention
from tprune.methods.fit import Fit
from tprune.methods.tokens import Shape, TokenMethod
from tprune.models.anatomy import Anatomy
from tprune.models.relaxed import FitDriver
from tprune.models.signals import attention_of
from tprune.models.taps import Capture
from tprune.models.text_encoder import answers, classes, is_encoder
from tprune.models.vit import TokenDriver


def anatomy(model: nn.Module) -> Anatomy:
    """The parts of a text encoder; heads other than classifiers read every token, so that all must be there again.

    Raises:
        UserError: the model is none.
    """
    if not is_encoder(model.config):
        raise UserError(
            f"{type(model).__name__} is no text encoder; use a classifier such as the built-in minilm-topics, or BERT, "
            "RoBERTa and DistilBERT"
        )
    core = model.base_model
    blocks = (core.transformer if hasattr(core, "transformer") else core.encoder).layer
    shape = Shape(
        depth=len(blocks),
        tokens=model.config.max_position_embeddings,
        prefix=1,
        heads=model.config.num_attention_heads,
        has_cls=True,
        width=model.config.hidden_size,
        classes=len(classes(model)),
        kind="encoder",
    )
    dense = not type(model).__name__.endswith("ForSequenceClassification")
    return Anatomy(core, blocks, [block.attention for block in blocks], shape, model, dense)


def halves(block: nn.Module) -> tuple[Callable[..., Tensor], Callable[[Tensor], Tensor]]:
    """The two halves of a block, each with its addition and its norm behind it."""
    if not hasattr(block, "sa_layer_norm"):
        return lambda x, *args, **kwargs: block.attention(x, *args, **kwargs)[0], block.feed_forward_chunk

    def attend(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return block.sa_layer_norm(block.attention(x, *args, **kwargs)[0] + x)

    return attend, lambda x: block.output_layer_norm(block.ffn(x) + x)


class TextDriver(TokenDriver):
    """Runs a token method inside a text encoder until removed.

    Attributes:
        offered: how many tokens that may leave all texts had so far.
    """

    offered: Tensor | int = 0

    def _begin(self, entrance: nn.Module, args: tuple, kwargs: dict) -> None:
        """A new forward; padding is not real from the start."""
        inputs = dict(zip(("input_ids", "attention_mask"), args, strict=False)) | kwargs
        tokens = inputs["inputs_embeds"] if inputs.get("input_ids") is None else inputs["input_ids"]
        super()._begin(entrance, (tokens,), {})
        mask = inputs.get("attention_mask")
        real = tokens.new_ones(tokens.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
        self.ragged.real, self.left = real, False
        self.offered = self.offered + real.sum() - len(real)

    def _fitted(self, kwargs: dict[str, Any], x: Tensor) -> dict[str, Any]:
        """The model's own mask, until tokens have left."""
        return super()._fitted(kwargs, x) if self.left else kwargs

    def _apply(self, site: Site, reduction: Reduction, x: Tensor) -> Tensor:
        self.left = True
        return super()._apply(site, reduction, x)

    def _halves(self, block: nn.Module) -> tuple[Callable[..., Tensor], Callable[[Tensor], Tensor]]:
        return halves(block)

    def _stopping_between(self, layer: int, attend: Callable, feed: Callable) -> Callable:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            x = self._reduce(Site(layer, between=True), attend(hidden_states, *args, **kwargs))
            self.ragged.count(2 * layer + 1, x)
            return feed(x)

        return forward

    @property
    def kept(self) -> float:
        """The mean fraction of all tokens offered that entered a sublayer; 1 before the first text."""
        if not self.ragged.images:
            return 1.0
        return float(sum(self.ragged.sums)) / (2 * self.parts.shape.depth * float(self.offered))

    def reset(self) -> None:
        """Count anew."""
        self.ragged.reset()
        self.offered = 0


class TextFitDriver(TextDriver, FitDriver):
    """Runs a method's `Fit` inside a text encoder until removed; it sees the tokens behind the last block too."""

    def __init__(self, parts: Anatomy, method: TokenMethod, fit: Fit, seed: int):
        self.teacher = Teacher(parts.model) if fit.teaches else None
        super().__init__(parts, method, fit, seed)

    def _attach(self) -> None:
        super()._attach()
        self._hook(self.parts.blocks[-1].register_forward_hook(self._behind))

    def _begin(self, entrance: nn.Module, args: tuple, kwargs: dict) -> None:
        super()._begin(entrance, args, kwargs)
        self.memory["teacher"] = self.teacher

    def _behind(self, block: nn.Module, args: tuple, output: Tensor) -> None:
        self._look(self._view(Site(self.parts.shape.depth), output))


class Teacher:
    """A copy of a text encoder that stays as it is.

    Args:
        model: without hooks.
    """

    def __init__(self, model: nn.Module):
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self.last = attention_of(anatomy(self.model).blocks[-1])
        self.seen = Capture([self.last])

    @torch.no_grad()
    def __call__(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Attention]:
        """Its logits [B, C], and the attention of its last block."""
        self.seen.clear()
        logits = answers(self.model, inputs)
        return logits, self.seen.calls[self.last][0].view()
