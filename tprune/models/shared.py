"""Blocks that borrow another's weights: y = (W + up · down) x + b, W the other block's, normalised where it is read.

What a borrowing block owns is small: its norms and biases, two thin matrices per linear layer, and a scale behind its
attention and its MLP. The other's layers are called where they are, so that what changes them is followed.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn import functional

from tprune.core.low_rank import LowRankMap
from tprune.core.weights import Shared
from tprune.models.blocks import ROUTERS, Decoder, is_linear, width
from tprune.models.units import WIRING, is_transposed, site


class SharedLinear(nn.Module):
    """A linear layer with a weight from elsewhere.

    Args:
        home, name: the module that holds the other layer, and under which name; neither becomes a part of this one.
        own: the layer whose place this takes.
        rank: of the difference.
        scale: of the normalised output, at first; None for no normalisation.

    Attributes:
        down: [rank, in].
        up: [out, rank].
        bias, scale: [out], or None.
    """

    def __init__(self, home: nn.Module, name: str, own: nn.Module, rank: int, scale: float | None):
        super().__init__()
        outputs, inputs = width(own)
        self._home = home, name
        empty = own.weight.new_empty
        self.down = nn.Parameter(empty(rank, inputs), requires_grad=own.weight.requires_grad)
        self.up = nn.Parameter(empty(outputs, rank), requires_grad=own.weight.requires_grad)
        self.bias = own.bias
        self.scale = None if scale is None else nn.Parameter(own.weight.new_full((outputs,), scale))

    @property
    def base(self) -> nn.Module:
        """The layer that the weight is borrowed from."""
        home, name = self._home
        return getattr(home, name)

    @property
    def weight(self) -> Tensor:
        """What inputs are multiplied by, laid out as the other's, made anew; GPT-2 initialises what is called so."""
        difference = self.up @ self.down
        return self.base.weight + (difference.t() if is_transposed(self.base) else difference)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        base = self.base
        y = base(x) + functional.linear(functional.linear(x, self.down), self.up)
        if base.bias is not None:
            y = y - base.bias
        if self.bias is not None:
            y = y + self.bias
        return y if self.scale is None else functional.layer_norm(y, y.shape[-1:], self.scale)


def share(decoder: Decoder, index: int, how: Shared) -> None:
    """Let block `index` borrow, with the best differences of the rank."""
    for own, fresh in _replaced(decoder, index, how):
        found = LowRankMap.best(_weight(own) - _weight(fresh.base), how.rank)
        fresh.down.data, fresh.up.data = found.down.to(own.weight), found.up.to(own.weight)


def make_room(decoder: Decoder, index: int, how: Shared) -> None:
    """Give a freshly built block the parameters of one that borrows; their values do not matter."""
    for _ in _replaced(decoder, index, how):
        pass


def _replaced(decoder: Decoder, index: int, how: Shared) -> Iterator[tuple[nn.Module, SharedLinear]]:
    """Put a borrowing layer in the place of every linear one in a block; -> what was there, and what is."""
    block, base = decoder.blocks[index], decoder.blocks[how.base]
    places = [site(decoder, index, kind) for kind in WIRING]
    readers = [place.reader for place in places if place is not None]
    for name, own in list(block.named_modules()):
        parent, _, last = name.rpartition(".")
        if not is_linear(own) or last in ROUTERS:
            continue
        scale = how.scale if any(own is reader for reader in readers) else None
        fresh = SharedLinear(base.get_submodule(parent), last, own, how.rank, scale)
        setattr(block.get_submodule(parent), last, fresh)
        yield own, fresh


def _weight(module: nn.Module) -> Tensor:
    """float32 [out, in]."""
    weight = module.weight.data.float()
    return weight.t() if is_transposed(module) else weight


def borrows(decoder: Decoder, index: int) -> Shared | None:
    """From where a block borrows, if it does; its scale is 1, or None where it has none."""
    layers = _layers(decoder.blocks[index])
    if not layers:
        return None
    home = layers[0]._home[0]
    base = next(place for place, block in enumerate(decoder.blocks) if home in block.modules())
    scaled = any(layer.scale is not None for layer in layers)
    return Shared(base, len(layers[0].down), 1.0 if scaled else None)


def size(block: nn.Module) -> int:
    """Weights of the matrices that a borrowing block owns; 0 for any other."""
    return sum(layer.down.numel() + layer.up.numel() for layer in _layers(block))


def _layers(block: nn.Module) -> list[SharedLinear]:
    return [module for module in block.modules() if isinstance(module, SharedLinear)]
