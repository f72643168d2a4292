"""Loss and throughput of runs as an image."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_lite.errors import ConfigError, OutputError
from megatron_lite.metrics.curves import Curve, Run, curves_named, number, span

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRAIN, VALIDATION, SPEED = "train/lm_loss", "validation/lm_loss", "runtime/tokens_per_sec"
MANY = 200
"""Points from which on a curve is also drawn smoothed."""


def draw(runs: Sequence[Run], path: Path) -> None:
    """Writes an image in the format that the name of the file asks for."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("an image needs the package matplotlib; run `pip install matplotlib`, or leave out --output for charts in the terminal") from None
    figure = Figure(figsize=(12, 4.6), dpi=150, layout="constrained")
    loss, speed = figure.subplots(1, 2, width_ratios=[3, 2])
    for place, run in enumerate(runs):
        _draw_run(loss, speed, run, f"C{place % 10}")
    _dress(loss, "loss")
    _dress(speed, "tokens/s")
    loss.set_ylim(*_range(runs))
    speed.set_ylim(bottom=0)
    for axes, place in ((loss, "upper right"), (speed, "lower right")):
        if axes.get_legend_handles_labels()[1]:
            axes.legend(frameon=False, fontsize=9, loc=place)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise OutputError(f"{path} cannot be written: {error}; name a file such as curves.png in a folder that is there") from None


def _draw_run(loss: "Axes", speed: "Axes", run: Run, color: str) -> None:
    train, validation, rates = (run.curves.get(name, {}) for name in (TRAIN, VALIDATION, SPEED))
    if train:
        _line(loss, train, color, f"{run.name}: training, {number(_last(train))}")
    if validation:
        label = f"{run.name}: validation, {number(_last(validation))}"
        loss.plot(list(validation), list(validation.values()), color=color, marker="o", markersize=4, linestyle="--", linewidth=1, label=label)
    if rates:
        _line(speed, rates, color, f"{run.name}: {number(_last(rates))}")


def _line(axes: "Axes", curve: Curve, color: str, label: str) -> None:
    if len(curve) >= MANY:
        axes.plot(list(curve), list(curve.values()), color=color, linewidth=0.8, alpha=0.25)
        curve = smoothed(curve)
    axes.plot(list(curve), list(curve.values()), color=color, linewidth=1.8, label=label)


def smoothed(curve: Curve) -> Curve:
    """The means of each value and its neighbours, a fiftieth of all or fewer at the ends; few points stay as they are."""
    if len(curve) < MANY:
        return curve
    values = list(curve.values())
    reach = [min(at, len(values) - 1 - at, len(values) // 100) for at in range(len(values))]
    means = [sum(values[at - near : at + near + 1]) / (2 * near + 1) for at, near in enumerate(reach)]
    return dict(zip(curve, means, strict=True))


def _last(curve: Curve) -> float:
    return list(curve.values())[-1]


def _range(runs: Sequence[Run]) -> tuple[float, float]:
    low, high = span(curve for name in (TRAIN, VALIDATION) for curve in curves_named(runs, name).values())
    margin = 0.05 * (high - low) or 0.5
    return low - margin, high + margin


def _dress(axes: "Axes", title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("step")
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, place: number(value))
