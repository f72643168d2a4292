"""A job of one process on this host, which needs nobody to meet: watched without torch, whose import takes longer than everything else that happens here."""

import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from signal import SIGKILL, Signals, signal

from launcher.ends import failures
from launcher.failure import error_file, log_file
from launcher.job import Job
from launcher.worker import LOG
from megatron_lite.errors import INTERRUPTED

WATCH = 0.05  # seconds between looks at signals


def run_alone(job: Job, entrypoint: str, words: Sequence[str]) -> Mapping[int, int] | Signals:
    """Runs the job's only process. Returns its exit code where it failed, or the signal that ended it."""
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    told = {LOG: str(log_file(job.logs, 0)), "TORCHELASTIC_ERROR_FILE": str(error_file(job.logs, 0))}
    with _signals(job.signals) as received:
        # a group of its own: the terminal tells the launcher alone, and whatever the process leaves behind can be ended with it
        process = subprocess.Popen([entrypoint, *words], env={**os.environ, **place, **told}, start_new_session=True)
        try:
            while not received and _code(process, WATCH) is None:
                pass
            if received:
                _tell(process, received[0])
                if _code(process, job.grace) is None:
                    return received[0]
        finally:
            _tell(process, SIGKILL)
            process.wait()
        return _outcome(process.returncode, received)


def _outcome(code: int, received: Sequence[Signals]) -> Mapping[int, int] | Signals:
    """What became of it: what failed, else 75 where it has saved, nothing where it was done, else the signal."""
    if received and code not in {0, INTERRUPTED}:
        return failures({0: code}) or received[0]
    return {0: code} if code else {}


def _code(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """Its exit code, None where it runs for so many seconds more."""
    with suppress(subprocess.TimeoutExpired):
        return process.wait(seconds)
    return None


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
