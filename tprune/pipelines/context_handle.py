"""What `tprune llm-context` hands back: a method at work, and what it amounts to."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tprune.models.compress import Compression
from tprune.models.decoder import DecoderDriver
from tprune.models.revive import RevivingDriver
from tprune.pipelines.base import Achieved, Handle
from tprune.pipelines.learned import stored
from tprune.pipelines.tallied import TalliedHandle


class CacheHandle(Handle):
    """A cache method at work on a model."""

    kind = "wrapped"

    def __init__(self, compression: Compression, model: nn.Module, fitted: dict[str, Any] | None = None):
        self.compression, self.model, self.fitted = compression, model, fitted

    def tensors(self, by_reference: bool) -> dict[str, Tensor]:
        """What the method learned, and what of the model it tuned."""
        return stored(self.compression.method, self.model, self.fitted, by_reference)

    def remove(self) -> None:
        """Take all hooks out again; caches that were pruned cannot be used any more."""
        self.compression.remove()

    def scoring(self) -> dict[str, tuple[Any, str]]:
        """Where the method chooses, and what it chose leaves: what a benchmark times apart."""
        found = {"prefill": (self.compression, self.compression.chooses_in)}
        if self.compression.method.evicts_while_decoding and self.compression.keep < 1:
            found["decode"] = (self.compression, "make_room")
        return found

    def achieved(self) -> Achieved:
        """The fraction of entries that the latest prompt left, over all layers that can be pruned; asked before any."""
        kept = self.compression.kept
        if not kept:
            return Achieved(self.compression.keep)
        left, seen = (sum(counts) for counts in zip(*kept.values(), strict=True))
        untouched = len(self.compression.kinds) - len(kept)
        return Achieved(left / seen, {"sliding_layers_untouched": untouched} if untouched else {})

    def per_layer(self) -> list[dict[str, Any]]:
        """Entries per key-value head that the latest prompt left in every layer."""
        rows = []
        for layer in range(len(self.compression.kinds)):
            left, seen = self.compression.kept.get(layer, (None, None))
            share = None if left is None else left / seen
            rows.append({"layer": layer, "entries": left, "of": seen, "kept": share})
        return rows


class PrefillHandle(TalliedHandle):
    """A token method at work inside a model's decoder."""

    kind = "wrapped"

    def __init__(self, driver: DecoderDriver, keep: float | None, fitted: dict[str, Any] | None = None):
        self.driver, self.keep, self.fitted = driver, keep, fitted

    def tensors(self, by_reference: bool) -> dict[str, Tensor]:
        """What the method learned, and what of the model it tuned."""
        return stored(self.driver.method, self.driver.model, self.fitted, by_reference)

    def remove(self) -> None:
        """Take all hooks out again."""
        self.driver.remove()

    def scoring(self) -> dict[str, tuple[Any, str]]:
        """Where the method chooses, and what it chose leaves: what a benchmark times apart."""
        return {"prefill": (self.driver, "_reduce")}

    def achieved(self) -> Achieved:
        """The mean fraction of prunable prompt tokens that entered a layer."""
        tally = self.tally
        lost = self.driver.method.revives() and not isinstance(self.driver, RevivingDriver)
        details = {"tokens_come_back": False} if lost else {}
        if not tally.prompts:
            return Achieved(self.keep or 1.0, details)
        return Achieved((tally.entering.double().mean() / tally.tokens).item(), details)

    def per_layer(self) -> list[dict[str, Any]]:
        """Prunable tokens entering each layer, mean over prompts."""
        tally = self.tally
        if not tally.prompts:
            return []
        rows = [count / tally.prompts for count in tally.entering.tolist()]
        return [{"layer": layer, "tokens": count} for layer, count in enumerate(rows)]
