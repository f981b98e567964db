"""What all tests share: one torch thread, since tiny tensors gain nothing from more, and assertions with values."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
pytest.register_assert_rewrite("tests.support")
