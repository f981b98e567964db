"""What all tests share: one torch thread, since tiny tensors gain nothing from more, and assertions with values."""

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, which torch may do at any time
pytest.register_assert_rewrite("tests.support")

from tests.support.native import ISAS, instructions  # noqa: E402  (after the line above, for its assertions too)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of native code that runs here."""
    with instructions(request.param):
        yield request.param
