"""kv-matrix: KV plans against each other at equal bytes; one claim a module, joined by ``joined``."""

from elbowroom.bench.kv_matrix.joined import run

__all__ = ["run"]
