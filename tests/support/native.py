"""Native code in tests: its instruction sets, and C++ programs of ``native/`` and a ``main``."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ISAS = ("baseline", "avx2", "avx512", "emulated512")
"""Instruction sets of ``elbowroom._native``."""


@contextlib.contextmanager
def instructions(isa: str) -> Iterator[None]:
    """Compute natively with ``isa``; skips where the CPU or the build has none."""
    if importlib.util.find_spec("elbowroom._native") is None:
        pytest.skip("elbowroom._native was not built (ELBOWROOM_NATIVE=0)")
    module = importlib.import_module("elbowroom._native")
    if isa not in module.supported_isas():
        pytest.skip(f"this CPU or build has no {isa}; it has {', '.join(module.supported_isas())}")
    before = module.isa()
    module.set_isa(isa)
    try:
        yield
    finally:
        module.set_isa(before)


def supported_isas() -> list[str]:
    """Return the instruction sets of native code that run here."""
    supported = importlib.import_module("elbowroom._native").supported_isas()
    return [isa for isa in ISAS if isa in supported]


def build_program(main: str, sources: list[str], directory: Path, sanitize: str = "") -> Path:
    """Compile ``tests/native/MAIN.cpp`` with ``native/*.cpp``; skips where the compiler cannot do what is asked.

    Args:
        main: name of the file with the main function.
        sources: names of files in ``native/``.
        directory: where the program is put.
        sanitize: what ``-fsanitize`` gets; empty for none.
    """
    flags = ["-std=c++20", "-O1", "-g", "-pthread"]
    if sanitize:
        flags += [f"-fsanitize={sanitize}", "-fno-sanitize-recover=all"]
    trial = directory / "trial.cpp"
    trial.write_text("int main() {}\n")
    skip_unless_it_runs(trial, flags)
    files = [ROOT / "tests" / "native" / f"{main}.cpp", *(ROOT / "native" / f"{name}.cpp" for name in sources)]
    program = directory / main
    subprocess.run([*compiler(), *flags, f"-I{ROOT / 'native'}", *map(str, files), "-o", str(program)], check=True)
    return program


def skip_unless_it_runs(source: Path, flags: list[str]) -> None:
    """Skip the test when an empty program with these flags cannot be built and run."""
    program = source.with_suffix("")
    command = [*compiler(), *flags, str(source), "-o", str(program)]
    built = subprocess.run(command, check=False, capture_output=True, text=True)
    if built.returncode != 0:
        pytest.skip(f"the compiler refuses {' '.join(flags)}: {built.stderr.strip()}")
    if subprocess.run([str(program)], check=False, capture_output=True).returncode != 0:
        pytest.skip(f"an empty program built with {' '.join(flags)} does not run here")


def compiler() -> list[str]:
    """Return the command of the C++ compiler, ``CXX`` or c++; skips without one."""
    command = os.environ.get("CXX", "c++").split()
    if shutil.which(command[0]) is None:
        pytest.skip(f"no C++ compiler: {command[0]} was not found (set CXX)")
    return command
