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

from launcher.ends import failures, is_stopped
from launcher.failure import tail
from launcher.job import Job
from megatron_lite.errors import INTERRUPTED

MARGIN = 8.0  # seconds that hosts have to end beside those that their processes have
ECHO = 1.5  # seconds in which other hosts that fail too will have failed


@dataclass(frozen=True)
class Node:
    """A node program, on one host or (srun, mpirun) on all. What it says is in `log`; None stands for the terminal. `stop` asks it to end."""

    name: str
    process: "subprocess.Popen[bytes]"
    log: Path | None = None
    stop: signal.Signals = signal.SIGTERM

    def end(self) -> None:
        """Asks it to end: over ssh by closing its standard input, on this host by a signal."""
        with suppress(OSError):
            if self.process.stdin:
                self.process.stdin.close()
            else:
                self.process.send_signal(self.stop)

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    @property
    def has_failed(self) -> bool:
        return self.process.poll() not in (None, 0)

    @property
    def code(self) -> int:
        """The exit code as a shell would see it, of one that has ended."""
        code = self.process.returncode
        return code if code >= 0 else 128 - code


class _StopError(Exception):
    """A signal that asks us to end."""

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number)


def watch(nodes: Sequence[Node], job: Job) -> int:
    """Waits for all of them and returns the exit code of the whole."""
    stopped: signal.Signals | None = None
    with _signals(job):
        try:
            failed = _first_failures(nodes)
        except _StopError as received:
            failed, stopped = [], received.signal
            for number in map(_number, job.signals):  # whoever repeats himself does not end us while hosts save; Ctrl-C does
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_IGN)
        failed = [node for node in failed if node.code != INTERRUPTED]  # one that was asked to stop and has saved
        failed_then = _end(nodes, MARGIN if failed else MARGIN + job.grace)
    failed = failed or failed_then
    if not failed and any(node.code == INTERRUPTED for node in nodes):
        return INTERRUPTED
    if not failed and stopped and any(node.code for node in nodes):
        print(f"stopped by {stopped.name}; logs: {job.logs}", file=sys.stderr)
        return 128 + stopped
    _tell(failed)
    return failed[0].code if failed else 0


def _tell(failed: Sequence[Node]) -> None:
    """Says what other hosts said. A UserError on the terminal is the same sentence on the other hosts."""
    if not any(node.log is None and node.code == 2 for node in failed):
        for node in failed:
            if node.log:
                print(f"{node.name}: {tail(node.log.read_text(encoding='utf-8', errors='replace').strip())}", file=sys.stderr)


def _first_failures(nodes: Sequence[Node]) -> list[Node]:
    """Those that failed on their own, once one did; none when all have ended well."""
    while any(node.is_running for node in nodes) and not any(node.has_failed for node in nodes):
        time.sleep(0.1)
    until = time.monotonic() + ECHO
    while any(node.is_running for node in nodes) and time.monotonic() < until:
        time.sleep(0.1)
    return [node for node in nodes if node.has_failed]


def _end(nodes: Sequence[Node], grace: float) -> list[Node]:
    """Asks all to end, and ends those that do not within the time; which is little once one has ended without a save, for others may wait for it.

    Returns those that failed before that.
    """
    for node in nodes:
        node.end()
    until, is_hurried = time.monotonic() + grace, False
    while any(node.is_running for node in nodes) and time.monotonic() < until:
        codes = _codes(nodes)
        if not is_hurried and (failures(codes) or is_stopped(codes)):
            until, is_hurried = min(until, time.monotonic() + MARGIN), True
        time.sleep(0.1)
    failed = [nodes[number] for number in failures(_codes(nodes))]
    for node in nodes:
        if node.is_running:
            node.process.kill()
        node.process.wait()
    return failed


def _codes(nodes: Sequence[Node]) -> dict[int, int | None]:
    return {number: node.process.poll() for number, node in enumerate(nodes)}


def _number(name: str) -> signal.Signals:
    return signal.Signals[name]


@contextmanager
def _signals(job: Job) -> Iterator[None]:
    """Signals that ask us to end, as an exception."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise _StopError(number)

    before = {number: signal.signal(number, stop) for number in map(_number, job.signals)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
