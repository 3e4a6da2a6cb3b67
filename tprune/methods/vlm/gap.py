"""GAP lets the image tokens that are left keep their position ids: with new ones a model cannot point any more."""

from tprune.methods.answer import NotAMethod
from tprune.methods.base import Paper


class GAP(NotAMethod):
    """The position ids of the unpruned prompt, in ascending order."""

    paper = Paper(
        title="Grounding-Aware Token Pruning: Recovering from Drastic Performance Drops in Visual Grounding Caused by "
        "Pruning",
        venue="arXiv",
        year=2025,
        arxiv="2506.21873",
        checked="paper",
    )
    why = (
        "it chooses no tokens: it is a policy for the position ids of whatever another method keeps, and every vlm "
        "method can be run with it"
    )
    piece = "--positions gap, with any vlm method"
