"""From a model directory to its weights, in memory that the caller provides, and to a Decoder."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from elbowroom.core import DTYPE_BYTES
from elbowroom.errors import ConfigError
from elbowroom.models.checkpoint import Checkpoint
from elbowroom.models.config import ModelConfig
from elbowroom.models.decoder import Decoder
from elbowroom.models.hf_config import read_config
from elbowroom.weights.resident import ResidentWeights

Allocate = Callable[[str, tuple[int, ...], torch.dtype], Tensor]
"""Returns the memory of one weight, given its name, shape and dtype."""
Progress = Callable[[int, int], None]
"""Called with the bytes read so far and in total."""

_INIT_STD = 0.02
_FILL_ELEMENTS = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """How the seconds of loading weights split; the parts add up to the total, less the making of threads."""

    file_bytes: int
    """Bytes read from the files."""
    memory_bytes: int
    """Bytes of the weights in memory."""
    num_threads: int
    total_s: float
    open_s: float
    """Reading and checking the headers of all files."""
    read_s: float
    """Reading from page cache or disk into memory, page faults included; of several threads the mean."""
    convert_s: float
    """Converting to another dtype; of several threads the mean."""


def torch_allocate(_name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return memory from torch's own allocator, charged to nobody: for tests and training."""
    return torch.empty(shape, dtype=dtype)


def weights_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Return the bytes of all weights of ``config`` in ``dtype`` (tied ones once, without alignment)."""
    return config.num_parameters() * dtype.itemsize


def read_weights(
    directory: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    allocate: Allocate = torch_allocate,
    progress: Progress | None = None,
) -> tuple[dict[str, Tensor], LoadReport]:
    """Return every weight of a model directory, in memory that the caller provides, and how long that took.

    Args:
        directory: holds the safetensors files.
        config: of the model.
        dtype: float32, bfloat16 or float16: of the weights in memory, whatever the file has.
        allocate: called once for each weight in the decoder's order, after all files have been checked.
        progress: called from this thread with the file bytes read and their total, which only grow.

    Raises:
        ModelError: ConfigError or CheckpointError; nothing was allocated unless a disk failed.
    """
    _check_dtype(dtype)
    begin = time.perf_counter()
    with Checkpoint(directory, config) as checkpoint:
        opened = time.perf_counter()
        tensors = {name: allocate(name, shape, dtype) for name, shape in config.tensor_shapes().items()}
        total = checkpoint.total_bytes
        times = checkpoint.read(tensors, None if progress is None else lambda done: progress(done, total))
    report = LoadReport(
        file_bytes=total,
        memory_bytes=sum(tensor.nbytes for tensor in tensors.values()),
        num_threads=times.num_threads,
        total_s=time.perf_counter() - begin,
        open_s=opened - begin,
        read_s=times.read_s,
        convert_s=times.convert_s,
    )
    return tensors, report


def load_model(
    directory: Path, dtype: torch.dtype, allocate: Allocate = torch_allocate, progress: Progress | None = None
) -> Decoder:
    """Return the decoder of a model directory (Hugging Face layout); arguments and errors as in ``read_weights``.

    Raises:
        ModelError: UnknownArchitecture, ConfigError or CheckpointError.
    """
    config = read_config(directory)
    tensors, _ = read_weights(directory, config, dtype, allocate, progress)
    return Decoder(config, ResidentWeights(tensors, config.activation))


def dummy_weights(
    config: ModelConfig, dtype: torch.dtype, allocate: Allocate = torch_allocate, seed: int = 0
) -> ResidentWeights:
    """Return random weights for benchmarks that need no files: N(0, 0.02), biases 0, norms neutral, as transformers.

    Args:
        config: which weights.
        dtype: float32, bfloat16 or float16.
        allocate: called once for each weight.
        seed: equal seeds give equal weights.
    """
    _check_dtype(dtype)
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, shape in config.tensor_shapes().items():
        tensor = tensors[name] = allocate(name, shape, dtype)
        if name.endswith("norm.weight"):
            tensor.fill_(1.0 - config.norm_offset)
        elif name.endswith(".bias"):
            tensor.zero_()
        else:
            _fill_normal(tensor, generator)
    return ResidentWeights(tensors, config.activation)


def _fill_normal(tensor: Tensor, generator: torch.Generator) -> None:
    step = max(1, _FILL_ELEMENTS // tensor[0].numel())  # in pieces: half precision is drawn in float32 first
    for begin in range(0, tensor.shape[0], step):
        rows = tensor[begin : begin + step]
        rows.copy_(torch.empty(rows.shape).normal_(0.0, _INIT_STD, generator=generator))


def _check_dtype(dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPE_BYTES:
        raise ConfigError(f"weights cannot be held as {name}", f"choose one of: {', '.join(DTYPE_BYTES)}")
