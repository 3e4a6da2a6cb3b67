"""From where a model comes from to a model in memory."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from tprune.artifact import read_tensors
from tprune.errors import UserError
from tprune.models.source import PACKAGED, Source, cache_folder
from tprune.models.subject import Subject
from tprune.models.text_encoder import classifies, is_encoder
from tprune.models.vision_blocks import is_vision

T = TypeVar("T")

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
        "AutoModel",
    ),
}
TEXT_FAMILIES = ("llm-context", "llm-weights")
"""Where text encoders come with the head they were saved with, or bare."""


def load(source: Source, family: str, *, device: str, dtype: str, seed: int) -> Subject:
    """The model in eval mode on `device` in `dtype`, with its processor.

    Raises:
        UserError: it cannot be had, is damaged, or is of no kind that the family prunes.
    """
    precision = getattr(torch, dtype)
    subject = (
        _timm(source, seed) if source.library == "timm" else _transformers(source, family, precision, seed)
    )
    subject.model.requires_grad_(False).eval().to(device=device, dtype=precision)
    return subject


def _timm(source: Source, seed: int) -> Subject:
    import timm

    import tprune.models.vim  # noqa: F401  (registers its models with timm)

    name = f"local-dir:{source.location}" if source.kind == "folder" else source.location
    if source.kind == "timm" and not timm.is_model(name):
        raise UserError(f"no model '{source.name}': not built in, no folder, and timm does not know it")
    with _seeded(seed):
        if source.weights or source.random_weights:
            model = _guard(source, lambda: timm.create_model(name, pretrained=False))
        else:
            model = _guard(source, lambda: timm.create_model(name, pretrained=True))
    if source.weights:
        _replace_weights(model, source.weights)
    return Subject(model, timm_transform(model), source)


def in_timm(name: str) -> bool:
    """Whether timm knows a model of this name."""
    import timm

    return timm.is_model(name)


def timm_transform(model: nn.Module) -> Callable[[Any], torch.Tensor]:
    """What a timm model's evaluation makes of an image, [3, H, W], of the size the model was built for."""
    from timm.data import create_transform, resolve_model_data_config

    patches = getattr(model, "patch_embed", None)
    built = getattr(patches, "img_size", None)
    size = {} if built is None else {"input_size": (patches.proj.in_channels, *built)}
    return create_transform(**resolve_model_data_config(model, size), is_training=False)


def _transformers(source: Source, family: str, dtype: torch.dtype, seed: int) -> Subject:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    folder = converted(source) if source.name in PACKAGED else source.location
    revision = {"revision": source.revision} if source.revision else {}
    config = _guard(source, lambda: transformers.AutoConfig.from_pretrained(folder, **revision))
    kind = _auto_class(transformers, family, config, source)
    if hasattr(config.get_text_config(decoder=True), "tprune"):
        kind = _of_own_shapes(kind._model_mapping[type(config)])
    with _seeded(seed):
        if source.random_weights or source.weights:
            build = getattr(kind, "from_config", None) or kind._from_config
            model = build(config, dtype=dtype)
        elif source.base is not None:
            model = _guard(source, lambda: kind.from_pretrained(source.base, config=config, dtype=dtype))
            model.load_state_dict(read_tensors(f"{folder}/model.safetensors"), strict=False)
        else:
            model = _guard(source, lambda: kind.from_pretrained(folder, dtype=dtype, **revision))
    model.__class__ = getattr(type(model), "stock", type(model))
    if source.weights:
        _replace_weights(model, source.weights)
    return Subject(model, _processor(transformers, family, model, source.base or folder, revision), source)


def load_paged(source: Source, family: str, *, device: str, dtype: str) -> Subject:
    """As `load`, of a model whose decoder blocks are read when they run (`tprune.models.pages`).

    Raises:
        UserError: as `load`; no safetensors files, or a model that is converted while it is loaded.
    """
    import transformers
    from accelerate import init_empty_weights

    from tprune.models.blocks import find_decoder
    from tprune.models.pages import Pages
    from tprune.models.shards import Shards

    if source.random_weights and source.weights is None:
        raise UserError(
            "--max-memory: blocks are read from files, which --random-weights has none of; leave one out"
        )
    transformers.utils.logging.set_verbosity_error()
    folder = _guard(source, lambda: _downloaded(source))
    files = (
        sorted(Path(folder).glob("model*.safetensors")) if source.weights is None else [Path(source.weights)]
    )
    if not files:
        raise UserError(f"--max-memory: {source.name} has no model*.safetensors files to read block by block")
    config = _guard(source, lambda: transformers.AutoConfig.from_pretrained(folder))
    if hasattr(config.get_text_config(decoder=True), "tprune"):
        raise UserError(f"--max-memory: {source.name} has shapes of its own; leave --max-memory out")
    if config.is_encoder_decoder:
        raise UserError(
            f"--max-memory: {source.name} has an encoder beside its decoder, and blocks are read from files for one "
            "stack alone; leave --max-memory out"
        )
    kind = _auto_class(transformers, family, config, source)
    build = getattr(kind, "from_config", None) or kind._from_config
    precision = getattr(torch, dtype)
    with init_empty_weights(include_buffers=False):
        timm = source.library == "timm"
        model = None if timm else build(config, dtype=precision).requires_grad_(False).eval()
    if timm or is_vision(model):
        raise UserError(
            f"--max-memory: {source.name} is a vision transformer, which is held in memory; leave it out"
        )
    Pages(find_decoder(model), Shards(files), device, precision)
    return Subject(model, _processor(transformers, family, model, folder, {}), source)


def _downloaded(source: Source) -> str:
    """The folder with a model's files."""
    if source.kind == "folder":
        return converted(source) if source.name in PACKAGED else source.location
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.model", "*.txt"]
    return snapshot_download(source.location, revision=source.revision, allow_patterns=wanted)


def _of_own_shapes(kind: Any) -> Any:
    """The model class `kind`, built with the widths and factors per layer of its configuration's `tprune` section.

    The shapes are there before weights are loaded, so transformers' own loader does the rest.
    """
    from tprune.models import factored, shapes
    from tprune.models.blocks import find_decoder

    def __init__(self: Any, config: Any, *more: Any, **named: Any) -> None:  # noqa: N807
        kind.__init__(self, config, *more, **named)
        decoder = find_decoder(self)
        shapes.resize(decoder, decoder.config.tprune.get("layers", []))
        factored.make_room(decoder, decoder.config.tprune.get("wrapped", {}))

    return type(kind.__name__, (kind,), {"__init__": __init__, "__module__": kind.__module__, "stock": kind})


def _auto_class(transformers: Any, family: str, config: Any, source: Source) -> Any:
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


def _processor(
    transformers: Any, family: str, model: nn.Module, folder: str, revision: dict[str, str]
) -> Any:
    """What makes inputs of text, images or both for a model; None where its folder has none."""
    name = {"vit": "AutoImageProcessor", "vlm": "AutoProcessor"}.get(family, "AutoTokenizer")
    if family == "llm-weights" and is_vision(model):
        name = "AutoImageProcessor"
    if family == "llm-weights" and hasattr(model.config, "image_token_id"):
        found = _processor(transformers, "vlm", model, folder, revision)
        if found is not None:
            return found
    try:
        found = getattr(transformers, name).from_pretrained(folder, **revision)
    except (OSError, ValueError):
        return None
    # Of a folder without its files transformers may make one that knows no letter (Mamba).
    empty = name == "AutoTokenizer" and not found("a", add_special_tokens=False)["input_ids"]
    return None if empty else found


def _replace_weights(model: torch.nn.Module, file: str) -> None:
    try:
        model.load_state_dict(read_tensors(file))
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise UserError(f"--weights {file} does not fit the model: {first}") from None


class _seeded:  # noqa: N801  (reads as a statement)
    """Initialise from `seed` and leave the global generator as it was."""

    def __init__(self, seed: int):
        self.seed = seed

    def __enter__(self) -> None:
        self.fork = torch.random.fork_rng()
        self.fork.__enter__()
        torch.manual_seed(self.seed)

    def __exit__(self, *exception: Any) -> None:
        self.fork.__exit__(*exception)


def _guard(source: Source, make: Callable[[], T]) -> T:
    """`make()`, with what can go wrong on the way said in one line."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
    from safetensors import SafetensorError

    quiet = logging.getLogger("timm.models._hub"), logging.getLogger("timm.models._builder")
    for logger in quiet:
        logger.setLevel(logging.ERROR)
    unreachable = UserError(
        f"the hub cannot be reached for {source.name}; go on with --weights FILE.safetensors, "
        "--random-weights, or a built-in model (tprune zoo list)"
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return make()
    except SafetensorError as error:
        raise UserError(f"the weights of {source.name} are not readable safetensors ({error})") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, ConnectionError, TimeoutError):
        raise unreachable from None
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        if _is_network(error):
            raise unreachable from None
        raise UserError(f"cannot load {source.name}: {' '.join(str(error).split())[:300]}") from None


def _is_network(error: BaseException) -> bool:
    """Whether an unreachable hub is behind `error`."""
    words = ("couldn't connect", "connection", "offline", "resolve", "max retries", "timed out", "not reach")
    while error is not None:
        name = type(error).__module__
        if name.startswith(("httpx", "httpcore", "requests", "urllib3", "socket")):
            return True
        if any(word in str(error).lower() for word in words):
            return True
        error = error.__cause__ or error.__context__
    return False


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
