"""Products of weights and activations: every instruction set against float64, on shapes that fit no tile."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.native import instructions
from torch import Tensor

if importlib.util.find_spec("elbowroom._native") is None:
    pytest.skip("elbowroom._native was not built (ELBOWROOM_NATIVE=0)", allow_module_level=True)

from elbowroom.kernels.native import multiply

_native = importlib.import_module("elbowroom._native")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
TOKENS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 31, 32, 47, 48, 100)
"""Both sides of every change between rows and panels."""


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """The product is that of float64, up to what rounding every sum in float32 can cost."""
    got = multiply(x, weight, bias)
    exact, magnitude = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    bound = 2.0**-24 * (8 + 2 * x.shape[1] ** 0.5) * magnitude + 1e-40
    assert got.dtype == torch.float32
    assert got.shape == exact.shape
    assert (got.double() - exact).abs().le(bound).all(), f"off by {((got - exact).abs() / bound).max():.1f} bounds"


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("rows", "cols"),
    [(1, 1), (1, 1000), (7, 13), (12, 256), (13, 257), (48, 12), (49, 255), (100, 100), (257, 49), (1000, 7)],
)
def test_every_shape_dtype_and_number_of_tokens(isa: str, rows: int, cols: int, dtype: torch.dtype) -> None:
    weight, bias = draw(rows, cols, seed=rows).to(dtype), draw(rows, seed=1)
    for num_tokens in TOKENS:
        x = draw(num_tokens, cols, seed=num_tokens)
        check(x, weight)
        check(x, weight, bias)


@pytest.mark.parametrize("dtype", FLOATS)
def test_deep_products_are_summed_over_every_depth_block(isa: str, dtype: torch.dtype) -> None:
    """Widened 256 columns at a time; the last block has one column."""
    for cols, num_tokens in itertools.product((512, 513, 1025), (8, 9, 40)):
        check(draw(num_tokens, cols), draw(61, cols, seed=1).to(dtype), draw(61, seed=2))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("num_tokens", [1, 8, 9, 33])
def test_rows_of_weights_may_lie_apart(isa: str, dtype: torch.dtype, num_tokens: int) -> None:
    """A view of some columns of a wider matrix, with NaN in all others, and one of every other row."""
    for rows, cols, extra in [(1, 40, 1), (29, 37, 3), (100, 256, 13)]:
        wide = torch.full((rows, cols + 2 * extra), float("nan"), dtype=dtype)
        wide[:, extra:-extra] = draw(rows, cols)
        check(draw(num_tokens, cols), wide[:, extra:-extra])
        check(draw(num_tokens, cols), draw(2 * rows, cols).to(dtype)[::2])


@pytest.mark.parametrize("num_tokens", [3, 20])
def test_one_row_may_stand_for_all(isa: str, num_tokens: int) -> None:
    """An expanded row has a stride of 0."""
    check(draw(num_tokens, 40), draw(1, 40).expand(50, 40))


@pytest.mark.parametrize("num_tokens", [3, 20])
def test_a_bias_need_not_be_contiguous(isa: str, num_tokens: int) -> None:
    check(draw(num_tokens, 16), draw(300, 16), draw(600)[::2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_finite_16_bit_weight_is_widened_exactly(isa: str, dtype: torch.dtype) -> None:
    """Unit vectors pick the weights out one by one, subnormals included; no rounding is excused."""
    weight = torch.arange(2**16).to(torch.uint16).view(dtype).view(256, 256).clone()
    weight[~weight.isfinite()] = 0.0
    units = torch.eye(256)
    panels = multiply(units, weight)
    rows = torch.cat([multiply(part.contiguous(), weight) for part in units.split(8)])

    assert torch.equal(panels, weight.float().T)
    assert torch.equal(rows, weight.float().T)


@pytest.mark.parametrize("num_tokens", [1, 5, 8, 9, 16, 32, 35])
def test_a_poisoned_token_or_weight_spoils_its_own_results_only(isa: str, num_tokens: int) -> None:
    x, weight = draw(num_tokens, 300), draw(50, 300)
    clean = multiply(x, weight)
    x[num_tokens // 2, 7], weight[31, 299] = float("nan"), float("inf")
    got = multiply(x, weight)

    assert got[num_tokens // 2].isnan().all()
    assert not got[:, 31].isfinite().any()
    token, row = torch.arange(num_tokens) != num_tokens // 2, torch.arange(50) != 31
    assert torch.equal(got[token][:, row], clean[token][:, row])


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_token_has_the_same_bits_whatever_its_neighbours(isa: str, dtype: torch.dtype) -> None:
    """Among tokens in rows, and among tokens in panels; one alone is summed in another order."""
    x, weight = draw(80, 270), draw(77, 270, seed=1).to(dtype)
    rows, panels = multiply(x[:47], weight), multiply(x, weight)
    for num_tokens in (*range(2, 32), *range(33, 47)):
        assert torch.equal(multiply(x[:num_tokens], weight), rows[:num_tokens])
        assert torch.equal(multiply(x[47 - num_tokens : 47], weight), rows[47 - num_tokens :])
    torch.testing.assert_close(multiply(x[:1], weight), rows[:1], rtol=1e-4, atol=1e-4)
    for num_tokens in (32, 48, 49, 63):
        assert torch.equal(multiply(x[:num_tokens], weight), panels[:num_tokens])
        assert torch.equal(multiply(x[80 - num_tokens :], weight), panels[80 - num_tokens :])


@pytest.mark.parametrize(("rows", "cols", "num_tokens"), [(0, 8, 3), (0, 8, 20), (5, 8, 0), (5, 0, 3), (5, 0, 20)])
def test_empty_products_are_zeros_and_the_bias(isa: str, rows: int, cols: int, num_tokens: int) -> None:
    x, weight = torch.ones(num_tokens, cols), torch.ones(rows, cols)

    assert torch.equal(multiply(x, weight), torch.zeros(num_tokens, rows))
    assert torch.equal(
        multiply(x, weight, torch.arange(rows).float()), torch.arange(rows).float().repeat(num_tokens, 1)
    )


@settings(max_examples=60, deadline=None, database=None)
@given(
    rows=st.integers(1, 150),
    cols=st.integers(1, 600),
    num_tokens=st.integers(1, 50),
    extra=st.integers(0, 9),
    dtype=st.sampled_from(FLOATS),
    biased=st.booleans(),
    scale=st.sampled_from([1e-3, 1.0, 1e4]),
)
def test_any_product_equals_float64(
    rows: int, cols: int, num_tokens: int, extra: int, dtype: torch.dtype, biased: bool, scale: float
) -> None:
    weight = draw(rows, cols + extra, seed=rows).to(dtype)[:, :cols]
    for name in _native.supported_isas():
        with instructions(name):
            check(scale * draw(num_tokens, cols, seed=cols), weight, draw(rows) if biased else None)


def test_the_default_dtype_of_torch_changes_nothing() -> None:
    """Users of transformers set it to load a model in half precision."""
    x, weight = draw(20, 64), draw(30, 64)
    expected = multiply(x, weight)
    torch.set_default_dtype(torch.bfloat16)
    try:
        got = multiply(x, weight)
    finally:
        torch.set_default_dtype(torch.float32)
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("x", "weight", "bias", "message"),
    [
        (torch.ones(2, 8, dtype=torch.bfloat16), torch.ones(3, 8), None, r"cannot multiply torch.bfloat16 \(2, 8\)"),
        (torch.ones(2, 8, dtype=torch.float64), torch.ones(3, 8), None, "cannot multiply torch.float64"),
        (torch.ones(8), torch.ones(3, 8), None, r"cannot multiply torch.float32 \(8,\)"),
        (torch.ones(2, 8), torch.ones(8), None, r"with weights \(8,\)"),
        (torch.ones(2, 8), torch.ones(3, 9), None, r"with weights \(3, 9\)"),
        (torch.ones(2, 16)[:, ::2], torch.ones(3, 8), None, "must be contiguous"),
        (torch.ones(2, 8), torch.ones(8, 3).T, None, "adjacent columns"),
        (torch.ones(2, 8), torch.ones(3, 16)[:, ::2], None, "adjacent columns"),
        (torch.ones(2, 8), torch.ones(3, 8, dtype=torch.float64), None, "got torch.float64"),
        (torch.ones(2, 8), torch.ones(3, 8, dtype=torch.int32), None, "got torch.int32"),
        (
            torch.ones(2, 8),
            torch.ones(3, 8),
            torch.ones(2),
            r"the bias must be float32 \[3\], got torch.float32 \(2,\)",
        ),
        (torch.ones(2, 8), torch.ones(3, 8), torch.ones(3, dtype=torch.bfloat16), "got torch.bfloat16"),
        (torch.ones(2, 8), torch.ones(3, 8), torch.ones(3, 1), r"the bias must be float32 \[3\]"),
    ],
)
def test_wrong_arguments_are_refused(x: Tensor, weight: Tensor, bias: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        multiply(x, weight, bias)


def test_an_unknown_instruction_set_in_the_environment_is_an_error_and_no_crash() -> None:
    """Also where the threads of the pool are the first to ask for it."""
    code = """
import array
from elbowroom import _native
weight, x, y = (array.array("f", [1.0]) * count for count in (900 * 400, 20 * 400, 20 * 900))
matrix = (weight.buffer_info()[0], 900, 400, 4 * 400, 0, 0)
for num_tokens in (2, 20):
    try: _native.multiply(matrix, x.buffer_info()[0], num_tokens, y.buffer_info()[0])
    except ValueError as error: print(error)
"""
    environment = os.environ | {"ELBOWROOM_ISA": "abacus", "PYTHONPATH": ":".join(sys.path)}
    shown = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=False)

    assert (shown.returncode, shown.stderr) == (0, b"")
    assert shown.stdout.count(b"instruction set 'abacus' cannot run here") == 2
