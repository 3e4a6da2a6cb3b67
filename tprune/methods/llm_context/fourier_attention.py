"""FourierAttention: channels of keys and values that vary smoothly along a text are held as a few low frequencies.

Many dimensions say nothing that long contexts need, and a truncated Fourier series over the tokens, stretched back to
the range it had, stands for them. The others stay exact, as do the first entries and the latest; no token is lost.
"""

from __future__ import annotations

from dataclasses import dataclass

from tprune.core.cache import Evict
from tprune.core.fourier import Exact, Fourier, Mixed, together
from tprune.core.stored import Encode, Stored
from tprune.errors import UserError
from tprune.methods.base import Paper, param
from tprune.methods.cache import CacheMethod
from tprune.methods.cache_view import LayerView

FLOAT = 4
"""Bytes of a coefficient."""
RATIOS = 1
"""Numbers beside a channel's coefficients."""
PLACE = 8
"""Bytes that say which channel is where."""


@dataclass(frozen=True)
class FourierAttention(CacheMethod):
    """Low frequencies for the channels that they stand for best; what leaves the window is added to them."""

    paper = Paper(
        title="Beyond Homogeneous Attention: Memory-Efficient LLMs via Fourier-Approximated KV Cache",
        venue="arXiv",
        year=2025,
        arxiv="2506.11886",
        code="ShirleYoung/FourierAttention",
        checked="code",
        notes="The authors choose channels once for a model, on long texts and before RoPE; here every prompt chooses "
        "its own by the same error, of keys as they are held. The budget is bytes, and says how many channels are "
        "frequencies, where the authors give shares by layer. Coefficients grow with the prompt, as 1,024 of "
        "32k. An entry that leaves the window counts where it stands, one place before the authors'.",
    )
    reads = ()
    takes = ()
    encodes = True

    first: int = param(4, "first entries that stay exact", low=0)
    window: int = param(32, "latest entries that stay exact; the authors' 1,024 are of 32k", low=1)
    states: float = param(0.03125, "coefficients of a channel, as a fraction of the prompt", low=0, high=1)
    keys: float = param(0.5, "of the channels that stay exact, the part that is the keys'", low=0, high=1)
    stretch: bool = param(
        True,
        "what the frequencies make has the channel's range, as its authors'; false: a plain Fourier series",
    )
    coming: int = param(
        512, "tokens to come that the period has room for; later ones fall onto the first", low=0
    )

    def frequencies(self, length: int) -> int:
        """How many of them stand for a channel: half of its coefficients."""
        return max(1, round(self.states * length / 2))

    def check_length(self, length: int, count: int) -> None:
        """What stays exact for certain, and the coefficients, must fit into the budget."""
        states = 2 * self.frequencies(length)
        least = self.first + self.window + states + RATIOS
        if count <= least:
            raise UserError(
                f"fourier-attention: {count} of {length} entries are the memory of no more than its {self.first} first "
                f"entries, a window of {self.window} and {states} coefficients of each channel; raise --keep, or "
                "lower --set window=… or states=…"
            )

    def start(self, layer: LayerView, count: int) -> Evict | Encode:
        """Frequencies for so many channels that the rest has room in the memory of `count` entries."""
        if count == layer.length:
            return Evict.nothing(*layer.key.shape[:3], layer.key.device)
        frequencies, window = self.frequencies(layer.length), self.window
        middle = slice(self.first, layer.length - window)
        period = layer.length + self.coming - self.first - window
        parts = [
            Mixed.of(together(x[:, :, middle]), channels, frequencies, period, self.stretch)
            for x, channels in zip((layer.key, layer.value), self.channels(layer, count), strict=True)
        ]
        held = Fourier(*parts, layer.groups)
        exact = (x[:, :, : self.first].clone() for x in (layer.key, layer.value))
        return Encode(Stored((Exact(*exact), held) if self.first else (held,)), window)

    def channels(self, layer: LayerView, count: int) -> tuple[int, int]:
        """How many channels of keys and of values, of all heads together, are frequencies."""
        states = 2 * self.frequencies(layer.length)
        widths = [layer.groups * x.shape[3] for x in (layer.key, layer.value)]
        size, whole = layer.key.element_size(), sum(widths)
        middle = layer.length - self.first - self.window
        saved = middle * size - (states + RATIOS) * FLOAT
        lacking = (layer.length - count) * whole * size + PLACE * whole
        if lacking > saved * whole:
            raise UserError(
                f"fourier-attention: {count} of {layer.length} entries have no room for {states} coefficients "
                "of each channel beside what stays exact; raise --keep, or lower --set window=… or states=…"
            )
        exact = whole - round(lacking / saved)
        keys = min(widths[0], max(round(self.keys * exact), exact - widths[1]))
        return widths[0] - keys, widths[1] - (exact - keys)
