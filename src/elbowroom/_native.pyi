"""Native kernels of Elbowroom (native/module.cpp); addresses are ``data_ptr()``, strides count elements.

dtype codes: 0 float32, 1 bfloat16, 2 float16.
"""

from collections.abc import Sequence
from typing import TypeAlias

Step: TypeAlias = tuple[int, int, int, int]
"""Addresses of row_starts, positions, lengths, first_slots."""
RowFormat: TypeAlias = tuple[int, int, int]
"""How heads become bytes: kind (0 plain, 1 int8, 2 fp8, 3 bfp, 4 kivi, 5 planes), bits of a code, codes of a scale."""
Strips: TypeAlias = tuple[
    int, int, int, int, int, int, int, int, int, RowFormat, RowFormat, int, int, int, int, int, bool
]
"""Addresses of table and first blocks (0: none), num_blocks, base, num_bytes, dtype, num_kv_heads, both head widths;
formats of keys and values; bytes of a digest; address of the order of channels, int16 ``[Hkv, Dk]`` (0: none); where in
a strip its channels, its counts and its KV heads lie (0: none); whether a plain strip lies token by token."""
Tail: TypeAlias = tuple[Strips, int, int, int, int, int]
"""Strips that take new tokens; address of the first open blocks (0: none); number of full strips, addresses of their
places there and where they are sealed; address of the places of KV heads, int8 ``[R, Hkv]`` (0: all there)."""
Selection: TypeAlias = tuple[int, int, float, float, int]
"""Blocks that a row reads (0: all, plane by plane), address of a byte for each sequence: whether its row does; tau and
eps, address of what is counted (0: nothing)."""
Spec: TypeAlias = tuple[int, int, float, float]
"""num_q_heads, window (0: none), scale, softcap (0: none)."""
Rows: TypeAlias = tuple[int, int, int, int]
"""Address, dtype, stride of a row, stride of a head."""
Matrix: TypeAlias = tuple[int, int, int, int, int, int]
"""Address, rows, columns, bytes of a row, dtype, address of the float32 bias (0: none)."""
Vector: TypeAlias = tuple[int, int]
"""Address and length of a float32 vector; copied."""
LayerStep: TypeAlias = tuple[int, Step, Strips, Tail | None, Selection | None, bool, bool]
"""num_sequences, the step, a layer's strips, whether those that several sequences hold are read for all of them at
once, whether the layer writes keys and values of its own."""

def multiply(matrix: Matrix, x: int, num_tokens: int, y: int) -> None:
    """Write ``x [num_tokens, columns] @ matrix.T + bias``, float32, to ``y [num_tokens, rows]``."""

class Decoder:
    """A decoder over weights that stay where they are; one pass at a time. ``models/native.py`` is its only caller."""

    def __init__(
        self,
        embed: Matrix,
        head: Matrix,
        final_norm: Vector,
        embed_scale: float,
        eps: float,
        final_softcap: float,
        activation: int,
        ropes: list[tuple[Vector, float]],
    ) -> None: ...
    def add_layer(
        self, matrices: list[Matrix], norms: list[Vector], spec: Spec, heads: tuple[int, int, int, int]
    ) -> None:
        """Add a layer: q, k, v, o, gate, up, down; norms of input, FFN, both outputs, queries, keys (length 0: none).

        ``heads``: num_kv_heads, head_dim, v_head_dim, index of the rope (-1: none).
        """

    def begin(self, tokens: int, positions: int, num_tokens: int, buffers: list[int]) -> None:
        """Start a pass over int64 tokens and positions; ValueError for a token outside the vocabulary."""

    def layers(self, first: int, steps: list[LayerStep]) -> None:
        """Run consecutive layers from ``first`` on; ValueError when a strip lies outside its range."""

    def project(self, layer: int) -> None:
        """Compute queries, keys and values of a layer."""

    def finish(self, layer: int) -> None:
        """Take attention's output through the rest of a layer."""

    def logits(self, rows: int, count: int, out: int) -> None:
        """Write the float32 logits ``[count, vocabulary]`` of int64 rows of the pass; ValueError for one outside it."""

def append(num_sequences: int, step: Step, strips: Strips, tail: Tail | None, k: Rows, v: Rows) -> None:
    """Write key and value rows to their strips and seal full ones; ValueError when a strip lies outside ``base``."""

def attend(
    num_sequences: int,
    step: Step,
    strips: Strips,
    tail: Tail | None,
    selection: Selection | None,
    shares: bool,
    spec: Spec,
    q: Rows,
    out: Rows,
    lse: int,
) -> None:
    """Write attention to ``out`` and log-sum-exps to ``lse``; ValueError when a strip lies outside ``base``."""

def sample(logits: int, row_stride: int, vocab_size: int, draws: bytes, positions: Sequence[int]) -> list[int]:
    """Return one token for each float32 row; -1 where its greatest logit is not finite.

    ValueError when ``draws`` does not hold one record (struct Draw of native/sampling.h) for each position.
    """

def uniform(seed: int, sample: int, position: int) -> float:
    """Return the random number of three keys below 2^64."""

def isa() -> str:
    """Return the instruction set in use: ``baseline``, ``avx2``, ``avx512``, or ``emulated512`` in tests."""

def set_isa(name: str) -> None:
    """Use another instruction set from now on; ValueError when it cannot run here."""

def supported_isas() -> list[str]:
    """Return the names of the instruction sets that can run here, the best last."""

def num_threads() -> int:
    """Return the threads of the pool: min(CPU affinity, cgroup quota, ``ELBOWROOM_THREADS``)."""

def read_gb_per_s(num_bytes: int, repeats: int) -> float:
    """Return the read bandwidth of all threads over a buffer of ``num_bytes``, the best of ``repeats`` passes.

    The buffer is resident during the call; far larger than the caches, it measures memory.

    Raises:
        ValueError: an argument is below 1.
        MemoryError: the buffer cannot be mapped.
    """

def fma_gflop_per_s(milliseconds: int) -> float:
    """Return the float32 multiply-add rate of all threads in ``isa()``, the best within about ``milliseconds``.

    Raises:
        ValueError: ``milliseconds`` is below 1.
    """
