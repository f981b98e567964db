"""Bytes of bookkeeping: what numpy arrays hold that an object refers to, directly or through others."""

from __future__ import annotations

import gc
import types

import numpy as np
import torch

_OPAQUE = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType, torch.Tensor)


def array_bytes(root: object) -> int:
    """Return the bytes of all numpy arrays that ``root`` reaches, each counted once and in full.

    Arrays that the system has not made resident yet count too. Tensors do not: their bytes are charged elsewhere.
    """
    seen: set[int] = set()
    waiting, total = [root], 0
    while waiting:
        item = waiting.pop()
        while isinstance(item, np.ndarray) and item.base is not None:
            item = item.base
        if id(item) in seen or isinstance(item, _OPAQUE):
            continue
        seen.add(id(item))
        if isinstance(item, np.ndarray):
            total += item.nbytes
        else:
            waiting += gc.get_referents(item)
    return total
