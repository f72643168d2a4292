"""The curves in metrics.jsonl, of one run or several, and charts of them for a terminal."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from megatron_lite.errors import DataError
from megatron_lite.metrics.metrics import FILE

MARKS = "•○×+▲◇"
MARGIN = " " * 11
SETTLING = 30
"""The first so many-th part of a curve may leave the top of a chart."""
Curve = Mapping[int, float]
"""Step -> value."""


@dataclass(frozen=True)
class Run:
    """A run by its name, and its numbers: name of the metric -> curve."""

    name: str
    curves: Mapping[str, Curve]


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs in these folders or files, under names that tell them apart."""
    files = [path / FILE if path.is_dir() else path for path in paths]
    return [Run(name, read_curves(file)) for name, file in zip(_names(files), files, strict=True)]


def read_curves(path: Path) -> dict[str, dict[int, float]]:
    """The numbers of a file; of steps that were taken twice, after a stop, the later ones."""
    curves: dict[str, dict[int, float]] = {}
    for record in _records(path):
        step = record.pop("step", None)
        for name, value in record.items():
            if isinstance(step, int) and isinstance(value, int | float):
                curves.setdefault(name, {}).pop(step, None)
                curves[name][step] = float(value)
    curves.pop("time", None)
    if not curves:
        raise DataError(f"{path} holds no numbers of steps; a training writes them after its first log_interval steps")
    return {name: dict(sorted(curve.items())) for name, curve in curves.items()}


def _records(path: Path) -> Iterator[dict[str, object]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise DataError(f"{path} cannot be read: {reason}; name the folder of a training ({FILE} lies beside its checkpoints) or such a file") from None
    for number, line in enumerate(lines, start=1):
        try:
            yield dict(json.loads(line))
        except (ValueError, TypeError):
            if number < len(lines):  # of a killed run the last line may be half there
                raise DataError(f"{path} line {number} is no JSON object; it is not the {FILE} of a run") from None


def _names(files: Sequence[Path]) -> list[str]:
    """The shortest ends of the folders' paths that differ."""
    folders = [file.resolve().parent if file.name == FILE else file.resolve() for file in files]
    parts = 1
    while len({folder.parts[-parts:] for folder in folders}) < len(set(folders)):
        parts += 1
    return ["/".join(folder.parts[-parts:]) for folder in folders]


def curves_named(runs: Sequence[Run], metric: str) -> dict[str, Curve]:
    """The curve of each run that has it."""
    return {run.name: run.curves[metric] for run in runs if metric in run.curves}


def span(curves: Iterable[Curve]) -> tuple[float, float]:
    """From the lowest value to the highest but for the first steps of many, whose fall would leave the rest flat."""
    lists = [list(curve.values()) for curve in curves if curve]
    return min(map(min, lists), default=0.0), max((max(values[len(values) // SETTLING :]) for values in lists), default=1.0)


def chart(title: str, curves: Mapping[str, Curve], *, width: int = 78, height: int = 13) -> str:
    """Curves by the names of their runs, in characters: each run has its mark, a column shows the mean of its steps."""
    steps = [step for curve in curves.values() for step in curve]
    first, last = min(steps), max(steps)
    room = width - len(MARGIN)
    drawn = {mark: columns(curve, first, last, room) for mark, curve in zip(MARKS * len(curves), curves.values(), strict=False)}
    low, high = span(drawn.values())
    rows = [[" "] * room for _ in range(height)]
    for mark, line in drawn.items():
        for column, value in line.items():
            rows[round((high - min(value, high)) / ((high - low) or 1.0) * (height - 1))][column] = mark
    labels = {at: number(high - (high - low) * at / (height - 1)) for at in (0, height // 2, height - 1)}
    names = [f"{mark} {name} {number(list(curve.values())[-1])}" for mark, (name, curve) in zip(drawn, curves.items(), strict=True)]
    return "\n".join(
        [
            "   ".join([title, *names]),
            *(f"{labels.get(at, ''):>{len(MARGIN) - 2}} {'┤' if at in labels else '│'}{''.join(row)}".rstrip() for at, row in enumerate(rows)),
            f"{MARGIN[1:]}└{'─' * room}",
            f"{MARGIN}{first:<{room // 2},}{last:>{room - room // 2},}",
        ]
    )


def columns(curve: Curve, first: int, last: int, width: int) -> dict[int, float]:
    """Column -> mean of the values that fall into it, or what lies on the way from the one before to the one behind."""
    found: dict[int, list[float]] = {}
    for step, value in curve.items():
        found.setdefault((step - first) * (width - 1) // max(1, last - first), []).append(value)
    means = {column: sum(values) / len(values) for column, values in found.items()}
    for (left, start), (right, end) in pairwise(means.copy().items()):
        means |= {column: start + (end - start) * (column - left) / (right - left) for column in range(left + 1, right)}
    return dict(sorted(means.items()))


def number(value: float) -> str:
    """With four digits or, of large numbers, all those before the point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
