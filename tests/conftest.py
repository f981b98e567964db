"""What all tests share: one torch thread, because their tensors are tiny and waking more threads costs more."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
