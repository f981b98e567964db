"""From a model directory to a Decoder, with every weight in memory that the caller provides."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from elbowroom.core import DTYPE_BYTES
from elbowroom.errors import ConfigError, ModelError
from elbowroom.models.checkpoint import Checkpoint
from elbowroom.models.config import ModelConfig
from elbowroom.models.decoder import Decoder
from elbowroom.models.hf_config import read_config
from elbowroom.weights.resident import ResidentWeights

Allocate = Callable[[str, tuple[int, ...], torch.dtype], Tensor]
"""Returns the memory of one weight, given its name, shape and dtype."""
Progress = Callable[[int, int], None]
"""Called with the bytes read so far and in total."""

BUILTIN = Path(__file__).parent / "builtin"
_INIT_STD = 0.02
_FILL_ELEMENTS = 2**20


def torch_allocate(_name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return memory from torch's own allocator, charged to nobody: for tests and training."""
    return torch.empty(shape, dtype=dtype)


def find_model(model: str | None) -> Path:
    """Return the directory of ``model``; None is the model that comes with Elbowroom.

    Raises:
        ModelError: there is no such directory.
        ConfigError: the directory has no config.json.
    """
    directory = BUILTIN if model is None else Path(model).expanduser()
    if not directory.is_dir():
        if model is None:
            raise ModelError(f"the built-in model is not installed ({directory})", "name a model directory")
        found = "a file" if directory.exists() else "nothing"
        raise ModelError(
            f"model {model!r}: expected a directory, found {found} at {directory.absolute()}",
            "give a directory with config.json and safetensors files; models are never downloaded",
        )
    if not (directory / "config.json").is_file():
        raise ConfigError(f"{directory} has no config.json", "give the directory that holds config.json")
    return directory


def weights_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Return the bytes of all weights of ``config`` in ``dtype`` (tied ones once, without alignment)."""
    return config.num_parameters() * dtype.itemsize


def load_model(
    directory: Path, dtype: torch.dtype, allocate: Allocate = torch_allocate, progress: Progress | None = None
) -> Decoder:
    """Return the decoder of a model directory; at most 16 MiB are needed beside the weights.

    Args:
        directory: Hugging Face layout: config.json and safetensors.
        dtype: float32, bfloat16 or float16: of the weights in memory, whatever the file has.
        allocate: called once for each weight in loading order, after all files have been checked.
        progress: called after each chunk with the file bytes read and their total.

    Raises:
        ModelError: UnknownArchitecture, ConfigError or CheckpointError; nothing was allocated unless a disk failed.
    """
    config = read_config(directory)
    _check_dtype(dtype)
    tensors: dict[str, Tensor] = {}
    done = 0
    with Checkpoint(directory, config) as checkpoint:

        def advance(num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            if progress is not None:
                progress(done, checkpoint.total_bytes)

        for name, shape in config.tensor_shapes().items():
            tensors[name] = allocate(name, shape, dtype)
            checkpoint.read_into(name, tensors[name], advance)
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
