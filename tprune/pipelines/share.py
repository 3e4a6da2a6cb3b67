"""Several processes that calibrate together: each sends its part of the sequences through the model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from tprune.core.statistics import SHARED
from tprune.methods.region import RegionMethod
from tprune.methods.weights import WeightMethod
from tprune.models.blocks import Decoder
from tprune.models.calibrate import Stream
from tprune.models.gradients import POWERS
from tprune.models.together import Together
from tprune.pipelines.journal import Journal
from tprune.pipelines.weights_kinds import Samples

if TYPE_CHECKING:
    from tprune.pipelines.llm_weights import LlmWeights


def begin(
    driver: LlmWeights, decoder: Decoder, tokens: Samples | None, journal: Journal
) -> tuple[Callable[[], Stream], Journal]:
    """What puts the sequences before the first block, and the journal, for this process.

    Statistics that are sums over tokens are gathered in parts and joined after every pass, so that all processes prune
    alike. What else a method reads (gradients, the order of sequences, losses) every process works out by itself.
    """
    rule = driver.allocation()
    read = {*driver.method.stats, *(() if rule is None else rule.needs(driver.method))}
    if tokens is None or not in_parts(driver.method, read):
        return partial(driver.calibration, decoder, tokens, journal.folder), journal
    together = Together(next(decoder.core.parameters()).device)

    def start() -> Stream:
        stream = driver.calibration(decoder, together.share(tokens), journal.folder)
        stream.join = together.join
        return stream

    return start, Journal(journal.folder, journal.name, together.agree)


def in_parts(method: WeightMethod, read: set[str]) -> bool:
    """Whether all that is `read` of the inputs, for the method and its allocation, is sums over tokens."""
    block = method.scope == "block" and not isinstance(method, RegionMethod)
    return block and read - POWERS.keys() <= set(SHARED)
