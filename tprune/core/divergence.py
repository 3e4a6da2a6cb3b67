"""How far one distribution over tokens is from another."""

from __future__ import annotations

from torch import Tensor


def likeliest(logits: Tensor, most: int | None) -> tuple[Tensor, Tensor | None]:
    """The `most` largest logits [..., K] of every position in [..., V], and whose they are, int64 [..., K].

    All of them, and None, where there are no more or `most` is None.
    """
    if most is None or most >= logits.shape[-1]:
        return logits, None
    values, index = logits.topk(most, dim=-1)
    return values, index


def divergence(dense: Tensor, other: Tensor, index: Tensor | None = None) -> Tensor:
    """KL(dense ‖ other) of every position: float32 [...].

    Args:
        dense: logits [..., K].
        other: logits [..., V].
        index: int64 [..., K], the tokens that `dense` is about, as if there were no others; None: all, in order.
    """
    if index is not None:
        other = other.gather(-1, index)
    dense, other = dense.float().log_softmax(-1), other.float().log_softmax(-1)
    return (dense.exp() * (dense - other)).sum(-1)
