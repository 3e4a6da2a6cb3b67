"""Vision transformers of timm and transformers, with tokens leaving before or inside their blocks.

Nothing is forked: blocks get hooks, attention is watched where torch computes it, and only blocks with a site between
attention and MLP have their forward replaced by one that stops in between (`halves`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tprune.core.budget import Site, Stage, counts_entering
from tprune.core.reduction import Reduction
from tprune.errors import UserError
from tprune.methods.base import Shape, TokenMethod
from tprune.methods.views import Attention, TokenView
from tprune.models.dense import Canvas

TIMM_KINDS = ("VisionTransformer", "VisionTransformerDistilled", "Eva")
DENSE_HEADS = ("Segmentation", "DepthEstimation", "Detection", "Backbone")
WINDOWED = ("Swin", "MaxVit", "Hiera", "MViT", "Twins", "CoAtNet", "MaxxVit", "PyramidVision")


@dataclass(frozen=True, eq=False)
class Anatomy:
    """Where the parts of a vision transformer are.

    Attributes:
        entrance: the embedding module, called once per forward with the pixels.
        blocks: in order.
        attentions: the attention module of each block.
        shape: depth, tokens, prefix, heads.
        model: the whole; its `forward_intermediates`, where it has one, gives full-length features.
        dense: whether a head reads every patch, so that blocks must always give full-length outputs.
    """

    entrance: nn.Module
    blocks: Sequence[nn.Module]
    attentions: Sequence[nn.Module]
    shape: Shape
    model: nn.Module
    dense: bool = False


def anatomy(model: nn.Module) -> Anatomy:
    """Find the parts of `model`.

    Raises:
        UserError: not a plain vision transformer.
    """
    name = type(model).__name__
    if any(name.startswith(window) for window in WINDOWED):
        raise UserError(
            f"{name} attends within fixed windows, where single tokens cannot leave; use a plain ViT such as deit_s"
        )
    if hasattr(model, "config"):
        return _transformers(model)
    if not isinstance(getattr(model, "blocks", None), nn.Sequential | nn.ModuleList) or not any(
        kind.__name__ in TIMM_KINDS for kind in type(model).__mro__
    ):
        raise UserError(
            f"{name} is not a plain vision transformer; tprune vit prunes {', '.join(TIMM_KINDS)}"
        )
    first = model.blocks[0]
    if not hasattr(first, "attn") or not hasattr(first, "norm2"):
        raise UserError(f"the blocks of {name} have no attention that tprune knows")
    rows, columns = model.patch_embed.grid_size
    shape = Shape(
        depth=len(model.blocks),
        tokens=rows * columns,
        prefix=model.num_prefix_tokens,
        heads=first.attn.num_heads,
        has_cls=getattr(model, "cls_token", None) is not None,
        grid=(rows, columns),
    )
    return Anatomy(model.patch_embed, model.blocks, [block.attn for block in model.blocks], shape, model)


def _transformers(model: nn.Module) -> Anatomy:
    """A vision tower of transformers: the module list of blocks that hold an attention."""
    lists = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) and _attention_of(module[0]) is not None
    ]
    config = getattr(model.config, "vision_config", model.config)
    if len(lists) != 1 or not hasattr(config, "patch_size"):
        raise UserError(f"{type(model).__name__} is not a plain vision transformer of transformers")
    blocks = lists[0]
    size = config.image_size if isinstance(config.image_size, tuple | list) else (config.image_size,) * 2
    patch = config.patch_size if isinstance(config.patch_size, tuple | list) else (config.patch_size,) * 2
    grid = size[0] // patch[0], size[1] // patch[1]
    has_cls = any(name.endswith(("cls_token", "class_embedding")) for name, _ in model.named_parameters())
    registers = getattr(config, "num_register_tokens", 0) or 0
    distilled = any(name.endswith("distillation_token") for name, _ in model.named_parameters())
    shape = Shape(
        depth=len(blocks),
        tokens=grid[0] * grid[1],
        prefix=has_cls + registers + distilled,
        heads=config.num_attention_heads,
        has_cls=has_cls,
        grid=grid,
    )
    entrance = next(module for name, module in model.named_modules() if name.endswith("embeddings"))
    dense = type(model).__name__.endswith(DENSE_HEADS)
    return Anatomy(entrance, blocks, [_attention_of(block) for block in blocks], shape, model, dense)


def _attention_of(block: nn.Module) -> nn.Module | None:
    for name in ("attn", "self_attn", "attention"):
        if isinstance(getattr(block, name, None), nn.Module):
            return getattr(block, name)
    return None


def halves(block: nn.Module) -> tuple[Callable[..., Tensor], Callable[[Tensor], Tensor]]:
    """What a pre-norm block adds to the residual stream: its attention half and its MLP half.

    Raises:
        UserError: a block of another make.
    """

    def part(*names: str) -> nn.Module | None:
        return next(
            (getattr(block, n) for n in names if isinstance(getattr(block, n, None), nn.Module)), None
        )

    norm1, norm2 = (
        part("norm1", "layernorm_before", "layer_norm1"),
        part("norm2", "layernorm_after", "layer_norm2"),
    )
    attention, mlp = _attention_of(block), part("mlp") or _mlp_of(block)
    if None in (norm1, norm2, attention, mlp) or type(block).__name__.startswith(
        ("ResPost", "EvaBlockPost", "Parallel")
    ):
        raise UserError(
            f"a {type(block).__name__} is no pre-norm block; use a method that acts between blocks"
        )
    scales = part("ls1", "layer_scale1"), part("ls2", "layer_scale2")
    gammas = getattr(block, "gamma_1", None), getattr(block, "gamma_2", None)

    def scaled(x: Tensor, half: int) -> Tensor:
        if scales[half] is not None:
            return scales[half](x)
        return x if gammas[half] is None else gammas[half] * x

    def attend(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = attention(norm1(x), *args, **kwargs)
        return scaled(out[0] if isinstance(out, tuple) else out, 0)

    def feed(x: Tensor) -> Tensor:
        return scaled(mlp(norm2(x)), 1)

    return attend, feed


def _mlp_of(block: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """The MLP of a block that keeps its two layers apart and adds the residual in the second (DPT, YOLOS)."""
    inner, outer = getattr(block, "intermediate", None), getattr(block, "output", None)
    if inner is None or not hasattr(outer, "dense"):
        return None
    return lambda x: outer.dropout(outer.dense(inner(x)))


class Watch(TorchFunctionMode):
    """Sees the queries and keys of the one fused attention call that happens while it is active.

    `bias`, [B, 1, 1, N] or None, is added to its logits, for blocks that take no mask of their own.
    """

    def __init__(self, bias: Tensor | None = None) -> None:
        super().__init__()
        self.bias, self.seen = bias, None

    def __torch_function__(self, function, types, args=(), kwargs=None):
        """Note what fused attention is given, and let it run."""
        kwargs = kwargs or {}
        if function is nn.functional.scaled_dot_product_attention:
            names = ("query", "key", "value", "attn_mask")
            given = dict(zip(names, args, strict=False)) | kwargs
            if self.bias is not None:
                given["attn_mask"] = self.bias
                args, kwargs = (), given
            scale = given.get("scale") or given["query"].shape[-1] ** -0.5
            self.seen = Attention(given["query"], given["key"], given["value"], scale, given.get("attn_mask"))
        return function(*args, **kwargs)


@dataclass(eq=False)
class Trace:
    """What happened in the last forward: tokens entering every sublayer, and every reduction where asked for."""

    entering: list[int] = field(default_factory=list)
    reductions: list[tuple[Site, Reduction]] = field(default_factory=list)


class TokenDriver:
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
        self.counts = {stage.site: stage.count for stage in stages}
        self.trace = Trace()
        self.dense, self.canvas = parts.dense, None
        known = signature(type(parts.blocks[0]).forward).parameters
        self.mask_name = next((name for name in ("attn_mask", "attention_mask") if name in known), None)
        self.entering = counts_entering(self.stages, parts.shape.tokens, parts.shape.depth)
        self.undo = ExitStack()
        self._attach()

    def remove(self) -> None:
        """Leave the model exactly as it was."""
        self.undo.close()

    def _attach(self) -> None:
        parts = self.parts
        watched = set()
        if "attention" in self.method.reads:
            watched = {site.layer if site.between else site.layer - 1 for site in self.counts}
        if self.mask_name is None and self.method.weighs_by_size():
            watched = set(range(parts.shape.depth))
        self._hook(parts.entrance.register_forward_pre_hook(self._begin, with_kwargs=True))
        for layer, block in enumerate(parts.blocks):
            self._hook(block.register_forward_pre_hook(self._before(layer), with_kwargs=True))
            self._hook(block.register_forward_hook(self._after, prepend=True))
            if Site(layer, between=True) in self.counts:
                block.forward = self._stopping_between(layer, *halves(block))
                self.undo.callback(block.__dict__.pop, "forward", None)
            if layer in watched:
                attention = parts.attentions[layer]
                self._hook(attention.register_forward_pre_hook(self._watch))
                self._hook(attention.register_forward_hook(self._unwatch, always_call=True))

        if hasattr(parts.model, "forward_intermediates") and not parts.dense:
            parts.model.forward_intermediates = self._densely(parts.model.forward_intermediates)
            self.undo.callback(parts.model.__dict__.pop, "forward_intermediates", None)

    def _densely(self, forward: Callable) -> Callable:
        def forward_intermediates(*args: Any, **kwargs: Any) -> Any:
            self.dense = True
            try:
                return forward(*args, **kwargs)
            finally:
                self.dense = False

        return forward_intermediates

    def _hook(self, handle: Any) -> None:
        self.undo.callback(handle.remove)

    def _begin(self, entrance: nn.Module, args: tuple, kwargs: dict) -> None:
        """A new forward: nothing has happened yet."""
        pixels = args[0] if args else kwargs["pixel_values"]
        self.position = self.size = self.attention = self.bias = self.seeds = None
        self.memory: dict[str, Any] = {}
        self.trace = Trace()
        self.canvas = Canvas() if self.dense else None
        if "seeds" in self.method.reads:
            self.seeds = content_seeds(pixels, self.seed)

    def _watch(self, attention: nn.Module, args: tuple) -> None:
        self.watch = Watch(self.bias if self.mask_name is None else None)
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
            if self.canvas is not None:
                x = self.canvas.enter(x, self.position)
            if Site(layer) in self.counts:
                x = self._reduce(Site(layer), x)
            self.trace.entering.append(x.shape[1] - self.parts.shape.prefix)
            return (x,), self._fitted(named)

        return before

    def _after(self, block: nn.Module, args: tuple, output: Any) -> Any:
        """Full length again, where every block's output is read."""
        if self.canvas is None:
            return None
        if isinstance(output, tuple):
            return self.canvas.leave(output[0]), *output[1:]
        return self.canvas.leave(output)

    def _stopping_between(self, layer: int, attend: Callable, feed: Callable) -> Callable:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            x = hidden_states + attend(hidden_states, *args, **kwargs)
            x = self._reduce(Site(layer, between=True), x)
            return x + feed(x)

        return forward

    def _fitted(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The block's other arguments for the tokens that are left: rotary tables gathered, sizes as a bias."""
        if self.position is not None and kwargs.get("rope") is not None:
            kwargs = kwargs | {"rope": self._rope(kwargs["rope"])}
        if self.size is not None and self.method.weighs_by_size():
            self.bias = self.size.log()[:, None, None, :]
            if self.mask_name is not None:
                kwargs = kwargs | {self.mask_name: self.bias}
        return kwargs

    def _rope(self, table: Tensor) -> Tensor:
        """Rotary tables [n, d] or [H, n, d] of all patches -> [B, 1 or H, K, d] of those left."""
        prefix = self.parts.shape.prefix
        place = self.position[:, prefix:] - prefix
        per_head = table if table.dim() == 3 else table.unsqueeze(0)
        return per_head[:, place].transpose(0, 1)

    def _reduce(self, site: Site, x: Tensor) -> Tensor:
        shape, length = self.parts.shape, x.shape[1]
        if length < shape.prefix + self.counts[site]:
            raise UserError(
                f"the model was given {length - shape.prefix} tokens, its stages were planned for {shape.tokens}; "
                "use images of the size it was built for"
            )
        view = TokenView(
            hidden=x,
            prunable=torch.arange(length, device=x.device).ge(shape.prefix).expand(x.shape[:2]),
            prefix=shape.prefix,
            depth=shape.depth,
            position=self.position,
            size=self.size,
            attention=self.attention,
            seeds=self.seeds,
        )
        reduction = self.method.reduce(site, view, self.counts[site], self.memory)
        if self.position is None:
            self.position = torch.arange(length, device=x.device).expand(x.shape[:2])
        if self.canvas is not None:
            self.canvas.follow(reduction, x)
        self.position = reduction.gather(self.position)
        self.size = reduction.size(self.size)
        if self.record:
            self.trace.reductions.append((site, reduction))
        return reduction.apply(x)


def content_seeds(pixels: Tensor, seed: int) -> Tensor:
    """A seed per image from its own content, int64 [B] on the CPU: the same image draws the same in any batch."""
    flat = pixels.detach().float().contiguous().flatten(1).view(torch.int32).to(torch.int64)
    weight = torch.arange(flat.shape[1], device=flat.device) * 2654435761 % 1000003 + 1
    return ((flat * weight).sum(1) + 7919 * seed).abs().cpu() % (2**62)
