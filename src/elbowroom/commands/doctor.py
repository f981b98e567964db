"""``elbowroom doctor``: what this machine and this installation offer, and the baseline of memory claims."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Annotated

import typer

from elbowroom.commands.options import Json
from elbowroom.units import format_bytes

_THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")


def doctor(
    baseline: Annotated[
        bool, typer.Option("--baseline", help="Print only what a warm process without a model holds, in bytes.")
    ] = False,
    json: Json = False,
) -> None:
    """Show versions, kernels, cores and memory of this machine."""
    from elbowroom.commands.terminal import print_json

    if baseline:
        num_bytes = baseline_bytes()
        if json:
            print_json({"baseline_bytes": num_bytes})
        else:
            typer.echo(str(num_bytes))
        return
    facts = gather()
    if json:
        print_json(facts)
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        typer.echo(f"{name.removesuffix('_bytes').replace('_', ' '):{width}}  {_shown(name, value)}")


def baseline_bytes() -> int:
    """Return VmRSS of this process with everything imported and every kernel run once, and no model."""
    from elbowroom.serve.preload import preload

    preload()
    from elbowroom.engine.baseline import measure_baseline

    return measure_baseline().baseline_bytes


def gather() -> dict[str, object]:
    """Return what there is, by name."""
    import torch

    from elbowroom import __version__
    from elbowroom.kernels import backend_name
    from elbowroom.memory.meter import available_bytes
    from elbowroom.models.directory import BUILTIN

    return {
        "elbowroom": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "native_kernels": _native_isa() is not None,
        "isa": _native_isa(),
        "kernel_backend": backend_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cgroup_cpu_quota": _cpu_quota(),
        "cgroup_memory_limit_bytes": _memory_limit(),
        "available_memory_bytes": available_bytes(),
        "transparent_huge_pages": _huge_pages(),
        "builtin_model": (BUILTIN / "config.json").is_file(),
    }


def _shown(name: str, value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return format_bytes(value) if name.endswith("_bytes") and isinstance(value, int) else str(value)


def _native_isa() -> str | None:
    """Return the instruction set of the native kernels; None when they were not built."""
    try:
        from elbowroom import _native
    except ImportError:
        return None
    return _native.isa()


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _cpu_quota() -> float | None:
    """Return the cores that the cgroup allows; None without a limit."""
    quota, _, period = _read(_CPU_QUOTA).partition(" ")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None


def _memory_limit() -> int | None:
    limit = _read(_MEMORY_LIMIT)
    return int(limit) if limit.isdigit() else None


def _huge_pages() -> str | None:
    """Return the chosen one of always, madvise, never; None where the system does not say."""
    chosen = [word for word in _read(_THP).split() if word.startswith("[")]
    return chosen[0].strip("[]") if chosen else None
