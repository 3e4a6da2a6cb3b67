"""What `tprune vlm` hands back: a token method at work, what it amounts to, and what of it is stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tprune.core.budget import Stage, counts_entering
from tprune.models.decoder import DecoderDriver
from tprune.models.image_cache import ImageCaches
from tprune.models.projector import Projector
from tprune.pipelines.base import Achieved
from tprune.pipelines.learned import stored
from tprune.pipelines.tallied import TalliedHandle


class VlmHandle(TalliedHandle):
    """A token method at work before or inside a decoder."""

    kind = "wrapped"

    def __init__(
        self,
        driver: DecoderDriver | ImageCaches,
        projector: Projector | None,
        stages: Sequence[Stage],
        tokens: int,
        fitted: dict[str, Any] | None = None,
    ):
        self.driver, self.projector, self.stages, self.tokens = driver, projector, stages, tokens
        self.fitted = fitted

    def tensors(self, by_reference: bool) -> dict[str, Tensor]:
        """What the method learned, and what of the model it tuned."""
        return stored(self.driver.method, self.driver.model, self.fitted, by_reference)

    def remove(self) -> None:
        """Take all hooks out again."""
        self.driver.remove()
        if self.projector is not None:
            self.projector.remove()

    def scoring(self) -> list[tuple[Any, str]]:
        """Where the method chooses, and what it chose leaves: what a benchmark times apart."""
        if isinstance(self.driver, ImageCaches):
            return [(self.driver, "prune_prompt"), (self.driver, "leave")]
        entrance = [] if self.driver.entrance is None else [(self.driver, "entrance")]
        return [(self.driver, "_reduce"), *entrance]

    def kept_per(self) -> str:
        """What a choice is made for."""
        if isinstance(self.driver, ImageCaches):
            return "head"
        return self.driver.method.unit if self.driver.entrance else "prompt"

    def positions(self) -> str:
        """Of the tokens that are left."""
        if self.projector is None:
            return self.driver.positions
        if self.projector.ascending:
            return "gap"
        outer, inner = self.driver.positions, self.driver.inputs.positions
        return outer if outer == inner else f"{outer}, {inner} inside the decoder"

    def reset(self) -> None:
        """Begin a new episode, for methods that keep something from prompt to prompt."""
        self.driver.episode.reset()

    def entering(self) -> tuple[float, list[float]]:
        """Image tokens of a prompt, and how many of them entered each layer: means over the evaluation's prompts, or
        over all so far.

        Before the first prompt, what is planned for one image.
        """
        tally = self.tally
        if not tally.prompts:
            planned = counts_entering(self.stages, self.tokens, tally.depth)
            return float(self.tokens), [float(count) for count in planned[::2]]
        return int(tally.tokens) / tally.prompts, [count / tally.prompts for count in tally.entering.tolist()]

    def achieved(self) -> Achieved:
        """The fraction of image tokens that entered a layer, averaged over layers and prompts, as it was measured."""
        tokens, entering = self.entering()
        mean = sum(entering) / len(entering)
        details = {
            "tokens": tokens,
            "tokens_entering_mean": mean,
            "tokens_leaving_mean": (sum(entering[1:]) + entering[-1]) / len(entering),
            "kept_per": self.kept_per(),
            "positions": self.positions(),
        }
        return Achieved(mean / tokens, details)

    def per_layer(self) -> list[dict[str, Any]]:
        """Image tokens entering every decoder layer, mean over prompts."""
        return [{"layer": layer, "tokens": count} for layer, count in enumerate(self.entering()[1])]
