"""AdaToken-3D drops spatial tokens that the answer position hardly looks at, from a layer chosen per model."""

from tprune.methods.answer import NotAMethod
from tprune.methods.base import Paper


class AdaToken3D(NotAMethod):
    """FastV with a layer and a ratio read off the model's attention."""

    paper = Paper(
        title="AdaToken-3D: Dynamic Spatial Gating for Efficient 3D Large Multimodal-Models Reasoning",
        venue="IROS",
        year=2025,
        arxiv="2505.12782",
        checked="abstract",
    )
    why = (
        "it is a preset of fastv: tokens are ranked by the attention of the last position, and only the layer and the "
        "ratio are chosen anew for LLaVA-3D"
    )
    piece = "vlm/fastv, as --method fastv --set layer=K --keep R"
