"""Where the parts of a vision transformer of timm or transformers are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tprune.errors import UserError
from tprune.methods.tokens import Shape

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
        suffix: how many of the `shape.prefix` tokens come last in the model's own sequence (YOLOS's queries).
        by_rows: whether blocks lay out what they give token by token, however their input lies: those of transformers
            that add it to the attention's output, not the other way round.
    """

    entrance: nn.Module
    blocks: Sequence[nn.Module]
    attentions: Sequence[nn.Module]
    shape: Shape
    model: nn.Module
    dense: bool = False
    suffix: int = 0
    by_rows: bool = False


def anatomy(model: nn.Module) -> Anatomy:
    """Find the parts of `model`.

    Raises:
        UserError: not a plain vision transformer.
    """
    name = type(model).__name__
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
        width=model.embed_dim,
        classes=classes(model),
        patch=(model.patch_embed.proj.in_channels, *model.patch_embed.patch_size),
    )
    return Anatomy(model.patch_embed, model.blocks, [block.attn for block in model.blocks], shape, model)


def classes(model: nn.Module) -> int:
    """How many classes the model tells apart; 0 for a bare tower."""
    if hasattr(model, "config"):
        return model.config.num_labels if hasattr(model, "classifier") else 0
    return model.num_classes


def detects(model: nn.Module) -> bool:
    """Whether the model finds objects, with queries of its own beside the patches (YOLOS)."""
    return getattr(getattr(model, "config", None), "num_detection_tokens", 0) > 0


def clip_length(model: nn.Module) -> int:
    """How many frames of a video the model sees at once; 0 for a model of images."""
    return getattr(getattr(model, "config", None), "num_frames", 0)


def _transformers(model: nn.Module) -> Anatomy:
    """A vision tower of transformers: the module list of blocks that hold an attention."""
    lists = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) and _attention_of(module[0]) is not None
    ]
    config = getattr(model.config, "vision_config", model.config)
    if len(lists) != 1 or not hasattr(config, "patch_size"):
        raise UserError(
            f"{type(model).__name__} is not a plain vision transformer of transformers; tprune vit prunes ViT, DeiT, "
            "DINOv2, CLIP, SigLIP, YOLOS and VideoMAE; use the command of this model's own family"
        )
    blocks = lists[0]
    size = config.image_size if isinstance(config.image_size, tuple | list) else (config.image_size,) * 2
    patch = config.patch_size if isinstance(config.patch_size, tuple | list) else (config.patch_size,) * 2
    grid = size[0] // patch[0], size[1] // patch[1]
    frames = _frames(model)
    has_cls = any(name.endswith(("cls_token", "class_embedding")) for name, _ in model.named_parameters())
    registers = getattr(config, "num_register_tokens", 0) or 0
    distilled = any(name.endswith("distillation_token") for name, _ in model.named_parameters())
    queries = getattr(config, "num_detection_tokens", 0)
    shape = Shape(
        depth=len(blocks),
        tokens=grid[0] * grid[1] * (frames or 1),
        prefix=has_cls + registers + distilled + queries,
        heads=config.num_attention_heads,
        has_cls=has_cls,
        grid=None if frames else grid,
        video=(frames, *grid) if frames else None,
        width=config.hidden_size,
        classes=classes(model),
        patch=(0, 0, 0) if frames else (getattr(config, "num_channels", 3), *patch),
    )
    entrance = next(module for name, module in model.named_modules() if name.endswith("embeddings"))
    # A detector's encoder adds positions between its blocks, and its head looks for the queries at the end.
    dense = type(model).__name__.endswith(DENSE_HEADS) or queries > 0
    by_rows = hasattr(blocks[0], "layernorm_before")
    attentions = [_attention_of(block) for block in blocks]
    return Anatomy(entrance, blocks, attentions, shape, model, dense, queries, by_rows)


def _frames(model: nn.Module) -> int:
    """How many frames the tokens of a VideoMAE hold, several of the video in each; 0 for a model of images.

    Raises:
        UserError: a video transformer of another make, or a head that reads the first patch.
    """
    name, config = type(model).__name__, model.config
    if not clip_length(model):
        return 0
    if config.model_type != "videomae":
        raise UserError(f"{name} is a video transformer of a make that tprune does not know; use a VideoMAE")
    if classes(model) and not config.use_mean_pooling:
        raise UserError(
            f"the head of this {name} reads its first patch, which may leave; use one with use_mean_pooling"
        )
    return config.num_frames // config.tubelet_size


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
