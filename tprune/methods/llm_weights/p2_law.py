"""P² law: how low the loss of a pruned model will get by training, from losses that were measured on others."""

from tprune.methods.answer import NotAMethod
from tprune.methods.base import Paper


class P2Law(NotAMethod):
    """An analysis of models that were pruned and trained."""

    paper = Paper(
        title="P^2 Law: Scaling Law for Post-Training After Model Pruning",
        venue="ACL",
        year=2025,
        arxiv="2411.10272",
        checked="paper",
        notes="The law and the least squares by Levenberg-Marquardt are the paper's; its fitted values are not used, "
        "since they belong to its models and data.",
    )
    why = "it prunes nothing, and foretells the loss that training after pruning will reach"
    piece = "the law, fitted to your own points: tprune predict-recovery POINTS"
