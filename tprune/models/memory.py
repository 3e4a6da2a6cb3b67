"""The process's own memory."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def give_back() -> None:
    """Have the C library return what was freed to the system (glibc only; elsewhere nothing happens).

    Long-lived small tensors between freed large ones otherwise keep the heap at its largest, and growing.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, for files to be read into and written from.

    Unlike `numpy()` this leaves the storage resizable.
    """
    return memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")
