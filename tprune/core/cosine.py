"""Cosines of many vectors with many: all of them against others, or against each other."""

from __future__ import annotations

from torch import Tensor

from tprune.core.score import cosine_normalise


def between(rows: Tensor, columns: Tensor, eps: float = 1e-8) -> Tensor:
    """The cosine of each of `rows` [B, R, D] with each of `columns` [B, N, D]: float32 [B, R, N].

    The products are divided by the norms, not the vectors, which are larger; norms below `eps` count as it.
    """
    rows, columns = rows.float(), columns.float()
    high, wide = (x.norm(dim=-1).clamp_min(eps) for x in (rows, columns))
    return rows @ columns.transpose(1, 2) / high.unsqueeze(2) / wide.unsqueeze(1)


def among(x: Tensor, eps: float = 1e-8) -> Tensor:
    """The cosine of each of `x` [B, N, D] with each: float32 [B, N, N].

    On a CPU what lies under the diagonal is mirrored, not computed.
    """
    unit = cosine_normalise(x, eps)
    strip = 96 if x.device.type == "cpu" else max(1, x.shape[1])
    found = unit.new_empty(*unit.shape[:2], unit.shape[1])
    for first in range(0, x.shape[1], strip):
        part = unit[:, first : first + strip] @ unit[:, first:].transpose(1, 2)
        found[:, first:, first : first + strip] = part.transpose(1, 2)
        found[:, first : first + strip, first:] = part
    return found
