"""The swap directory: what cannot be used is refused before a model is loaded; a disk that fills later is survived."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from tests.support.http import assert_no_leak, tiny_llm

from elbowroom.engine.build import build_engine
from elbowroom.engine.output import RequestOutput
from elbowroom.engine.sampling_params import SamplingParams
from elbowroom.engine.scheduling import Scheduling
from elbowroom.errors import ConfigError, PlanError


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """What is answered where memory is not short."""
    return answers(tmp_path_factory.mktemp("alone"), Scheduling(), kv_bytes=None)[0]


def failing(code: int) -> Any:
    def fail(*_: object, **_named: object) -> int:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize("preemption", ["auto", "swap"])
@pytest.mark.parametrize("kind", ["file", "below a file", "read-only", "full"])
def test_a_directory_that_cannot_be_used_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, preemption: str
) -> None:
    """The model, which is not there either, is not even looked for."""
    (tmp_path / "file").write_text("x")
    directory = tmp_path / {"file": "file", "below a file": "file/swap"}.get(kind, "swap")
    if kind == "read-only":
        monkeypatch.setattr(tempfile, "mkdtemp", failing(errno.EROFS))
    if kind == "full":
        monkeypatch.setattr(os, "pwritev", failing(errno.ENOSPC))

    with pytest.raises(ConfigError, match="cannot hold swapped KV") as caught:
        build_engine(
            str(tmp_path / "no model"), "64MiB", scheduling=Scheduling(preemption=preemption, swap_directory=directory)
        )
    assert "--swap" in (caught.value.hint or "")
    words = {"full": "is full", "read-only": "Read-only", "file": "File exists", "below a file": "Not a directory"}
    assert words[kind] in caught.value.message
    assert not list(tmp_path.glob("swap/*"))


def test_a_missing_directory_is_made_and_left_empty(tmp_path: Path) -> None:
    llm = tiny_llm(tmp_path / "model", scheduling=Scheduling(swap_directory=tmp_path / "some" / "where"))
    assert len(list((tmp_path / "some" / "where").iterdir())) == 1
    llm.engine.close()
    assert list((tmp_path / "some" / "where").iterdir()) == []


@pytest.mark.parametrize(("limit", "is_refused"), [("512KiB", True), ("1MiB", False)])
def test_a_limit_may_be_small_but_not_useless(tmp_path: Path, limit: str, is_refused: bool) -> None:
    if is_refused:
        with pytest.raises(PlanError, match="next to nothing") as caught:
            Scheduling(swap_directory=tmp_path, swap_limit=limit)
        assert "--swap-limit" in (caught.value.hint or "")
    else:
        cost = Scheduling(swap_directory=tmp_path, swap_limit=limit).measure()
        assert cost is not None
        assert cost.write_bytes_per_s > 0


@pytest.mark.parametrize("kind", ["works", "full", "unreadable"])
def test_a_disk_that_fails_later_costs_time_and_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: list[list[int]], kind: str
) -> None:
    scheduling = Scheduling(preemption="swap", swap_directory=tmp_path / "swap")
    if kind == "full":
        monkeypatch.setattr("elbowroom.engine.build.EngineCore", breaking("pwritev", monkeypatch))
    if kind == "unreadable":
        monkeypatch.setattr("elbowroom.engine.build.EngineCore", breaking("preadv", monkeypatch))
    shared, stats = answers(tmp_path / "shared", scheduling, kv_bytes=5 * 2**18)

    assert stats.preemptions > 0
    assert shared == alone
    assert stats.swaps_out > 0
    assert stats.failed_swaps == {"works": 0, "full": stats.swaps_out, "unreadable": stats.swaps_in}[kind]


def breaking(call: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a maker of the core, the last thing that is made, from which on a system call fails."""
    from elbowroom.engine.core import EngineCore

    def make(*parts: Any) -> EngineCore:
        monkeypatch.setattr(os, call, failing(errno.ENOSPC if call == "pwritev" else errno.EIO))
        return EngineCore(*parts)

    return make


def answers(directory: Path, scheduling: Scheduling, kv_bytes: int | None) -> tuple[list[list[int]], Any]:
    """Return the tokens of six long answers in so much KV cache, and the counters; the engine lives on."""
    llm = tiny_llm(directory, context=1024, prefix_cache=False, scheduling=scheduling)
    engine = llm.engine
    try:
        if kv_bytes is not None:
            ledger = engine.parts.ledger
            engine.set_budget(ledger.total("host") - ledger.held("kv", "host") + kv_bytes)
        sampling = SamplingParams(max_tokens=600, ignore_eos=True, seed=3)
        futures = [engine.generate([97 + number] * 200, sampling) for number in range(6)]
        outputs: list[RequestOutput] = [future.result(60) for future in futures]
        stats = engine.stats()
        engine.check_integrity()
        assert engine.is_alive
    finally:
        assert_no_leak(llm)
        engine.close()
    return [output.outputs[0].token_ids for output in outputs], stats
