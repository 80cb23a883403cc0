"""What a comparison leaves: its JSON record, and the plot of it."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Literal

from pydantic import BaseModel, ConfigDict

from flashcore.environment import Environment
from flashcore.stored import Stored

# Steps at the start that are not timed: compilers, autotuning and allocators settle in them.
WARM_UP = 20


class Run(BaseModel):
    """One training run: the loss before each step, and the milliseconds each step took."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    attention: str
    losses: list[float]
    step_ms: list[float]

    @property
    def median_ms(self) -> float:
        """Of the steps after the first WARM_UP, or of all where there are no more."""
        return median(self.step_ms[WARM_UP:] or self.step_ms)


class Comparison(Stored):
    """The runs of one model on the same batches from the same start; `plans` says what FlashCore ran."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    kind: Literal["flashcore-example-train-gpt"] = "flashcore-example-train-gpt"
    environment: Environment
    parameters: int
    batch: int
    context: int
    heads: int
    head_dim: int
    seed: int
    plan: str
    runs: list[Run]

    def run(self, attention: str) -> Run:
        return next(run for run in self.runs if run.attention == attention)

    def tokens_per_second(self, run: Run) -> float:
        return self.batch * self.context / run.median_ms * 1e3

    def apart(self, first: str, second: str) -> float:
        """The largest difference of two runs' losses at any step."""
        return max(abs(a - b) for a, b in zip(self.run(first).losses, self.run(second).losses, strict=True))


def plot(comparison: Comparison, path: Path) -> None:
    """Losses on top of one another, and tokens per second beside each other, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), dpi=120)
    figure.set_layout_engine("constrained")
    FigureCanvasAgg(figure)
    curves, speeds = figure.subplots(1, 2, width_ratios=(2, 1))
    styles = ({"lw": 4.5, "alpha": 0.35}, {"lw": 1.4}, {"lw": 1.0, "ls": ":"})
    colours = ("#4c72b0", "#1b7f4b", "#555555")
    for run, style, colour in zip(comparison.runs, styles, colours, strict=False):
        curves.plot(run.losses, label=run.attention, color=colour, **style)
    curves.set(xlabel="step", ylabel="loss (nats a byte)")
    curves.legend()
    curves.grid(alpha=0.2)
    names = [run.attention for run in comparison.runs]
    rates = [comparison.tokens_per_second(run) / 1e6 for run in comparison.runs]
    bars = speeds.barh(names[::-1], rates[::-1], color=list(colours[: len(names)][::-1]))
    speeds.bar_label(bars, labels=[f"{rate:.2f}" for rate in rates[::-1]], padding=3, fontsize=8)
    speeds.set(xlabel="million tokens per second, of whole steps")
    speeds.margins(x=0.35)
    found = comparison.environment
    figure.suptitle(
        f"{comparison.parameters / 1e6:.1f} million parameters, {comparison.batch} x {comparison.context} tokens a step, "
        f"bf16 autocast; {found.device_name}, {found.time_utc:%Y-%m-%d}",
        fontsize=10,
    )
    figure.savefig(path, format="png")
