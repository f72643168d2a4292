"""Watches the node programs of several hosts: the end of one is the end of all, and the first failure is told last."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from launcher.failure import tail

GRACE = 8.0  # seconds that hosts have to end their processes
ECHO = 1.5  # seconds in which other hosts that fail too will have failed
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Node:
    """A node program, on one host or (srun, mpirun) on all. What it says is in `log`; None stands for the terminal."""

    name: str
    process: "subprocess.Popen[bytes]"
    log: Path | None = None

    def end(self) -> None:
        """Asks it to end: over ssh by closing its standard input, on this host by a signal."""
        with suppress(OSError):
            if self.process.stdin:
                self.process.stdin.close()
            else:
                self.process.terminate()

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    @property
    def has_failed(self) -> bool:
        return self.process.poll() not in (None, 0)


class _StopError(Exception):
    """A signal that asks us to end."""

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number)


def watch(nodes: Sequence[Node], *, logs: Path) -> int:
    """Waits for all of them and returns the exit code of the whole."""
    try:
        with _signals():
            failed = _first_failures(nodes)
    except _StopError as stopped:
        _end(nodes)
        print(f"stopped by {stopped.signal.name}; logs: {logs}", file=sys.stderr)
        return 128 + stopped.signal
    _end(nodes)
    if not failed:
        return 0
    codes = [node.process.returncode for node in failed]
    told = any(node.log is None and node.process.returncode == 2 for node in failed)
    for node in failed:
        if node.log and not told:  # a UserError on the terminal is the same sentence on the other hosts
            print(f"{node.name}: {tail(node.log.read_text(encoding='utf-8', errors='replace').strip())}", file=sys.stderr)
    return codes[0] if codes[0] > 0 else 128 - codes[0]


def _first_failures(nodes: Sequence[Node]) -> list[Node]:
    """Those that failed on their own, once one did; none when all have ended well."""
    while any(node.is_running for node in nodes) and not any(node.has_failed for node in nodes):
        time.sleep(0.1)
    until = time.monotonic() + ECHO
    while any(node.is_running for node in nodes) and time.monotonic() < until:
        time.sleep(0.1)
    return [node for node in nodes if node.has_failed]


def _end(nodes: Sequence[Node]) -> None:
    for node in nodes:
        node.end()
    until = time.monotonic() + GRACE
    for node in nodes:
        try:
            node.process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            node.process.kill()
            node.process.wait()


@contextmanager
def _signals() -> Iterator[None]:
    """Signals that ask us to end, as an exception."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise _StopError(number)

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
