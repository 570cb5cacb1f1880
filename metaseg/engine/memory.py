"""The C library's allocator, set for tensors."""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next tensor; elsewhere, nothing.

    By default it gives large pieces back to the system, which hands them out again page by page, zeroed: at 224² every
    step takes some 100,000 page faults. The process then stays as large as it once was.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
