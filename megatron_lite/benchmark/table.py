"""What was measured, as records, as one table of text, and as JSON."""

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import compress
from pathlib import Path

import torch

from megatron_lite.errors import DataError, OutputError

OURS = "deepy"
COLUMNS = ("what", "by", "rate", "time", "floor", "of floor", "deepy is", "")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure. `floor` are the seconds that it takes at least on this machine, by ceilings of the same run."""

    what: str
    by: str
    rate: float | None = None
    unit: str = ""
    seconds: float | None = None
    floor: float | None = None
    batch: int | None = None
    note: str = ""

    @property
    def sentence(self) -> str:
        """The figure for a log."""
        figures = [self.rate_told, duration(self.seconds) if self.seconds is not None else "", self.note]
        return f"{self.what}, {self.by}: {'; '.join(filter(None, figures))}"

    @property
    def rate_told(self) -> str:
        return f"{number(self.rate)} {self.unit}" if self.rate is not None else ""


@dataclass(frozen=True, kw_only=True)
class Report:
    """The figures of one command. `facts` say what was measured, and where."""

    command: str
    facts: Mapping[str, str | int]
    rows: Sequence[Row]

    def as_text(self) -> str:
        facts = [f"{name}: {value}" for name, value in self.facts.items() if name != "gpus"]
        return "\n".join([*facts, "", *_aligned([COLUMNS, *(self._cells(row) for row in self.rows)])])

    def _cells(self, row: Row) -> tuple[str, ...]:
        return (
            row.what,
            row.by,
            row.rate_told,
            duration(row.seconds) if row.seconds is not None else "",
            duration(row.floor) if row.floor is not None else "",
            f"{row.floor / row.seconds:.1%}" if row.floor is not None and row.seconds else "",
            self._comparison(row),
            row.note,
        )

    def _comparison(self, row: Row) -> str:
        """How many times as fast ours is, beside the figure of another for the same."""
        ours = next((each for each in self.rows if each.by == OURS and (each.what, each.unit) == (row.what, row.unit)), None)
        if ours is None or ours is row or not ours.rate or not row.rate:
            return ""
        return f"{ours.rate / row.rate:.2f} x as fast"


def number(value: float) -> str:
    """With the digits that a measurement has."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.3g}"


def duration(seconds: float) -> str:
    for size, unit in ((1, "s"), (1e-3, "ms")):
        if seconds >= size:
            return f"{seconds / size:.4g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Numbers to the right, words to the left; columns that hold nothing are left out."""
    used = [any(cells[place] for cells in table[1:]) for place in range(len(COLUMNS))]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for cells in table:
        sides = [cell.rjust(width) if 2 <= place <= 5 else cell.ljust(width) for place, (cell, width) in enumerate(zip(cells, widths, strict=True))]
        lines.append("  ".join(compress(sides, used)).rstrip())
    return lines


def machine_facts(gpus: int) -> dict[str, str | int]:
    """Hardware and versions, as a reader needs them to repeat a figure."""
    where = f"{gpus} x {torch.cuda.get_device_name()}, driver {_driver()}" if torch.cuda.is_available() else f"CPU, {gpus} process(es), {os.cpu_count()} cores"
    packages = [f"{name} {found}" for name in ("torch", "triton", "transformers", "accelerate") if (found := _version(name))]
    return {"machine": where, "versions": ", ".join([f"Python {platform.python_version()}", *packages]), "gpus": gpus}


def _driver() -> str:
    question = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(question, capture_output=True, text=True, timeout=20, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def _version(name: str) -> str:
    if name == "torch":
        return torch.__version__
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def write_report(report: Report, path: Path) -> None:
    try:
        path.write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}; choose another file with --json") from None


def read_report(path: Path) -> Report:
    """What write_report wrote; raises DataError for another file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Report(command=content["command"], facts=content["facts"], rows=[Row(**row) for row in content["rows"]])
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; give files that tools/benchmark.py wrote with --json") from None
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path} is no report of this benchmark; give files that tools/benchmark.py wrote with --json") from None
