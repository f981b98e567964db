"""read_trace: a workload from a file or folder whose layout is recognised by its columns or keys."""

from __future__ import annotations

from pathlib import Path

from elbowroom.errors import RequestError
from elbowroom.workloads.base import Workload
from elbowroom.workloads.traces.azure import AzureLayout
from elbowroom.workloads.traces.base import TraceLayout, TraceOptions
from elbowroom.workloads.traces.burstgpt import BurstGPTLayout
from elbowroom.workloads.traces.jsonl import OwnLayout
from elbowroom.workloads.traces.mooncake import MooncakeLayout
from elbowroom.workloads.traces.servegen import ServeGenLayout
from elbowroom.workloads.traces.sharegpt import ShareGPTLayout

LAYOUTS: tuple[TraceLayout, ...] = (
    OwnLayout(),
    AzureLayout(),
    BurstGPTLayout(),
    MooncakeLayout(),
    ServeGenLayout(),
    ShareGPTLayout(),
)


def read_trace(path: Path, options: TraceOptions | None = None) -> Workload:
    """Read a trace.

    Args:
        path: a file, or ServeGen's folder.
        options: what some layouts need.

    Raises:
        RequestError: there is no such file, no layout fits, or a line is malformed; names the layouts, or the line.
    """
    head = ""
    if not path.exists():
        raise RequestError(f"no trace at {path}", "give the path of a trace file or folder")
    if path.is_file():
        try:
            with path.open(encoding="utf-8-sig") as lines:
                head = lines.readline()
        except UnicodeDecodeError as error:
            raise RequestError(f"{path} is no text: {error}", "unpack the trace first") from error
    for layout in LAYOUTS:
        if layout.matches(path, head):
            try:
                return layout.read(path, options or TraceOptions())
            except UnicodeDecodeError as error:
                raise RequestError(f"{path} is no text: {error}", "unpack or repair the trace first") from error
    known = "\n".join(f"  {layout.name}: {layout.description}" for layout in LAYOUTS)
    found = f"line 1 is {head.strip():.80}" if head.strip() else "it begins with nothing"
    raise RequestError(f"{path} has no known trace layout: {found}", f"the layouts are\n{known}")
