"""Models whose decoder blocks stay in their files until they run."""

from __future__ import annotations

from pathlib import Path

import torch

from tprune.errors import UserError
from tprune.models.find import find_blocks
from tprune.models.load_transformers import auto_class, converted, processor
from tprune.models.loading import guard
from tprune.models.memory import give_back
from tprune.models.pages import Pages
from tprune.models.shards import Shards
from tprune.models.source import PACKAGED, Source
from tprune.models.subject import Subject
from tprune.models.vision_blocks import is_vision


def load_paged(source: Source, family: str, *, device: str, dtype: str) -> Subject:
    """As `load.load`, of a model whose decoder blocks are read when they run (`tprune.models.pages`).

    Raises:
        UserError: as there; no safetensors files, a model that is converted while it is loaded, or a vision
            transformer.
    """
    import transformers
    from accelerate import init_empty_weights

    refused = UserError(
        f"--max-memory: {source.name} is a vision transformer, which is held in memory; leave it out"
    )
    if source.library == "timm":
        raise refused
    if source.random_weights and source.weights is None:
        raise UserError(
            "--max-memory: blocks are read from files, which --random-weights has none of; leave one out"
        )
    transformers.utils.logging.set_verbosity_error()
    folder = guard(source, lambda: _downloaded(source))
    files = (
        sorted(Path(folder).glob("model*.safetensors")) if source.weights is None else [Path(source.weights)]
    )
    if not files:
        raise UserError(f"--max-memory: {source.name} has no model*.safetensors files to read block by block")
    config = guard(source, lambda: transformers.AutoConfig.from_pretrained(folder))
    if hasattr(config.get_text_config(decoder=True), "tprune"):
        raise UserError(f"--max-memory: {source.name} has shapes of its own; leave --max-memory out")
    kind = auto_class(transformers, family, config, source)
    build = getattr(kind, "from_config", None) or kind._from_config
    precision = getattr(torch, dtype)
    with init_empty_weights(include_buffers=False):
        model = build(config, dtype=precision).requires_grad_(False).eval()
    if is_vision(model):
        raise refused
    Pages(find_blocks(model), Shards(files), device, precision)
    subject = Subject(model, processor(transformers, family, model, folder, {}), source)
    give_back()  # reading a tokenizer takes tens of megabytes for a while
    return subject


def _downloaded(source: Source) -> str:
    """The folder with a model's files."""
    if source.kind == "folder":
        return converted(source) if source.name in PACKAGED else source.location
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.model", "*.txt"]
    return snapshot_download(source.location, revision=source.revision, allow_patterns=wanted)
