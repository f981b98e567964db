"""ComputePath: how the crossover is found, who runs which pass, and that the planned workspace suffices."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tests.support.decoder_world import (
    CONFIGS,
    Paged,
    close,
    dense_logits,
    dense_step,
    random_decoder,
    random_tokens,
)
from torch import Tensor

from elbowroom.engine.sizing import workspace_sizes
from elbowroom.errors import IntegrityError
from elbowroom.memory import Arena, Budget, HostTier, Ledger
from elbowroom.memory.workspace import Workspace
from elbowroom.models import path as path_module
from elbowroom.models.path import ANY, ComputePath

HAS_NATIVE = importlib.util.find_spec("elbowroom._native") is not None
needs_native = pytest.mark.skipif(not HAS_NATIVE, reason="elbowroom._native was not built")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
Seconds = Callable[[torch.dtype, int, int], float]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Pretend to be a machine: its kernels, what its processor can, and how long products take on it."""
    path_module._native_tokens.cache_clear()

    def pretend(
        backend: str = "native",
        capabilities: dict[str, bool] | None = None,
        native: Seconds = lambda dtype, width, n: float(n),
        torch_: Seconds = lambda dtype, width, n: float(n),
    ) -> None:
        monkeypatch.setattr(path_module, "backend_name", lambda: backend)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities or {})
        monkeypatch.setattr(path_module, "_native_seconds", native)
        monkeypatch.setattr(path_module, "_torch_seconds", torch_)

    yield pretend
    path_module._native_tokens.cache_clear()


def refuse(dtype: torch.dtype, width: int, num_tokens: int) -> float:
    raise AssertionError(f"measured {dtype} with {num_tokens} tokens without need")


@pytest.mark.parametrize("dtype", FLOATS)
def test_without_native_kernels_all_is_torchs(machine: Callable[..., None], dtype: torch.dtype) -> None:
    machine(backend="reference", native=refuse, torch_=refuse)
    assert ComputePath.choose(dtype, 64) == ComputePath(0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_without_hardware_is_native_without_measuring(
    machine: Callable[..., None], dtype: torch.dtype
) -> None:
    """Torch emulates these products there; what the processor can with the other half dtype does not help."""
    other = "avx512_fp16" if dtype is torch.bfloat16 else "avx512_bf16"
    machine(capabilities={other: True, "avx512_f": True, "amx_int8": True}, native=refuse, torch_=refuse)
    assert ComputePath.choose(dtype, 64) == ComputePath(ANY)


@pytest.mark.parametrize(
    ("dtype", "capability"),
    [
        (torch.bfloat16, "avx512_bf16"),
        (torch.bfloat16, "amx_bf16"),
        (torch.float16, "avx512_fp16"),
        (torch.float16, "amx_fp16"),
        (torch.float32, "none needed"),
    ],
)
@pytest.mark.parametrize(("crossover", "native_tokens"), [(1, 15), (17, 31), (64, 63), (200, 255), (257, ANY)])
def test_the_crossover_is_the_first_measured_length_from_which_torch_wins(
    machine: Callable[..., None], dtype: torch.dtype, capability: str, crossover: int, native_tokens: int
) -> None:
    def torch_seconds(kind: torch.dtype, width: int, num_tokens: int) -> float:
        assert kind is dtype
        return 1.0 if num_tokens < crossover else 0.5

    machine(capabilities={capability: True}, native=lambda kind, width, n: 1.0, torch_=torch_seconds)
    assert ComputePath.choose(dtype, 64) == ComputePath(native_tokens)


@pytest.mark.parametrize(("ratio", "native_tokens"), [(1.0, ANY), (1.14, ANY), (1.16, 15)])
def test_torch_must_win_by_a_margin(machine: Callable[..., None], ratio: float, native_tokens: int) -> None:
    machine(native=lambda dtype, width, n: ratio * n, torch_=lambda dtype, width, n: float(n))
    assert ComputePath.choose(torch.float32, 64) == ComputePath(native_tokens)


def test_a_length_at_which_torch_wins_by_chance_does_not_count(machine: Callable[..., None]) -> None:
    machine(native=lambda dtype, width, n: 1.0, torch_=lambda dtype, width, n: 0.5 if n in (16, 128, 256) else 1.0)
    assert ComputePath.choose(torch.float32, 64) == ComputePath(127)


def test_it_is_measured_once_a_process(machine: Callable[..., None]) -> None:
    calls: list[int] = []

    def native(dtype: torch.dtype, width: int, num_tokens: int) -> float:
        calls.append(num_tokens)
        return 1.0

    machine(native=native, torch_=lambda dtype, width, n: 1.0)
    assert ComputePath.choose(torch.float32, 64) == ComputePath.choose(torch.float32, 64) == ComputePath(ANY)
    assert calls == [256]


@needs_native
@pytest.mark.parametrize("dtype", FLOATS)
def test_both_sides_are_really_timed(dtype: torch.dtype) -> None:
    for seconds in (path_module._native_seconds(dtype, 64, 16), path_module._torch_seconds(dtype, 64, 16)):
        assert 0 < seconds < 10


# --- the model -------------------------------------------------------------------------------------------------------


@needs_native
def test_each_path_has_its_model() -> None:
    from elbowroom.models.native import NativeDecoder

    decoder = random_decoder(CONFIGS["llama"])
    assert ComputePath(0).model(decoder) is decoder
    assert isinstance(ComputePath(ANY).model(decoder), NativeDecoder)
    for native_tokens in (0, 8, ANY):
        model = ComputePath(native_tokens).model(decoder)
        assert model.config is decoder.config
        for count in (1, 8, 9, 512):
            assert model.runs_on_torch(count) == (count > native_tokens)


@needs_native
def test_the_mixed_model_sends_each_pass_to_one_side(monkeypatch: pytest.MonkeyPatch) -> None:
    from elbowroom.models.native import NativeDecoder

    decoder, seen = random_decoder(CONFIGS["llama"]), []
    for name, kind in (("native", NativeDecoder), ("torch", type(decoder))):
        step = kind.step

        def watched(self: Any, tokens: Tensor, *rest: Any, name: str = name, step: Any = step) -> Tensor:
            seen.append((name, len(tokens)))
            made: Tensor = step(self, tokens, *rest)
            return made

        monkeypatch.setattr(kind, "step", watched)
    model = ComputePath(20).model(decoder)
    for count in (1, 19, 20, 21, 40):
        close(
            dense_step(model, random_tokens(count), [count - 1]), dense_step(decoder, random_tokens(count), [count - 1])
        )
    assert seen[::2] == [("native", 1), ("native", 19), ("native", 20), ("torch", 21), ("torch", 40)]


# --- the workspace ---------------------------------------------------------------------------------------------------

PATHS = [
    0,
    pytest.param(8, marks=needs_native),
    pytest.param(30, marks=needs_native),
    pytest.param(ANY, marks=needs_native),
]


@pytest.mark.parametrize("native_tokens", PATHS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "name", ["one head, one of everything", "layers of every width", "wide values", "gemma", "wide"]
)
def test_the_planned_workspace_suffices_for_the_largest_passes(
    name: str, dtype: torch.dtype, native_tokens: int
) -> None:
    """Every size up to the largest, with as many logits as there can be; prefill and decode of a full batch."""
    path, step_tokens, max_sequences = ComputePath(native_tokens), 40, 12
    decoder = random_decoder(CONFIGS[name], dtype)
    vocab = decoder.config.vocab_size
    sizes = workspace_sizes(decoder.config, dtype, path, step_tokens, max_sequences)
    workspace = Workspace(Arena(HostTier(), Ledger(Budget({}))), sizes)
    paged = Paged(path.model(decoder), max_sequences)
    runs = [(s, random_tokens(3, vocab, seed=s)) for s in range(max_sequences)]
    assert paged.step(runs, range(max_sequences), workspace).isfinite().all()
    for count in (1, 8, 9, 16, 17, 30, 31, 40):
        tokens = random_tokens(count, vocab)
        rows = [min(row, count - 1) for row in range(max_sequences)]
        assert paged.step([(0, tokens)], rows, workspace).isfinite().all()
    if dtype is torch.float32:
        tokens = random_tokens(40, vocab)
        close(dense_step(path.model(decoder), tokens, range(12), workspace), dense_logits(decoder, tokens)[:12])
    workspace.close()


@pytest.mark.parametrize("native_tokens", PATHS)
def test_a_pass_that_was_not_planned_for_is_refused(native_tokens: int) -> None:
    """What the planner of the workspace promised is checked at every use."""
    path = ComputePath(native_tokens)
    decoder = random_decoder(CONFIGS["llama"])
    sizes = workspace_sizes(decoder.config, torch.float32, path, 40, 4)
    workspace = Workspace(Arena(HostTier(), Ledger(Budget({}))), sizes)
    model = path.model(decoder)

    with pytest.raises(IntegrityError, match="the step needs"):
        dense_step(model, random_tokens(49), [0], workspace)
    with pytest.raises(IntegrityError, match="'logits'"):
        dense_step(model, random_tokens(8), range(5), workspace)
    assert dense_step(model, random_tokens(40), range(4), workspace).isfinite().all()
    workspace.close()


@needs_native
@pytest.mark.parametrize("name", CONFIGS)
def test_a_native_path_plans_no_less_than_a_pass_takes(name: str) -> None:
    """Names and bytes of every buffer, for every number of tokens up to the planned one."""
    decoder = random_decoder(CONFIGS[name])

    class Taker:
        """Notes what is asked for."""

        def __init__(self) -> None:
            self.taken: dict[str, int] = {}

        def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
            size = torch.Size(shape).numel() * dtype.itemsize
            self.taken[name] = max(self.taken.get(name, 0), size)

    for native_tokens in (0, 8, ANY):
        path, taker = ComputePath(native_tokens), Taker()
        for count in (1, 8, 9, 33, 40):
            dense_step(path.model(decoder), random_tokens(count, decoder.config.vocab_size), [0] * 4, taker)  # type: ignore[arg-type]
        planned = workspace_sizes(decoder.config, torch.float32, path, 40, 4)
        assert set(taker.taken) == set(planned)
        assert all(taker.taken[each] <= planned[each] for each in planned)
