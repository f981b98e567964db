"""Every command and every Python block of the README runs, in order, against the built-in model."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from elbowroom.models.directory import BUILTIN

ROOT = Path(__file__).parents[2]
_FENCE = re.compile(r"^```(sh|python)\n(.*?)^```", re.DOTALL | re.MULTILINE)
BLOCKS = _FENCE.findall((ROOT / "README.md").read_text())
SHELL = [body for kind, body in BLOCKS if kind == "sh"]
PYTHON = [body for kind, body in BLOCKS if kind == "python"]
SERVED = "127.0.0.1:8000"

pytestmark = pytest.mark.skipif(not (BUILTIN / "config.json").is_file(), reason="the built-in model is not there")


def starts_server(block: str) -> bool:
    return block.startswith("elbowroom serve")


def installs(block: str) -> bool:
    return block.startswith(("make", "pip"))


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An ``elbowroom`` in PATH that is the source under test."""
    folder = tmp_path_factory.mktemp("bin")
    script = folder / "elbowroom"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m elbowroom.commands "$@"\n')
    script.chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT / "src")}


@pytest.fixture(scope="module")
def server(environment: dict[str, str]) -> Iterator[str]:
    """The README's server on a free port; yields host:port."""
    (command,) = [block for block in SHELL if starts_server(block)]
    command = command.strip().replace("--port 8000", "--port 0")
    process = subprocess.Popen(
        f"exec {command}", shell=True, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        greeting = process.stdout.readline()
        found = re.search(r"http://([\d.]+:\d+)", greeting)
        assert found is not None, greeting
        yield found[1]
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 0


def run(arguments: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(
        arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("block", [block for block in SHELL if SERVED not in block and not starts_server(block)])
def test_shell_blocks_run(block: str, environment: dict[str, str]):
    if installs(block):
        targets = re.findall(r"make (\w+)", block)
        makefile = (ROOT / "Makefile").read_text()
        assert all(f"\n{target}:" in makefile for target in targets)
        return
    assert run(["bash", "-euo", "pipefail", "-c", block], environment).strip()


@pytest.mark.parametrize("block", [block for block in SHELL if SERVED in block])
def test_shell_blocks_that_ask_the_server_run(block: str, environment: dict[str, str], server: str):
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    block = block.replace(SERVED, server).replace("curl ", "curl --fail-with-body --silent --show-error ")
    assert '"choices"' in run(["bash", "-euo", "pipefail", "-c", block], environment)


@pytest.mark.parametrize("block", PYTHON)
def test_python_blocks_run(block: str, environment: dict[str, str], request: pytest.FixtureRequest):
    if SERVED in block:
        pytest.importorskip("openai")
        block = block.replace(SERVED, request.getfixturevalue("server"))
    assert run([sys.executable, "-c", block], environment).strip()


def test_the_readme_has_every_kind_of_block():
    assert any(starts_server(block) for block in SHELL)
    assert any("curl" in block for block in SHELL)
    assert any(block.startswith("elbowroom run") for block in SHELL)
    assert any("openai" in block for block in PYTHON)
    assert any("from elbowroom import LLM" in block for block in PYTHON)
