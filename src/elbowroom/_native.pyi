"""Native kernels of Elbowroom (native/module.cpp); addresses are ``data_ptr()``, strides count elements.

dtype codes: 0 float32, 1 bfloat16, 2 float16.
"""

from collections.abc import Sequence
from typing import TypeAlias

_Step: TypeAlias = tuple[int, int, int, int]
"""Addresses of row_starts, positions, lengths, first_slots."""
_Strips: TypeAlias = tuple[int, int, int, int, int, int, int, int]
"""Address of the table, num_blocks, address of base, num_bytes, dtype, num_kv_heads, head_dim, v_head_dim."""
_Spec: TypeAlias = tuple[int, int, float, float]
"""num_q_heads, window (0: none), scale, softcap (0: none)."""
_Rows: TypeAlias = tuple[int, int, int, int]
"""Address, dtype, stride of a row, stride of a head."""

def append(num_sequences: int, step: _Step, strips: _Strips, k: _Rows, v: _Rows) -> None:
    """Write key and value rows to their strips; ValueError when a strip lies outside ``base``."""

def attend(num_sequences: int, step: _Step, strips: _Strips, spec: _Spec, q: _Rows, out: _Rows, lse: int) -> None:
    """Write attention to ``out`` and log-sum-exps to ``lse``; ValueError when a strip lies outside ``base``."""

def sample(logits: int, row_stride: int, vocab_size: int, draws: bytes, positions: Sequence[int]) -> list[int]:
    """Return one token for each float32 row; -1 where its greatest logit is not finite.

    ValueError when ``draws`` does not hold one record (struct Draw of native/sampling.h) for each position.
    """

def uniform(seed: int, sample: int, position: int) -> float:
    """Return the random number of three keys below 2^64."""

def isa() -> str:
    """Return the instruction set in use: ``baseline``, ``avx2`` or ``avx512``."""

def set_isa(name: str) -> None:
    """Use another instruction set from now on; ValueError when it cannot run here."""

def supported_isas() -> list[str]:
    """Return the names of the instruction sets that can run here, the slowest first."""

def num_threads() -> int:
    """Return the threads of the pool: min(CPU affinity, cgroup quota, ``ELBOWROOM_THREADS``)."""
