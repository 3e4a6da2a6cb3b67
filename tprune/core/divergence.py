"""How far one distribution over tokens is from another."""

from __future__ import annotations

from torch import Tensor


def divergence(dense: Tensor, other: Tensor, most: int | None = None) -> Tensor:
    """KL(dense ‖ other) of every position: logits [..., V] each -> float32 [...].

    Args:
        dense, other: logits of the same tokens.
        most: look only at so many tokens, the likeliest of `dense`, as if there were no others.
    """
    dense, other = dense.float(), other.float()
    if most is not None and most < dense.shape[-1]:
        dense, index = dense.topk(most, dim=-1)
        other = other.gather(-1, index)
    dense, other = dense.log_softmax(-1), other.log_softmax(-1)
    return (dense.exp() * (dense - other)).sum(-1)
