"""Papers that are asked for as methods and are none: `tprune methods` answers them, and no command prunes with them."""

from __future__ import annotations

from typing import ClassVar

from tprune.methods.base import Paper


class NotAMethod:
    """A paper with nothing to prune a given model by; a subclass, in a file like a method's, says what to use instead.

    Attributes:
        paper: which; `checked` says what the answer was read from.
        why: why there is nothing to prune, in one sentence.
        piece: what of it can be used, and where that is, in one sentence.
    """

    kind: ClassVar[str] = "not a method"
    paper: ClassVar[Paper]
    why: ClassVar[str]
    piece: ClassVar[str]
