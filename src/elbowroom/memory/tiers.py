"""Memory tiers: host memory by anonymous mapping, and memory of a torch device."""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor

_MAP_NORESERVE = 0x4000  # Linux; Python 3.11's mmap module has no name for it
_NO_HUGE_PAGES = getattr(mmap, "MADV_NOHUGEPAGE", None)


class HostMapping:
    """Anonymous private address space: a page is resident from first touch until it is given back."""

    def __init__(self, virtual_bytes: int, flags: int = _MAP_NORESERVE) -> None:
        self._map = mmap.mmap(-1, virtual_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | flags)
        if _NO_HUGE_PAGES is not None:
            # A huge page would make 2 MiB resident for one touched token, and the ledger would be wrong. For weights,
            # which fill their range, docs/memory.md says what huge pages would gain and cost.
            with contextlib.suppress(OSError):  # a kernel that has none refuses the advice
                self._map.madvise(_NO_HUGE_PAGES)
        self.base: Tensor = torch.frombuffer(self._map, dtype=torch.uint8)

    def decommit(self, start_byte: int, stop_byte: int) -> None:
        """Give pages back at once (MADV_DONTNEED; MADV_FREE would leave them in RSS until pressure)."""
        self._map.madvise(mmap.MADV_DONTNEED, start_byte, stop_byte - start_byte)

    def close(self) -> None:
        """Give all pages back; the address space itself goes with the last tensor that views it."""
        self._map.madvise(mmap.MADV_DONTNEED)


class HostTier:
    """Host memory (RAM)."""

    name = "host"
    page_bytes = mmap.PAGESIZE
    elastic = True

    def allocate(self, virtual_bytes: int) -> HostMapping:
        """Return address space; nothing is resident yet."""
        return HostMapping(virtual_bytes)


class StaticHostTier(HostTier):
    """Host memory that is resident from the start and never given back page by page: a static reservation."""

    elastic = False

    def allocate(self, virtual_bytes: int) -> HostMapping:
        """Return address space whose pages are all resident."""
        mapping = HostMapping(virtual_bytes, 0)
        mapping.base.zero_()
        return mapping


class TorchMapping:
    """One torch tensor; its bytes are held from allocation to ``close``."""

    def __init__(self, virtual_bytes: int, device: torch.device) -> None:
        self.base: Tensor = torch.empty(virtual_bytes, dtype=torch.uint8, device=device)

    def decommit(self, start_byte: int, stop_byte: int) -> None:
        """Do nothing: a torch allocation cannot shrink."""

    def close(self) -> None:
        """Free the tensor."""
        self.base = torch.empty(0, dtype=torch.uint8, device=self.base.device)


class DeviceTier:
    """Memory of a torch device, taken as whole tensors: static, because torch cannot give back part of one."""

    name = "device"
    page_bytes = 64 * 1024
    elastic = False

    def __init__(self, device: str | torch.device) -> None:
        self.device = torch.device(device)

    def allocate(self, virtual_bytes: int) -> TorchMapping:
        """Return a tensor of ``virtual_bytes``, resident at once."""
        return TorchMapping(virtual_bytes, self.device)
