"""Memory on the CPU: keep what a step has freed for the next one."""

import ctypes
import sys

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Tell glibc to serve large tensors from memory that the process keeps, not from fresh pages each time.

    By default large blocks are mapped and unmapped each time, and the kernel clears every page again. Measured on the
    demo's autoencoder (2-core virtual machine, one thread): a step is 1.1 to 1.3 times faster, and more on a busy
    machine. Without glibc it does nothing.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
