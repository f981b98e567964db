"""RunReport: what a run took from its memory budget and how its time split, as JSON and as a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from elbowroom.units import format_bytes

if TYPE_CHECKING:
    from elbowroom.engine.engine import Engine
    from elbowroom.memory.ledger import Usage
    from elbowroom.models.loader import LoadReport


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """Bytes by owner, what the process really held, how the start split, and speeds."""

    budget_bytes: int
    baseline_bytes: int
    """VmRSS before the model was loaded, everything imported and warm."""
    peak_over_baseline_bytes: int
    """Peak RSS of the process since then, minus the baseline: what the budget bounds."""
    ledger: dict[str, dict[str, Usage]]
    ledger_peak_bytes: int
    """Most bytes that all owners together were charged at once."""
    load: LoadReport
    imports_s: float | None
    """Seconds that importing torch and the engine took."""
    ttft_s: float | None
    prefill_tokens_per_s: float | None
    decode_tokens_per_s: float | None

    @classmethod
    def of(cls, engine: Engine, ttft_s: float | None = None, imports_s: float | None = None) -> RunReport:
        """Return the report of a running engine."""
        parts = engine.parts
        times = parts.core.times
        return cls(
            budget_bytes=parts.memory.budget_bytes,
            baseline_bytes=parts.meter.baseline_bytes,
            peak_over_baseline_bytes=parts.meter.peak_over_baseline_bytes,
            ledger=engine.ledger(),
            ledger_peak_bytes=parts.ledger.peak("host"),
            load=parts.load,
            imports_s=imports_s,
            ttft_s=ttft_s,
            prefill_tokens_per_s=_rate(times.prefill_tokens, times.prefill_s),
            decode_tokens_per_s=_rate(times.decode_tokens, times.decode_s),
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain numbers and dicts."""
        return asdict(self)

    def print(self) -> None:
        """Print the table on stdout."""
        from rich import box
        from rich.console import Console
        from rich.table import Table

        table = Table(box=box.SIMPLE, pad_edge=False)
        for name in ("memory", "now", "peak"):
            table.add_column(name, justify="left" if name == "memory" else "right", no_wrap=True)
        for owner, tiers in self.ledger.items():
            for tier, usage in tiers.items():
                label = owner if tier == "host" else f"{owner} ({tier})"
                table.add_row(label, format_bytes(usage["current_bytes"]), format_bytes(usage["peak_bytes"]))
        now = sum(usage["current_bytes"] for tiers in self.ledger.values() for usage in tiers.values())
        table.add_section()
        table.add_row("all owners", format_bytes(now), format_bytes(self.ledger_peak_bytes))
        table.add_row("budget", "", format_bytes(self.budget_bytes))
        table.add_row("process over baseline", "", format_bytes(self.peak_over_baseline_bytes))
        console = Console()
        console.print(table)
        for line in (self._start(), self._speeds()):
            console.print(line, highlight=False, soft_wrap=True)

    def _start(self) -> str:
        load = self.load
        threads = "1 thread" if load.num_threads == 1 else f"{load.num_threads} threads"
        parts = f"check {load.open_s:.2f}, read {load.read_s:.2f}, convert {load.convert_s:.2f}; {threads}"
        imports = "" if self.imports_s is None else f"imports {self.imports_s:.2f} s; "
        return f"{imports}{format_bytes(load.file_bytes)} of weights loaded in {load.total_s:.2f} s ({parts})"

    def _speeds(self) -> str:
        first = "none" if self.ttft_s is None else f"{self.ttft_s:.2f} s"
        prefill, decode = _speed(self.prefill_tokens_per_s), _speed(self.decode_tokens_per_s)
        baseline = format_bytes(self.baseline_bytes)
        return f"first token after {first}; prefill {prefill}; decode {decode}; baseline {baseline}"


def _rate(tokens: int, seconds: float) -> float | None:
    return tokens / seconds if tokens and seconds > 0 else None


def _speed(rate: float | None) -> str:
    return "none" if rate is None else f"{rate:,.0f} tokens/s"
