"""How far long work has come: a bar on a terminal, a line every ten seconds in a log; and text that stands above the bar."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

from megatron_lite.log import logger

Advance = Callable[[int], object]
"""Called with the size of every piece that is done."""

PAUSE = 10.0
"""Seconds between two lines of a log."""


@contextmanager
def progress(title: str, total: int, *, unit: str = "B", shown: bool = True) -> Iterator[Advance]:
    """Reports what it is told until `total` is reached: how much, how fast, and the time that is left. Units other than bytes are named in full."""
    if not shown:
        yield lambda count: None
    elif sys.stderr.isatty():
        name = unit if unit == "B" else f" {unit}"
        width = os.get_terminal_size(sys.stderr.fileno()).columns or 80  # a container's terminal may not know its size, and tqdm then shows nothing
        with tqdm(total=total, desc=title, unit=name, unit_scale=unit == "B", ncols=width, nrows=20, leave=False, mininterval=0.2) as bar:
            yield bar.update
    else:
        yield _Lines(title, total, unit).advance


class _Lines:
    """Progress for logs, which cannot draw a bar."""

    def __init__(self, title: str, total: int, unit: str) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done = 0
        self.started = self.spoke = time.monotonic()

    def advance(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.spoke < PAUSE or not self.done:
            return
        self.spoke = now
        rate = self.done / (now - self.started)
        left = (self.total - self.done) / rate
        if self.unit == "B":
            logger.info(f"{self.title}: {self.done / 1e9:.2f} of {self.total / 1e9:.2f} GB, {rate / 1e9:.2f} GB/s, {left:.0f} s left")
        else:
            logger.info(f"{self.title}: {self.done} of {self.total} {self.unit}, {rate:.3g} {self.unit}/s, {left:.0f} s left")


def say(text: str) -> None:
    """Prints a paragraph above the bar. A reader that went away (`| head`) does not end the work."""
    try:
        tqdm.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
