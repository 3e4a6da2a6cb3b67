"""UniPruneBench measures other papers' pruning: three budgets, a random floor, and accuracy for each ability."""

from tprune.methods.answer import NotAMethod
from tprune.methods.base import Paper


class UniPruneBench(NotAMethod):
    """A benchmark of visual token pruning."""

    paper = Paper(
        title="Can Visual Input Be Compressed? A Visual Token Compression Benchmark for Large Multimodal Models",
        venue="arXiv",
        year=2025,
        arxiv="2511.02650",
        code="TianfanPeng/VLMUniPruneBench",
        checked="code",
    )
    why = "it is a protocol that other methods are measured by, and chooses no tokens itself"
    piece = (
        "its grid of methods and budgets, with random as the floor and accuracy for each kind of question: "
        "tprune sweep vlm --grid recipes/vlm/uniprunebench.grid --seeds 3 --out DIR"
    )
