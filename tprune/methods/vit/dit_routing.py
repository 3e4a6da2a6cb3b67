"""DiT routes every token through scaling and depth paths of its own, by gates that learn under a budget of compute."""

from tprune.methods.answer import NotAMethod
from tprune.methods.base import Paper


class DynamicTokenRouting(NotAMethod):
    """A backbone of its own."""

    paper = Paper(
        title="DiT: Efficient Vision Transformers with Dynamic Token Routing",
        venue="arXiv",
        year=2023,
        arxiv="2308.03409",
        checked="abstract",
        notes="The authors' repository, Maycbj/DiT, holds no code.",
    )
    why = (
        "it is a backbone built and trained with routing gates, on PVTv2 and Swin V2, and a model without them has "
        "no paths to choose from"
    )
    piece = "a gate that learns under a budget: vit/ltmp and vit/diffrate have it, from tprune/core/relax.py"
