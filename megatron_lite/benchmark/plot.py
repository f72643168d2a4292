"""Tokens a second against rows and GPUs, from reports of the decode command, as an image."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_lite.benchmark.table import OURS, Report, number
from megatron_lite.errors import ConfigError, DataError, OutputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curve = dict[int, float]
"""Rows, or GPUs -> tokens/s."""
Curves = dict[tuple[str, int], Curve]
"""(whose, GPUs) -> the curve over rows."""

FLOOR = "memory read once a step"
BEST = "others"
COLORS = {OURS: "#1f5fa8", FLOOR: "0.6", BEST: "0.3"}
OTHERS = ("#d1642b", "#8a6d1f", "#a03a6b", "#4c7a34", "#5b4a9c")
MARKERS = {1: "o", 2: "s", 4: "D", 8: "^"}
ROW_MARKERS = "osD^"


def curves_of(reports: Sequence[Report]) -> Curves:
    """Of all rows about decoding, and of the floor that ours is held against; where reports disagree the later one wins."""
    curves: Curves = defaultdict(dict)
    for report in reports:
        gpus = int(report.facts["gpus"])
        for row in report.rows:
            if row.what.startswith("decode") and row.rate and row.seconds and row.batch:
                curves[row.by, gpus][row.batch] = row.rate
                if row.by == OURS and row.floor:
                    curves[FLOOR, gpus][row.batch] = row.rate * row.seconds / row.floor
    if not curves:
        raise DataError("the reports hold no figures of decoding; give files that tools/benchmark.py decode wrote with --json")
    return {key: dict(sorted(curve.items())) for key, curve in sorted(curves.items(), key=lambda item: (item[0][0] != OURS, item[0]))}


def over_gpus(curves: Curves, whose: str, rows: int) -> Curve:
    """GPUs -> tokens/s of so many rows."""
    return dict(sorted((gpus, curve[rows]) for (by, gpus), curve in curves.items() if by == whose and rows in curve))


def draw(reports: Sequence[Report], path: Path) -> None:
    """Writes an image in the format that the name of the file asks for."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("an image needs the package matplotlib; run `pip install matplotlib`") from None
    curves = curves_of(reports)
    has_several = len({gpus for _, gpus in curves}) > 1
    figure = Figure(figsize=(12 if has_several else 7, 5.4), dpi=150, layout="constrained")
    panels = figure.subplots(1, 2 if has_several else 1, squeeze=False)[0]
    colors = COLORS | dict(zip(_others(curves), OTHERS * 9, strict=False))
    _by_rows(panels[0], curves, colors)
    if has_several:
        _by_gpus(panels[1], curves, colors)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3 if has_several else 2, frameon=False, fontsize=9)
    facts = reports[-1].facts
    figure.suptitle(f"{facts.get('model', 'decoding')}, context {facts.get('context', '?')}: tokens a second", x=0.01, ha="left", fontsize=12)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise OutputError(f"{path} cannot be written: {error}; name a file such as docs/decode.png in a folder that is there") from None


def _others(curves: Curves) -> list[str]:
    return list(dict.fromkeys(by for by, _ in curves if by not in (OURS, FLOOR)))


def _by_rows(axes: "Axes", curves: Curves, colors: dict[str, str]) -> None:
    ends: list[End] = []
    named: set[str] = set()
    for (by, gpus), curve in curves.items():
        _line(axes, curve, by, colors[by], MARKERS.get(gpus, "v"), None if by in named else by)
        named.add(by)
        if by == OURS:
            ends.append(End(curve, f"{gpus} GPU{'s' if gpus > 1 else ''}", COLORS[OURS]))
    _dress(axes, "rows that share a step (circles: 1 GPU, squares: 2, diamonds: 4)", sorted({rows for curve in curves.values() for rows in curve}))
    _name_ends(axes, ends)


def _by_gpus(axes: "Axes", curves: Curves, colors: dict[str, str]) -> None:
    """Of others only the best way at each place: it is the one to beat."""
    ends: list[End] = []
    shown = sorted({rows for (by, _), curve in curves.items() if by == OURS for rows in curve})
    for place, rows in enumerate(shown):
        name, marker = f"{rows} row{'s' if rows > 1 else ''}", ROW_MARKERS[place % len(ROW_MARKERS)]
        for by in (OURS, FLOOR):
            _line(axes, over_gpus(curves, by, rows), by, colors[by], marker, None)
        _line(axes, best_of_others(curves, rows), BEST, colors[BEST], marker, None)
        ends += [End(over_gpus(curves, OURS, rows), name, colors[OURS]), End(best_of_others(curves, rows), f"{name}, others", colors[BEST])]
    _dress(axes, "GPUs (others: their fastest way)", sorted({gpus for _, gpus in curves}))
    _name_ends(axes, ends)


def best_of_others(curves: Curves, rows: int) -> Curve:
    found = [over_gpus(curves, by, rows) for by in _others(curves) if not by.startswith(OURS)]  # our plain path is no other
    return {gpus: max(curve[gpus] for curve in found if gpus in curve) for gpus in sorted(set().union(*found))}


def _line(axes: "Axes", curve: Curve, by: str, color: str, marker: str, label: str | None) -> None:
    style = {OURS: ("-", 2.0, 6), FLOOR: (":", 1.2, 0)}.get(by, ("--", 1.2, 5))
    axes.plot(list(curve), list(curve.values()), color=color, linestyle=style[0], linewidth=style[1], marker=marker, markersize=style[2], label=label)


@dataclass(frozen=True)
class End:
    """The right end of a line, and what is written beside it."""

    curve: Curve
    name: str
    color: str

    @property
    def value(self) -> float:
        return list(self.curve.values())[-1]


def _name_ends(axes: "Axes", ends: Sequence[End]) -> None:
    """What the lines are, and their last figures; names that would lie on each other are moved apart."""
    low, high = axes.get_ylim()
    least = (high / low) ** 0.036
    height = 0.0
    for end in sorted((end for end in ends if end.curve), key=lambda end: end.value):
        height = max(end.value, height * least)
        text = f"{end.name}: {_short(end.value)}"
        place = {"xytext": (8, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(text, (max(end.curve), height), **place, fontsize=9, color=end.color, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5})


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 20 else number(value).removesuffix(".0")


def _dress(axes: "Axes", title: str, places: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(places, [str(place) for place in places])
    axes.minorticks_off()
    axes.set_xlim(places[0] / 1.15, places[-1] * (places[-1] / places[0]) ** 0.27 * 1.1)
    axes.set_xlabel(title)
    axes.set_ylabel("tokens/s")
    axes.yaxis.set_major_formatter(lambda value, place: _short(value))
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
