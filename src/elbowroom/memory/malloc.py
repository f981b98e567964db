"""Makes the C library give freed memory back, so that RSS follows what is in use."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
_THRESHOLD_BYTES = 256 * 1024


def limit_malloc_caching() -> bool:
    """Fix glibc's thresholds (they grow by themselves otherwise, and large frees stay in RSS); False elsewhere."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    mallopt(_M_MMAP_THRESHOLD, _THRESHOLD_BYTES)
    mallopt(_M_TRIM_THRESHOLD, 2 * _THRESHOLD_BYTES)
    mallopt(_M_ARENA_MAX, 2)
    return True


def trim_malloc() -> None:
    """Return free heap pages to the operating system now."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return
