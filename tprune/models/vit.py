"""Vision transformers of timm and transformers, with tokens leaving before or inside their blocks.

Nothing is forked: blocks get hooks, attention is watched where torch computes it, and only blocks with a site between
attention and MLP have their forward replaced by one that stops in between (`halves`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from tprune.core.budget import Site, Stage, counts_entering
from tprune.core.reduction import Reduction
from tprune.errors import UserError
from tprune.methods.token_view import TokenView
from tprune.methods.tokens import TokenMethod
from tprune.models.anatomy import Anatomy, halves
from tprune.models.claim import claim
from tprune.models.dense import Canvas
from tprune.models.forwards import Forwards
from tprune.models.inward import Inward
from tprune.models.ragged import Ragged, check_head
from tprune.models.replaced import replaced
from tprune.models.seeds import content_seeds
from tprune.models.watch import Watch


@dataclass(eq=False)
class Trace:
    """What happened in the last forward: tokens entering every sublayer, and every reduction where asked for."""

    entering: list[int] = field(default_factory=list)
    reductions: list[tuple[Site, Reduction]] = field(default_factory=list)


class TokenDriver(Forwards):
    """Runs a token method inside a vision transformer until removed.

    Args:
        parts: the model's anatomy.
        method: what reduces.
        stages: where, and to how many tokens.
        seed: of random draws, together with each image's own content.
        record: keep every reduction of the last forward in `trace` (for pictures).
    """

    def __init__(
        self, parts: Anatomy, method: TokenMethod, stages: Sequence[Stage], seed: int, record: bool = False
    ):
        self.parts, self.method, self.stages = parts, method, tuple(stages)
        self.seed, self.record = seed, record
        self.counts = {stage.site: stage.count for stage in stages if not stage.skips}
        self.skipped = {stage.site.layer for stage in stages if stage.skips}
        self.skip_scale = method.skip_scale() if self.skipped else 1.0
        self.trace = Trace()
        self.dense, self.canvas, self.rejoin = parts.dense, None, method.rejoins(parts.shape)
        known = signature(type(parts.blocks[0]).forward).parameters
        self.mask_name = next((name for name in ("attn_mask", "attention_mask") if name in known), None)
        self.ragged = Ragged(parts.shape.depth, parts.shape.prefix) if method.varies() else None
        if self.ragged is not None and not method.restores:
            check_head(parts.model, method.id)
        self.undo = ExitStack()
        self._start()

    def remove(self) -> None:
        """Leave the model exactly as it was."""
        self.undo.close()

    @contextmanager
    def away(self) -> Iterator[None]:
        """The model without the method, for a while."""
        self.remove()
        try:
            yield
        finally:
            self._start()

    @property
    def entering(self) -> list[float]:
        """Prunable tokens entering every sublayer: as planned, or the mean of the images seen where they vary."""
        measured = None if self.ragged is None else self.ragged.means()
        planned = counts_entering(self.stages, self.parts.shape.tokens, self.parts.shape.depth)
        return planned if measured is None else measured

    def _start(self) -> None:
        self.undo.callback(claim(self.parts.model, self.method.id))
        try:
            self._attach()
        except Exception:
            self.undo.close()
            raise

    def _attach(self) -> None:
        parts, edited = self.parts, self._edited()
        watched = self._watched()
        self._hook(parts.entrance.register_forward_pre_hook(self._begin, with_kwargs=True))
        for layer, block in enumerate(parts.blocks):
            self._hook(block.register_forward_pre_hook(self._before(layer), with_kwargs=True))
            self._hook(block.register_forward_hook(self._after, prepend=True))
            if Site(layer, between=True) in self.counts:
                self._replace(block, self._stopping_between(layer, *self._halves(block)))
            elif self._blend(layer) is not None:
                self._replace(block, self._blending(layer, *halves(block)))
            elif self.method.sees and Site(layer) in self.counts:
                self._replace(block, self._seeing(*halves(block)))
            if layer in watched:
                attention = parts.attentions[layer]
                self._hook(attention.register_forward_pre_hook(partial(self._watch, layer in edited)))
                self._hook(attention.register_forward_hook(self._unwatch, always_call=True))

        if self.method.restores:
            # In front of `_after`, which makes full length of what is left.
            self._hook(parts.blocks[-1].register_forward_hook(self._finish, prepend=True))

        if hasattr(parts.model, "forward_intermediates") and not parts.dense:
            intermediates = self._densely(parts.model.forward_intermediates)
            self._replace(parts.model, intermediates, "forward_intermediates")

    def _watched(self) -> set[int]:
        """The blocks whose attention is seen."""
        if self.mask_name is None and (self.method.weighs_by_size() or self.ragged is not None):
            return set(range(self.parts.shape.depth))
        if "attention" in self.method.reads:
            return {site.layer if site.between else site.layer - 1 for site in self.counts}
        return set()

    def _hook(self, handle: Any) -> None:
        self.undo.callback(handle.remove)

    def _replace(self, module: nn.Module, function: Callable, name: str = "forward") -> None:
        self.undo.enter_context(replaced(module, function, name))

    def _begin(self, entrance: nn.Module, args: tuple, kwargs: dict) -> None:
        """A new forward: nothing has happened yet."""
        self.pixels = args[0] if args else kwargs["pixel_values"]
        self.position = self.size = self.attention = self.bias = self.seeds = self.sight = None
        self.memory: dict[str, Any] = {}
        self.trace = Trace()
        returns = self.rejoin is not None or self.method.restores
        self.canvas = Canvas() if self.dense or returns else None
        if self.ragged is not None:
            self.ragged.begin(len(self.pixels))
        if "seeds" in self.method.reads:
            self.seeds = content_seeds(self.pixels, self.seed)

    def _edited(self) -> set[int]:
        """The blocks whose attention the method changes: those that tokens leave."""
        if not self.method.edits_attention():
            return set()
        entering = counts_entering(self.stages, self.parts.shape.tokens, self.parts.shape.depth)
        return {
            layer for layer in range(self.parts.shape.depth) if entering[2 * layer + 1] < entering[2 * layer]
        }

    def _watch(self, edited: bool, attention: nn.Module, args: tuple) -> None:
        bias = self.bias if self.mask_name is None else None
        self.watch = Watch(bias, self.method.edit_attention if edited else None)
        self.watch.__enter__()

    def _unwatch(self, attention: nn.Module, args: tuple, output: Any) -> None:
        self.watch.__exit__(None, None, None)
        self.attention = self.watch.seen
        if self.attention is None:
            raise UserError(
                "this model's attention does not run as torch's scaled_dot_product_attention; load it with "
                "fused attention (attn_implementation='sdpa', TIMM_FUSED_ATTN=1)"
            )

    def _before(self, layer: int) -> Callable:
        def before(block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            named = kwargs | dict(zip(("hidden_states", "attention_mask"), args, strict=False))
            x = named.pop("hidden_states")
            if self.dense:
                x = self.canvas.enter(x, self.position)
            if Site(layer) == self.rejoin:
                x = self._return(x)
            elif Site(layer) in self.counts:
                x = self._reduce(Site(layer), x)
            self.trace.entering.append(0 if layer in self.skipped else self._entering(x))
            if self.ragged is not None:
                self.ragged.count(2 * layer, x)
                if Site(layer, between=True) not in self.counts:
                    self.ragged.count(2 * layer + 1, x)
            return (x.contiguous() if self.parts.by_rows else x,), self._fitted(named, x)

        return before

    def _after(self, block: nn.Module, args: tuple, output: Any) -> Any:
        """Full length again, where every block's output is read."""
        if not self.dense:
            return None
        if isinstance(output, tuple):
            return self.canvas.leave(output[0]), *output[1:]
        return self.canvas.leave(output)

    def _finish(self, block: nn.Module, args: tuple, output: Any) -> Any:
        """A last look at what is left, and full length again."""
        x = output[0] if isinstance(output, tuple) else output
        self._look(self._view(Site(self.parts.shape.depth), x))
        if self.dense:
            return None
        return (self.canvas.leave(x), *output[1:]) if isinstance(output, tuple) else self.canvas.leave(x)

    def _look(self, view: TokenView) -> None:
        self.method.finish(view, self.memory)

    def _entering(self, x: Tensor) -> int:
        """How many prunable tokens the attention of the next block works on, as queries or as keys."""
        left, sight = x.shape[1] - self.parts.shape.prefix, self.sight
        return left if sight is None or sight.tokens is None else max(left, sight.tokens.shape[1])

    def _fitted(self, kwargs: dict[str, Any], x: Tensor) -> dict[str, Any]:
        """The block's other arguments for the tokens that are left: rotary tables gathered, sizes as a bias."""
        if self.position is not None and kwargs.get("rope") is not None:
            kwargs = kwargs | {"rope": self._rope(kwargs["rope"])}
        self.bias = None
        if self.size is not None and self.method.weighs_by_size():
            self.bias = self.size.log()[:, None, None, :]
        if self.ragged is not None:
            self.bias = self.ragged.hide(self.bias, x)
        if self.bias is not None and self.mask_name is not None:
            kwargs = kwargs | {self.mask_name: self.bias}
        return kwargs

    def _rope(self, table: Tensor) -> Tensor:
        """Rotary tables [n, d] or [H, n, d] of all patches -> [B, 1 or H, K, d] of those left."""
        prefix = self.parts.shape.prefix
        place = self.position[:, prefix:] - prefix
        if self.sight is not None and self.sight.position is not None:
            place = torch.cat([place, self.sight.position - prefix], 1)
        per_head = table if table.dim() == 3 else table.unsqueeze(0)
        return per_head[:, place].transpose(0, 1)

    def _inward(self, x: Tensor) -> Inward:
        """Between the order of `x` [B, N, D] and the one that methods see."""
        return Inward(self.parts.shape.prefix, self.parts.suffix, x.shape[1])

    def _view(self, site: Site, x: Tensor) -> TokenView:
        """What the method sees at `site`."""
        shape, length = self.parts.shape, x.shape[1]
        if self.ragged is None and not self.method.sees and length < shape.prefix + self.counts.get(site, 0):
            raise UserError(
                f"the model was given {length - shape.prefix} tokens, its stages were planned for {shape.tokens}; "
                "use images of the size it was built for"
            )
        inward = self._inward(x)
        real = None if self.ragged is None else inward.shown(self.ragged.real)
        prunable = torch.arange(length, device=x.device).ge(shape.prefix).expand(x.shape[:2])
        return TokenView(
            hidden=inward.shown(x),
            prunable=prunable if real is None else prunable & real,
            prefix=shape.prefix,
            depth=shape.depth,
            has_cls=shape.has_cls,
            grid=shape.grid,
            video=shape.video,
            window=shape.window,
            whole=real is None,
            real=real,
            position=inward.places(self.position),
            size=inward.shown(self.size),
            attention=inward.attention(self.attention),
            seeds=self.seeds,
            signals={"pixels": lambda: self.pixels},
        )

    def _reduce(self, site: Site, x: Tensor) -> Tensor:
        reduction = self.method.reduce(site, self._view(site, x), self.counts[site], self.memory)
        return self._apply(site, reduction, x)

    def _return(self, x: Tensor) -> Tensor:
        """The whole sequence in its first order, [B, N, D], of what is left and all that has left."""
        x, self.canvas = self.canvas.leave(x), Canvas()
        self.position = self.size = None
        return x

    def _apply(self, site: Site, reduction: Reduction, x: Tensor) -> Tensor:
        reduction = self._inward(x).outward(reduction, x.device)
        if self.position is None:
            self.position = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        if self.canvas is not None:
            self.canvas.follow(reduction, x)
        self.sight = reduction.sight
        self.position = reduction.gather(self.position)
        self.size = reduction.size(self.size)
        if self.ragged is not None:
            self.ragged.follow(reduction)
        if self.record:
            self.trace.reductions.append((site, reduction))
        return reduction.apply(x)
