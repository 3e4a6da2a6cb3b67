"""tprune: prune transformers; every method under the same budget.

    import tprune

    with tprune.prune(model, "zero-tprune", keep=0.65):     # tokens and caches: undone at the end
        logits = model(images)
    tprune.prune(model, "wanda", sparsity=0.5, tokenizer=tokenizer)   # weights: in place
    model = tprune.load("out/")                              # what `--out out/` wrote
    Trainer(model, …, callbacks=[tprune.keep_zeros("out/")])             # fine-tuning keeps the zeros
    tprune.methods("vit")                                    # what there is

Importing tprune does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tprune import methods
    from tprune.api import keep_zeros, load, prune
    from tprune.errors import UserError
    from tprune.recipe import Recipe

__all__ = ["Recipe", "UserError", "keep_zeros", "load", "methods", "prune"]

_WHERE = {
    "Recipe": "tprune.recipe",
    "UserError": "tprune.errors",
    "keep_zeros": "tprune.api",
    "load": "tprune.api",
    "prune": "tprune.api",
}


def __getattr__(name: str) -> Any:
    if name == "methods":
        return import_module("tprune.methods")
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'tprune' has no attribute '{name}'")
