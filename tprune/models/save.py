"""Models on disk: written in timm's or transformers' own format, read again with their own loaders."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from tprune import artifact
from tprune.errors import UserError
from tprune.models import load as loaders
from tprune.models import vision_blocks
from tprune.models.load_paged import load_paged
from tprune.models.source import Source, sha256
from tprune.models.subject import Subject, pages_of
from tprune.recipe import Recipe


def model(subject: Subject, folder: Path) -> None:
    """Write weights, config and processor as stock loaders expect them."""
    if subject.source.library == "timm":
        _timm(subject, folder)
    else:
        pages = pages_of(subject.model)
        (subject.model.save_pretrained if pages is None else pages.save)(folder)
        if subject.processor is not None:
            subject.processor.save_pretrained(folder)


def _timm(subject: Subject, folder: Path) -> None:
    from safetensors.torch import save_file
    from timm.models._hub import save_config_for_hf

    state = {name: tensor.contiguous() for name, tensor in subject.model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    arguments, ours = vision_blocks.written(subject.model)
    save_config_for_hf(subject.model, str(folder / "config.json"), ours, arguments)


def load(folder: Path, recipe: Recipe, report: dict[str, Any]) -> Subject:
    """The model of an artifact that holds its weights, before any run-time method is put on it."""
    library = "timm" if "architecture" in json.loads((folder / "config.json").read_text()) else "transformers"
    source = Source(recipe.model.name, "folder", str(folder), library)
    return load_as(recipe, source, report["family"])


def load_as(recipe: Recipe, source: Source, family: str) -> Subject:
    """A model where and in which precision a recipe wants it; read block by block where it says so."""
    where = {"device": recipe.device, "dtype": recipe.dtype}
    if recipe.max_memory is not None:
        return load_paged(source, family, **where)
    return loaders.load(source, family, **where, seed=recipe.seed)


def weight_files(source: Source) -> list[Path]:
    """The safetensors files of a local folder, sorted by name."""
    if source.weights:
        return [Path(source.weights)]
    skip = {artifact.TENSORS, artifact.PROBE}
    return sorted(file for file in Path(source.location).glob("*.safetensors") if file.name not in skip)


def fingerprint(source: Source) -> str | None:
    """sha256 of the weights a source names; None for weights drawn from the seed or kept by a hub's revision."""
    if source.random_weights and not source.weights:
        return None
    if source.kind != "folder" and not source.weights:
        return None
    files = weight_files(source) or sorted(Path(source.location).glob("*.gguf"))
    return sha256(files)


def by_reference(recipe: Recipe, subject: Subject) -> Recipe:
    """The recipe with its base weights named by source, revision and sha256 instead of copied."""
    return replace(recipe, model=replace(recipe.model, sha256=fingerprint(subject.source)))


def check_reference(recipe: Recipe, source: Source) -> None:
    """Refuse base weights that are not the ones a by-reference artifact was made from."""
    if recipe.model.sha256 and fingerprint(source) != recipe.model.sha256:
        raise UserError(
            f"the weights of {recipe.model.name} are not those this artifact was made from "
            f"(sha256 {recipe.model.sha256[:12]}… expected); get the same weights, or run the recipe again"
        )
