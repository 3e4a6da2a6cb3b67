"""Models of transformers, with what makes their inputs."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tprune.artifact import read_tensors
from tprune.errors import UserError
from tprune.models.loading import guard, replace_weights, seeded
from tprune.models.source import PACKAGED, Source, cache_folder
from tprune.models.subject import Subject
from tprune.models.text_encoder import classifies, is_encoder
from tprune.models.vision_blocks import is_vision

AUTO_CLASSES = {
    "vit": (
        "AutoModelForImageClassification",
        "AutoModelForVideoClassification",
        "AutoModelForObjectDetection",
        "AutoModel",
    ),
    "vlm": ("AutoModelForImageTextToText",),
    "llm-context": ("AutoModelForCausalLM",),
    "llm-weights": (
        "AutoModelForCausalLM",
        "AutoModelForImageTextToText",
        "AutoModelForImageClassification",
        "AutoModelForObjectDetection",
        "AutoModel",
    ),
}
TEXT_FAMILIES = ("llm-context", "llm-weights")
"""Where text encoders come with the head they were saved with, or bare."""


def load_transformers(source: Source, family: str, dtype: torch.dtype, seed: int) -> Subject:
    """A model in `dtype` as stock transformers loads it, or one of ours of shapes of its own; new weights by `seed`.

    Raises:
        UserError: as `load.load`.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    folder = converted(source) if source.name in PACKAGED else source.location
    revision = {"revision": source.revision} if source.revision else {}
    config = guard(source, lambda: transformers.AutoConfig.from_pretrained(folder, **revision))
    kind = auto_class(transformers, family, config, source)
    if hasattr(config.get_text_config(decoder=True), "tprune"):
        kind = _of_own_shapes(kind._model_mapping[type(config)])
    with seeded(seed):
        if source.random_weights or source.weights:
            build = getattr(kind, "from_config", None) or kind._from_config
            model = build(config, dtype=dtype)
        elif source.base is not None:
            model = guard(source, lambda: kind.from_pretrained(source.base, config=config, dtype=dtype))
            model.load_state_dict(read_tensors(f"{folder}/model.safetensors"), strict=False)
        else:
            model = guard(source, lambda: kind.from_pretrained(folder, dtype=dtype, **revision))
    model.__class__ = getattr(type(model), "stock", type(model))
    if source.weights:
        replace_weights(model, source.weights)
    return Subject(model, processor(transformers, family, model, source.base or folder, revision), source)


def _of_own_shapes(kind: Any) -> Any:
    """The model class `kind`, built with the widths and factors per layer of its configuration's `tprune` section.

    The shapes are there before weights are loaded, so transformers' own loader does the rest.
    """
    from tprune.models import factored, shapes
    from tprune.models.find import find_blocks

    def __init__(self: Any, config: Any, *more: Any, **named: Any) -> None:  # noqa: N807
        kind.__init__(self, config, *more, **named)
        decoder = find_blocks(self)
        shapes.resize(decoder, decoder.config.tprune.get("layers", []))
        factored.make_room(decoder, decoder.config.tprune.get("wrapped", {}))

    return type(kind.__name__, (kind,), {"__init__": __init__, "__module__": kind.__module__, "stock": kind})


def auto_class(transformers: Any, family: str, config: Any, source: Source) -> Any:
    """Which of transformers' classes a family loads a model by.

    Raises:
        UserError: the family does not prune such models.
    """
    names = AUTO_CLASSES[family]
    if family in TEXT_FAMILIES and is_encoder(config):
        names = ("AutoModelForSequenceClassification" if classifies(config) else "AutoModel",)
    if family in TEXT_FAMILIES and config.is_encoder_decoder:
        # BART's decoder without its encoder would be loaded else.
        names = ("AutoModelForSeq2SeqLM",) if family == "llm-weights" else ()
    for name in names:
        kind = getattr(transformers, name)
        if type(config) in kind._model_mapping:
            return kind
    raise UserError(f"{source.name} is a {config.model_type} model, which tprune {family} does not prune")


def processor(transformers: Any, family: str, model: nn.Module, folder: str, revision: dict[str, str]) -> Any:
    """What makes inputs of text, images or both for a model; None where its folder has none."""
    name = {"vit": "AutoImageProcessor", "vlm": "AutoProcessor"}.get(family, "AutoTokenizer")
    if family == "llm-weights" and is_vision(model):
        name = "AutoImageProcessor"
    if family == "llm-weights" and hasattr(model.config, "image_token_id"):
        found = processor(transformers, "vlm", model, folder, revision)
        if found is not None:
            return found
    try:
        found = getattr(transformers, name).from_pretrained(folder, **revision)
    except (OSError, ValueError):
        return None
    # Of a folder without its files transformers may make one that knows no letter (Mamba).
    empty = name == "AutoTokenizer" and not found("a", add_special_tokens=False)["input_ids"]
    return None if empty else found


def converted(source: Source) -> str:
    """The safetensors folder of a model that a package carries as GGUF, converted once into the cache."""
    origin = Path(source.location)
    gguf = sorted(origin.glob("*.gguf"))
    if not gguf:
        return str(origin)
    target = cache_folder() / source.name
    if (target / "config.json").is_file():
        return str(target)
    import transformers

    print(f"converting {source.name} to safetensors, once (about 20 s)", file=sys.stderr)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        origin, gguf_file=gguf[0].name, dtype=torch.float32
    )
    # A GGUF is read dequantised; transformers still marks the model as quantised and would not save it.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    tokenizer = transformers.AutoTokenizer.from_pretrained(origin, gguf_file=gguf[0].name)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    partial.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    try:
        partial.rename(target)
    except OSError:
        # Another process was first.
        shutil.rmtree(partial)
    return str(target)
