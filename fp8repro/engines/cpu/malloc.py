"""How the C library hands memory back. It changes speed, never a value."""

from __future__ import annotations

import ctypes
import sys

# mallopt's names in glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Let this process keep what it frees; whether the C library could be told so (glibc can).

    By default glibc gives a large block back to the kernel as soon as it is free. A training step frees and takes the
    same blocks again and again, and pays for zeroed pages each time: up to 100,000 page faults a step of GNMT.
    """
    if sys.platform != "linux":
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    return all(
        library.mallopt(option, value) == 1 for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1))
    )
