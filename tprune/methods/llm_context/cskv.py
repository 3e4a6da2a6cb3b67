"""CSKV holds a cache as low-rank codes of the layers' inputs: channels are lost, and no token is.

Keys and values are redundant along their channels. Two pairs of thin matrices per layer, which start at the singular
vectors of its projections and are fitted to reconstruct what these make, stand for them; what came since the last full
window stays as it is. Keys are held before RoPE and rotated when they are made again.
"""

from __future__ import annotations

from dataclasses import dataclass

from tprune.core.cache import Evict
from tprune.core.low_rank import KeyValueMaps, LowRank, LowRankMap
from tprune.core.stored import Encode, Stored
from tprune.errors import UserError
from tprune.methods.base import Paper, param
from tprune.methods.cache import CacheMethod, CacheShape
from tprune.methods.cache_view import LayerView


@dataclass(frozen=True)
class CSKV(CacheMethod):
    """Every full window of entries is held as codes; without a fit these are the projections' own singular vectors."""

    paper = Paper(
        title="CSKV: Training-Efficient Channel Shrinking for KV Cache in Long-Context Scenarios",
        venue="ENLSP workshop at NeurIPS",
        year=2024,
        arxiv="2409.10593",
        code="wln20/CSKV",
        checked="code",
        notes="As the authors' code: a window fills up, and is emptied when it is full. The budget is bytes and gives "
        "the ranks, of all heads together and to the single code; fitted maps have one rank for all lengths, and what "
        "is dense comes on top. Biases, and norms of keys, which the authors' models "
        "lack, come after the reconstruction. The learning rate falls as a cosine, theirs linearly; their quantisation "
        "of the codes is left out.",
    )
    kind = "trained"
    learns = "optional"
    reads = ("inputs",)
    takes = ()
    encodes = True
    built_in = {"sequence": 256, "looks": 16, "batch": 2, "epochs": 1.0, "lr": 1e-3}

    window: int = param(32, "entries that are held as codes together; fewer stay dense", low=1)
    share: float = param(0.5, "of the codes, the part that is the keys'", low=0, high=1)
    scale: float = param(
        0.5, "fit: power of the inputs' mean size in the initial maps (ASVD); 0 ignores it", low=0
    )
    looks: int = param(256, "fit: sequences that this size is measured on", low=0)
    sequence: int = param(1024, "fit: tokens of a training sequence", low=2)
    epochs: float = param(1.0, "fit: passes over the training text", low=0)
    batch: int = param(1, "fit: sequences per step", low=1)
    lr: float = param(5e-5, "fit: peak learning rate", low=0)

    def check_length(self, length: int, count: int) -> None:
        """What is behind the last full window is dense, and must fit into the budget."""
        if count <= length % self.window or length < self.window:
            raise UserError(
                f"cskv: {count} of {length} entries are the memory of no more than the {length % self.window} behind "
                f"the last full window of {self.window}; raise --keep, or lower --set window=…"
            )

    def start(self, layer: LayerView, count: int) -> Evict | Encode:
        """Codes for all, and the entries themselves behind the last full window."""
        if count == layer.length:
            return Evict.nothing(*layer.key.shape[:3], layer.key.device)
        dense = layer.length % self.window
        old, new = layer.inputs.split([layer.length - dense, dense], dim=1)
        maps = self.maps(layer, (count - dense) / layer.length)
        part = LowRank(*maps.encode(old), maps, layer.begin)
        return Encode(Stored((part,)), dense, self.window, maps.encode(new))

    def maps(self, layer: LayerView, keep: float) -> KeyValueMaps:
        """What was fitted for this layer; else its singular vectors, as many as `keep` of its channels."""
        made = layer.projections
        finish = made.finish_keys, made.finish_values
        if self.state is not None:
            names = ("key", "value")
            fitted = [
                LowRankMap(self.state[f"{name}_down.{layer.layer}"], self.state[f"{name}_up.{layer.layer}"])
                for name in names
            ]
            return made.once("fitted", lambda: KeyValueMaps(*(one.to(layer.key) for one in fitted), *finish))
        whole = made.once("whole", lambda: [LowRankMap.of(w).to(layer.key) for w in made.weights()])
        ranks = self.ranks([len(one.up) for one in whole], keep)
        return KeyValueMaps(*(one.first(rank) for one, rank in zip(whole, ranks, strict=True)), *finish)

    def ranks(self, channels: list[int], keep: float) -> tuple[int, int]:
        """How many codes keys and values have, of so many channels each."""
        codes = round(keep * sum(channels))
        keys = min(channels[0], max(round(self.share * codes), codes - channels[1]))
        if keys < 1 or codes - keys < 1:
            raise UserError(
                f"cskv: {codes} codes of {sum(channels)} channels leave nothing of keys or of values"
            )
        return keys, codes - keys

    def fit(self, shape: CacheShape, keep: float, seed: int):
        """The maps of all layers."""
        from tprune.methods.llm_context._cskv_fit import Reconstruction

        if self.pyramid is not None:
            raise UserError(
                "--set pyramid=…: cskv's maps are fitted to one budget for all layers; leave it out"
            )
        return Reconstruction(self, shape, keep)
