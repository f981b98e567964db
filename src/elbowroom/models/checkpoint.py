"""A model's weights on disk: one safetensors file or several with an index, streamed into given memory.

Everything is checked against the config when the checkpoint is opened, before anything is allocated. Files are read
by pread, never mapped: mapped pages would count as resident memory of the process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from elbowroom.errors import CheckpointError
from elbowroom.models.config import ModelConfig
from elbowroom.models.fields import Fields, read_object
from elbowroom.models.reading import Piece, ReadTimes, cut, read_pieces
from elbowroom.models.safetensors_file import TensorEntry, read_header

SOURCE_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_OTHER_SUFFIXES = (".safetensors", ".bin", ".pt", ".gguf")
_PREFIXES = ("model.", "language_model.")
_VISION = ("vision_tower.", "multi_modal_projector.")


class Checkpoint:
    """The weights of one model directory, opened and checked; a context manager.

    Args:
        directory: holds ``model.safetensors``, or shards and ``model.safetensors.index.json``.
        config: says which tensors of which shapes must be there.

    Raises:
        CheckpointError: a file or tensor is missing, truncated, of another shape, of an unreadable dtype, or unknown.
    """

    def __init__(self, directory: Path, config: ModelConfig) -> None:
        found = _local_entries(_all_entries(directory))
        if config.tie_embeddings:
            found.pop("lm_head.weight", None)
        shapes = config.tensor_shapes()
        _check(directory, shapes, found)
        self.entries = {name: found[name] for name in shapes}
        self.total_bytes = sum(entry.num_bytes for entry in self.entries.values())
        self._files: dict[Path, int] = {}

    def read(self, destinations: Mapping[str, Tensor], progress: Callable[[int], None] | None = None) -> ReadTimes:
        """Read tensors into their final memory, converting the dtype; needs at most 2 MiB beside them.

        Args:
            destinations: by names of ``ModelConfig.tensor_shapes``, each of the tensor's shape; float32, bfloat16 or
                float16; any device.
            progress: called from this thread with the file bytes read so far, which only grow.

        Raises:
            CheckpointError: a file cannot be read or became shorter, or a destination has another shape.
        """
        for name, target in destinations.items():
            if tuple(target.shape) != self.entries[name].shape:
                expected = self.entries[name].shape
                raise CheckpointError(f"{name}: destination has the shape {tuple(target.shape)}, not {expected}")
        on_disk = sorted(destinations, key=lambda name: (self.entries[name].path, self.entries[name].offset))
        self._open({self.entries[name].path for name in on_disk})
        return read_pieces(self._pieces(on_disk, destinations), self._files, progress)

    def close(self) -> None:
        """Close the files."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _pieces(self, names: Iterable[str], destinations: Mapping[str, Tensor]) -> Iterator[Piece]:
        for name in names:
            entry = self.entries[name]
            yield from cut(entry.path, entry.offset, SOURCE_DTYPES[entry.dtype], destinations[name])

    def _open(self, paths: Iterable[Path]) -> None:
        for path in paths:
            if path in self._files:
                continue
            try:
                self._files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as reason:
                raise CheckpointError(f"{path} cannot be read: {reason.strerror}", "check the disk") from reason
            if hasattr(os, "posix_fadvise"):  # threads that take turns do not look sequential by themselves
                os.posix_fadvise(self._files[path], 0, 0, os.POSIX_FADV_SEQUENTIAL)


def _all_entries(directory: Path) -> dict[str, TensorEntry]:
    if (directory / _SINGLE).exists():
        return read_header(directory / _SINGLE)
    if (directory / _INDEX).exists():
        return _sharded_entries(directory)
    others = sorted(path.name for path in directory.glob("*") if path.suffix in _OTHER_SUFFIXES)
    found = f"found {_few(others)}" if others else "found no weight file"
    raise CheckpointError(
        f"{directory} holds neither {_SINGLE} nor {_INDEX}; {found}", "save the model as safetensors (save_pretrained)"
    )


def _sharded_entries(directory: Path) -> dict[str, TensorEntry]:
    path = directory / _INDEX
    fields = Fields(read_object(path, CheckpointError), str(path), error=CheckpointError)
    shard_of = fields.section("weight_map").values
    shards = sorted({str(shard) for shard in shard_of.values()})
    if not all(Path(shard).name == shard for shard in shards):
        raise fields.wrong("weight_map", "names of files in the same directory")
    missing = [shard for shard in shards if not (directory / shard).exists()]
    if missing:
        raise CheckpointError(
            f"{directory} lacks {len(missing)} of {len(shards)} shards: {_few(missing)}", "download them"
        )
    headers = {shard: read_header(directory / shard) for shard in shards}
    absent = [name for name, shard in shard_of.items() if name not in headers[str(shard)]]
    if absent:
        raise CheckpointError(
            f"{path} names tensors that their shards lack: {_few(absent)}", "download the shards again"
        )
    return {name: headers[str(shard)][name] for name, shard in shard_of.items()}


def _local_entries(entries: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
    """Return the entries by the decoder's names, without those that no decoder needs."""
    found: dict[str, TensorEntry] = {}
    for full_name, entry in entries.items():
        name = full_name
        while name.startswith(_PREFIXES):
            name = name.partition(".")[2]
        if name.startswith(_VISION) or name.endswith("rotary_emb.inv_freq"):
            continue
        if name in found:
            raise CheckpointError(f"{entry.path}: {full_name!r} is there twice under different prefixes", "remove one")
        found[name] = entry
    return found


def _check(directory: Path, shapes: dict[str, tuple[int, ...]], found: dict[str, TensorEntry]) -> None:
    missing = [name for name in shapes if name not in found]
    if missing:
        hint = "tie_word_embeddings in config.json may be wrong" if missing == ["lm_head.weight"] else None
        raise CheckpointError(
            f"{directory} lacks {len(missing)} of {len(shapes)} tensors: {_few(missing)}",
            hint or "download the weights again, or correct config.json",
        )
    unknown = [name for name in found if name not in shapes]
    if unknown:
        raise CheckpointError(
            f"{directory} holds {len(unknown)} tensors that config.json does not account for: {_few(unknown)}",
            "check the architecture and the bias switches in config.json",
        )
    wrong = [f"{name} {found[name].shape} for {shape}" for name, shape in shapes.items() if found[name].shape != shape]
    if wrong:
        raise CheckpointError(
            f"{directory}: wrong shapes (found for expected): {_few(wrong)}", "config.json does not fit"
        )
    unread = [f"{name} ({found[name].dtype})" for name in shapes if found[name].dtype not in SOURCE_DTYPES]
    if unread:
        raise CheckpointError(
            f"{directory}: dtypes that are not read: {_few(unread)}", f"convert to one of: {', '.join(SOURCE_DTYPES)}"
        )


def _few(names: Iterable[str], count: int = 4) -> str:
    """Return the first ``count`` names and how many more there are."""
    names = list(names)
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
