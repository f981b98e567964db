"""Several threads read what one would read, each byte once; the first error or Ctrl-C ends them all."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from elbowroom.errors import CheckpointError
from elbowroom.models import reading
from elbowroom.models.reading import Piece, ReadTimes, cut, read_pieces

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NUM_ELEMENTS = 5000


def write_numbers(path: Path, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Write random numbers to ``path`` and return them."""
    numbers = torch.randn(NUM_ELEMENTS, generator=torch.Generator().manual_seed(seed)).to(dtype)
    path.write_bytes(numbers.view(torch.uint8).numpy().tobytes())
    return numbers


def read_all(pieces: Sequence[Piece], num_threads: int, done: list[int] | None = None) -> ReadTimes:
    files = {path: os.open(path, os.O_RDONLY) for path in {piece.path for piece in pieces}}
    try:
        return read_pieces(pieces, files, None if done is None else done.append, num_threads)
    finally:
        for file in files.values():
            os.close(file)


def readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("elbowroom-reader")]


SHAPES = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 37)), min_size=1, max_size=6)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=SHAPES,
    source=st.sampled_from(DTYPES),
    target=st.sampled_from(DTYPES),
    piece_bytes=st.sampled_from([4, 52, 1000, 2**19]),
    num_threads=st.integers(1, 4),
    strided=st.booleans(),
)
def test_threads_read_what_one_thread_reads(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shapes: list[tuple[int, int]],
    source: torch.dtype,
    target: torch.dtype,
    piece_bytes: int,
    num_threads: int,
    strided: bool,
) -> None:
    """Whatever the shapes, files, dtypes, pieces and threads: the bytes are those of the file, converted by torch."""
    monkeypatch.setattr(reading, "PIECE_BYTES", piece_bytes)
    numbers = [write_numbers(tmp_path / str(seed), source, seed) for seed in range(2)]
    pieces: list[Piece] = []
    expected: list[tuple[Tensor, Tensor]] = []
    offset = 0
    for index, (rows, columns) in enumerate(shapes):
        file = index % 2
        space = torch.full((rows, columns + 3), 7.0, dtype=target)
        found = space[:, :columns] if strided else torch.full((rows, columns), 7.0, dtype=target)
        wanted = numbers[file].roll(-offset)[: rows * columns].view(rows, columns)
        if offset + rows * columns > NUM_ELEMENTS:
            break
        pieces += cut(tmp_path / str(file), offset * source.itemsize, source, found)
        expected.append((found, wanted.to(target)))
        assert (space[:, columns:] == 7).all()
        offset += rows * columns // 2
    done: list[int] = []
    read_all(pieces, num_threads, done)
    assert all(torch.equal(found, wanted) for found, wanted in expected)
    total = sum(piece.num_bytes for piece in pieces)
    assert done == sorted(set(done))
    assert (done or [0])[-1] == total == sum(wanted.numel() for _, wanted in expected) * source.itemsize


@pytest.mark.parametrize("target", [torch.float32, torch.float16])
def test_a_long_tensor_is_shared_among_threads(tmp_path: Path, target: torch.dtype) -> None:
    """A tensor above one piece need not wait for one thread."""
    wanted = torch.arange(500_000, dtype=torch.float32) / 7
    (tmp_path / "x").write_bytes(wanted.numpy().tobytes())
    found = torch.empty(500_000, dtype=target)
    pieces = list(cut(tmp_path / "x", 0, torch.float32, found))
    assert len(pieces) == 4
    assert all(piece.num_bytes <= reading.PIECE_BYTES for piece in pieces)
    times = read_all(pieces, 3)
    assert torch.equal(found, wanted.to(target))
    assert times.num_threads == 3
    assert times.read_s > 0


def test_tensors_of_a_caller_in_inference_mode_are_filled(tmp_path: Path) -> None:
    """The mode belongs to a thread: the helpers have to enter it too."""
    wanted = torch.arange(500_000, dtype=torch.float32) / 7
    (tmp_path / "x").write_bytes(wanted.numpy().tobytes())
    with torch.inference_mode():
        found = torch.empty(500_000, dtype=torch.float16)
        read_all(list(cut(tmp_path / "x", 0, torch.float32, found)), 3)
    assert torch.equal(found, wanted.to(torch.float16))


def many_pieces(path: Path) -> list[Piece]:
    write_numbers(path)
    found = torch.zeros(NUM_ELEMENTS)
    return [Piece(path, 4 * index, torch.float32, found[index : index + 1]) for index in range(NUM_ELEMENTS)]


def test_an_error_in_one_thread_ends_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk error that a helper meets is raised in the thread that asked; nobody reads on."""
    real, calls, failed = os.preadv, [0], threading.Event()

    def failing(file: int, buffers: Sequence[memoryview], offset: int) -> int:
        if threading.current_thread().name.startswith("elbowroom-reader"):
            failed.set()
            raise OSError(5, "Input/output error")
        failed.wait(5)
        calls[0] += 1
        return real(file, buffers, offset)

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(CheckpointError, match="x cannot be read: Input/output error") as error:
        read_all(many_pieces(tmp_path / "x"), 3)
    assert error.value.hint == "check the disk"
    assert calls[0] < NUM_ELEMENTS // 2
    assert not readers()


def test_a_file_that_ends_early_is_an_error_in_every_thread(tmp_path: Path) -> None:
    pieces = many_pieces(tmp_path / "x")
    os.truncate(tmp_path / "x", 4000)
    with pytest.raises(CheckpointError, match="became shorter"):
        read_all(pieces, 4)
    assert not readers()


def test_ctrl_c_ends_the_threads_before_it_is_raised(tmp_path: Path) -> None:
    """When KeyboardInterrupt comes out, no thread writes to the targets any more."""
    pieces = many_pieces(tmp_path / "x")
    file = os.open(tmp_path / "x", os.O_RDONLY)

    def interrupt(_done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read_pieces(pieces, {tmp_path / "x": file}, interrupt, 4)
    os.close(file)
    assert not readers()


def test_progress_comes_from_the_thread_that_asked(tmp_path: Path) -> None:
    pieces = many_pieces(tmp_path / "x")
    file = os.open(tmp_path / "x", os.O_RDONLY)
    seen: list[tuple[str, int]] = []
    read_pieces(pieces, {tmp_path / "x": file}, lambda done: seen.append((threading.current_thread().name, done)), 4)
    os.close(file)
    assert {name for name, _ in seen} == {threading.current_thread().name}
    assert seen[-1][1] == 4 * NUM_ELEMENTS
