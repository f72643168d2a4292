"""A job of one process on this host, which needs nobody to meet: watched without torch, whose import takes longer than everything else that happens here."""

import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from signal import SIGKILL, SIGTERM, Signals, signal

from launcher.ends import failures, stopped
from launcher.failure import error_file, log_file
from launcher.job import Job
from launcher.worker import LOG

WATCH = 0.05  # seconds between looks at the process and at signals


def run_alone(job: Job, entrypoint: str, words: Sequence[str]) -> Mapping[int, int] | Signals:
    """Runs the job's only process. Returns its exit code where it failed, or the signal that ended it."""
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    told = {LOG: str(log_file(job.logs, 0)), "TORCHELASTIC_ERROR_FILE": str(error_file(job.logs, 0))}
    with _signals(job.signals) as received:
        # a group of its own: the terminal tells the launcher alone, and what the process has started is ended with it
        process = subprocess.Popen([entrypoint, *words], env={**os.environ, **place, **told}, start_new_session=True)
        try:
            code = _ended(process, received, job.grace)
        finally:
            _tell(process, SIGKILL)
            process.wait()
        if code is None or not received:
            return received[0] if received else {0: code} if code else {}
        return failures({0: code}) or stopped({0: code}, received[0])


def _ended(process: subprocess.Popen[bytes], received: Sequence[Signals], grace: float) -> int | None:
    """Its exit code; None where it was asked to stop and took too long, or somebody who asked three times does not want to wait."""
    told, until = 0, float("inf")
    while (code := process.poll()) is None and time.monotonic() < until:
        if len(received) > told:
            if told == 2:
                return None
            _tell(process, SIGTERM if told else received[0])  # which also ends what does not come to hear Ctrl-C
            told, until = told + 1, time.monotonic() + grace
        time.sleep(WATCH)
    return code


def _tell(process: subprocess.Popen[bytes], number: Signals) -> None:
    """Sends a signal to the process, if it still runs, and to what it has started."""
    if process.poll() is None:
        os.killpg(process.pid, number)


@contextmanager
def _signals(names: Sequence[str]) -> Iterator[list[Signals]]:
    """The signals with these names that come meanwhile."""
    received: list[Signals] = []
    before = {number: signal(number, lambda number, frame: received.append(Signals(number))) for number in (Signals[name] for name in names)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal(number, handler)
