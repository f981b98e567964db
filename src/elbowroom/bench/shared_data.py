"""Where the public data files of tests and benchmarks are: they are no part of this repository."""

from __future__ import annotations

import os
from pathlib import Path

DATA = Path(os.environ.get("ELBOWROOM_DATA", Path(__file__).parents[3] / "../shared/data"))
"""``ELBOWROOM_DATA``, or ``shared/data`` beside the source tree. What is not there is skipped, with the reason."""
