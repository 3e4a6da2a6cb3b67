"""The process's own memory."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""As glibc's malloc.h has them."""
LARGEST_MMAP_THRESHOLD = 2**25
"""The most that it allows: larger pieces are the system's own and go back at once."""


def give_back() -> None:
    """Have the C library return what was freed to the system (glibc only; elsewhere nothing happens).

    Long-lived small tensors between freed large ones otherwise keep the heap at its largest, and growing.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def keep_freed() -> None:
    """Have the C library keep freed memory for what comes next, until `give_back` (glibc only).

    Else it returns the activations of every layer to the system and asks for them again, page by page: up to a tenth
    of a forward pass, more in some processes than in others, which also makes timings unequal.
    """
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(TRIM_THRESHOLD, 2**31 - 1)
        library.mallopt(MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)


class _Mallinfo(ctypes.Structure):
    """`struct mallinfo2`, as glibc's malloc.h has it."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


def in_use() -> int:
    """Bytes that all threads were given by the C library and have not freed.

    Raises:
        AttributeError: where the library does not tell (not glibc, or one before 2.33).
    """
    ask = ctypes.CDLL(None).mallinfo2
    ask.restype = _Mallinfo
    told = ask()
    return told.uordblks + told.hblkhd


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, for files to be read into and written from.

    Unlike `numpy()` this leaves the storage resizable.
    """
    return memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")
