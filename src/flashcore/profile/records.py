"""What Nsight Compute said of one call, as it is kept."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from flashcore.bench.shapes import Shape
from flashcore.environment import Environment
from flashcore.profile import metrics
from flashcore.profile.metrics import Metric
from flashcore.stored import Stored


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Reading(_Record):
    """One metric's value: time in microseconds ("us"), sizes in "byte", shares in "%". None: ncu has none (n/a)."""

    value: float | None
    unit: str


class KernelRecord(_Record):
    """One kernel of the call: its launch, and every reading by the metric's full name."""

    name: str
    grid: str
    block: str
    readings: dict[str, Reading]

    def value(self, metric: Metric) -> float | None:
        """The metric's value by the first of its names that has one."""
        found = (self.readings.get(name) for name in metric.names)
        return next((reading.value for reading in found if reading is not None and reading.value is not None), None)

    @property
    def us(self) -> float:
        value = self.value(metrics.DURATION)
        assert value is not None  # ncu_page.parse refuses a kernel without a duration
        return value

    @property
    def dram_bytes(self) -> float | None:
        """Bytes read from and written to device memory."""
        parts = [self.value(metric) for metric in (metrics.DRAM_READ, metrics.DRAM_WRITE)]
        known = [part for part in parts if part is not None]
        return sum(known) if len(known) == len(parts) else None

    @property
    def stalls(self) -> list[tuple[str, float, float]]:
        """(reason, cycles that warps waited for each instruction issued, share of all such waiting), the longest first."""
        cycles = {reason: self.value(metric) for reason, metric in metrics.STALL_METRICS.items()}
        known = {reason: value for reason, value in cycles.items() if value}
        total = sum(known.values())
        ordered = sorted(known.items(), key=lambda item: -item[1])
        return [(reason, value, value / total) for reason, value in ordered]


class ProfileRecord(_Record, Stored):
    """One call under Nsight Compute. `absent`: what was not asked for, because this chip has no such metric."""

    schema_version: Literal[1] = 1
    kind: Literal["flashcore-profile"] = "flashcore-profile"
    environment: Environment
    ncu: str
    command: list[str]
    impl: str
    shape: Shape
    absent: list[str]
    kernels: list[KernelRecord]

    @property
    def us(self) -> float:
        """Microseconds of all its kernels, one after another."""
        return sum(kernel.us for kernel in self.kernels)
