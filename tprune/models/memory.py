"""The process's own memory."""

import ctypes
from contextlib import suppress


def give_back() -> None:
    """Have the C library return what was freed to the system (glibc only; elsewhere nothing happens).

    Long-lived small tensors between freed large ones otherwise keep the heap at its largest, and growing.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
