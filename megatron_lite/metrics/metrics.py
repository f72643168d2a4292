"""Where numbers go: always to metrics.jsonl, and to Weights & Biases and TensorBoard where that is wanted. Others know only this interface."""

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from megatron_lite.config.sections import LoggingSection
from megatron_lite.errors import OutputError
from megatron_lite.log import logger
from megatron_lite.whole import whole_file

FILE = "metrics.jsonl"
CHUNK = 1 << 16


class Metrics(Protocol):
    def log(self, values: Mapping[str, float], *, step: int | None = None) -> None:
        """Reports numbers by name, such as train/lm_loss or eval/piqa_acc; steps do not go back."""
        ...

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[object]], *, step: int | None = None) -> None:
        """Reports a table, where there is somebody to look at tables."""
        ...

    def close(self) -> None: ...


class JsonLines:
    """Appends one line for every report: when, at which step, and the numbers."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            trim(path)
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise OutputError(f"{path} cannot be written: {error.strerror}; let save (or else log_dir) name a folder that can be written") from None

    def log(self, values: Mapping[str, float], *, step: int | None = None) -> None:
        at = {} if step is None else {"step": step}
        try:
            self._file.write(json.dumps({"time": round(time.time(), 3), **at, **values}) + "\n")
            self._file.flush()
        except OSError as error:
            raise OutputError(f"{self.path} cannot be written: {error.strerror}; free some space, and go on from the last checkpoint") from None

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[object]], *, step: int | None = None) -> None:
        """Nothing: a file of numbers is no place for it."""

    def close(self) -> None:
        with suppress(OSError):  # what could not be written has been told
            self._file.close()


def trim(path: Path) -> None:
    """Takes away the last line of a file if a killed run left it unfinished: what is appended to it would be lost with it."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        end = size = file.seek(0, os.SEEK_END)
        kept = 0
        while end and not kept:
            start = max(0, end - CHUNK)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            kept, end = (start + found + 1 if found >= 0 else 0), start
        if kept < size:
            file.truncate(kept)


def forget(path: Path, *, after: int) -> None:
    """Drops the lines of steps behind `after`, which are taken again. The file is the old one or the new one, whenever the machine goes down."""
    dropped = 0
    try:
        if not path.exists() or all(_step_of(line) <= after for line in _lines(path)):
            return
        with whole_file(path, errors="surrogateescape") as file:
            for line in _lines(path):
                behind = _step_of(line) > after
                dropped += behind
                file.write("" if behind else line)
    except OSError as error:
        raise OutputError(f"{path} cannot be written anew without its steps behind {after}: {error.strerror}; free some space, or move it away") from None
    logger.info(f"{path}: {dropped:,} {'line' if dropped == 1 else 'lines'} of steps behind {after} dropped, because they are taken again")


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8", errors="surrogateescape") as file:
        yield from file


def _step_of(line: str) -> int:
    """0 of a line without a step."""
    with suppress(ValueError, AttributeError):
        if isinstance(step := json.loads(line).get("step"), int):
            return step
    return 0


class Several:
    """Reports everything to each of its parts."""

    def __init__(self, parts: Sequence[Metrics]) -> None:
        self.parts = parts

    def log(self, values: Mapping[str, float], *, step: int | None = None) -> None:
        for part in self.parts:
            part.log(values, step=step)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[object]], *, step: int | None = None) -> None:
        for part in self.parts:
            part.table(name, columns, rows, step=step)

    def close(self) -> None:
        for part in self.parts:
            part.close()


@contextmanager
def open_metrics(section: LoggingSection, settings: Mapping[str, object], *, folder: Path, is_writer: bool, after: int | None = None) -> Iterator[Metrics]:
    """The places that the configuration asks for, on the writer; nowhere on the other ranks. `settings` is what a run is told to consist of, `after` the
    step that a training goes on from."""
    parts: list[Metrics] = []
    if is_writer:
        parts.append(JsonLines(folder / FILE))
        from megatron_lite.metrics.wandb import is_wanted, open_wandb

        if is_wanted(section):
            parts.append(open_wandb(section, settings))
        from megatron_lite.metrics.tensorboard import open_tensorboard

        if section.tensorboard_dir and (board := open_tensorboard(section.tensorboard_dir, after=after)):
            parts.append(board)
    metrics = Several(parts)
    try:
        yield metrics
    finally:
        metrics.close()
