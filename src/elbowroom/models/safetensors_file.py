"""The header of a safetensors file: parsed and checked by ourselves, before anything large is allocated.

Layout: 8 bytes little-endian header length, a JSON object (name -> dtype, shape, data_offsets), then the data, which
the tensors cover without gap or overlap.
"""

from __future__ import annotations

import math
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from elbowroom.errors import CheckpointError
from elbowroom.models.fields import parse_object

ELEMENT_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
"""Bytes of one element of each dtype of the format."""
_MAX_HEADER_BYTES = 32 * 2**20
_MAX_DIMS = 16
_HINT = "download the file again (a git-lfs pointer is not the file)"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """Where one tensor lies on disk."""

    path: Path
    dtype: str
    """Name as in the header, e.g. ``BF16``."""
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the file."""
    num_bytes: int


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Return every tensor of the safetensors file at ``path`` by name.

    Raises:
        CheckpointError: the file is missing, truncated, not safetensors, or its header contradicts itself.
    """
    try:
        size = _file_bytes(path)
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise CheckpointError(f"{path} has {size} bytes, its header alone needs {length + 8}", _HINT)
            if length > _MAX_HEADER_BYTES:
                raise CheckpointError(f"{path}: a header of {length} bytes exceeds {_MAX_HEADER_BYTES}", _HINT)
            header = parse_object(file.read(length), f"{path}: header", CheckpointError)
    except OSError as reason:
        raise CheckpointError(f"{path} cannot be read: {reason.strerror}", _HINT) from reason
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, value, length + 8) for name, value in header.items()}
    _check_cover(path, entries, length + 8, size)
    return entries


def _file_bytes(path: Path) -> int:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path} is not a regular file", "give a directory with safetensors files")
    return status.st_size


def _entry(path: Path, name: str, value: object, data_start: int) -> TensorEntry:
    def broken(what: str) -> CheckpointError:
        return CheckpointError(f"{path}: tensor {name!r} {what}", _HINT)

    if not isinstance(value, dict):
        raise broken("has no dtype, shape and data_offsets")
    dtype: object = value.get("dtype")
    shape: object = value.get("shape")
    offsets: object = value.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in ELEMENT_BYTES:
        raise broken(f"has the unknown dtype {dtype!r}")
    if not _is_naturals(shape) or len(shape) > _MAX_DIMS:
        raise broken(f"has the shape {str(shape)[:80]}")
    if not _is_naturals(offsets) or len(offsets) != 2:
        raise broken(f"has the data_offsets {str(offsets)[:80]}")
    begin, end = offsets
    num_bytes = math.prod(shape) * ELEMENT_BYTES[dtype]
    if end - begin != num_bytes:
        raise broken(f"of shape {shape} and dtype {dtype} needs {num_bytes} bytes, data_offsets give {end - begin}")
    return TensorEntry(path=path, dtype=dtype, shape=tuple(shape), offset=data_start + begin, num_bytes=num_bytes)


def _is_naturals(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_cover(path: Path, entries: dict[str, TensorEntry], data_start: int, size: int) -> None:
    position = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].num_bytes)):
        if entry.offset != position:
            kind = "overlaps the tensor before it" if entry.offset < position else "leaves a gap before it"
            raise CheckpointError(f"{path}: tensor {name!r} {kind}", _HINT)
        position += entry.num_bytes
    if position != size:
        kind = "is truncated" if position > size else "has bytes behind its last tensor"
        raise CheckpointError(f"{path} {kind}: {size} bytes found, {position} expected", _HINT)
