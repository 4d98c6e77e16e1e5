"""Settings of the C library's allocator for processes that train."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""glibc's numbers of the parameters that `mallopt` sets."""
FOR_ALL_THREADS = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**62)}
"""Environment variables with the same effect in all threads of a process that starts with them."""


def keep_freed_memory() -> None:
    """Let this process keep freed memory for its next step.

    A step on the CPU allocates and frees hundreds of megabytes. By default glibc gives large blocks back to the kernel,
    which zeroes and maps them again in the next step. That is a tenth of the time of a step of MobileNetV2. Only the
    main thread gains, because the heaps of other threads hold only blocks below 64 MB whatever the settings. The
    function does nothing where the C library is not glibc.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)
