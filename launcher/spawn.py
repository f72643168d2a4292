"""Runs the processes of a job on this host, and says what became of them: nothing if all went well, else the first failure, last and once."""

import os
import signal
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from launcher.failure import verdict
from launcher.hardware import BUS
from launcher.job import Job
from launcher.worker import PARENT
from megatron_lite.errors import INTERRUPTED, OutputError

SAFE_PATH = ["-P"] if sys.version_info >= (3, 11) else []  # the script's folder stays off sys.path


def new_log_folder(name: str, parent: Path) -> Path:
    """A fresh folder named after the script and the time."""
    stamp = f"{name}-{time.strftime('%Y-%m-%d-%H%M%S')}"
    number = 1
    while True:
        try:
            return make_log_folder(parent / (stamp if number == 1 else f"{stamp}-{number}"))
        except FileExistsError:  # another job began in this second
            number += 1


def make_log_folder(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise
    except OSError as error:
        raise OutputError(f"the folder for logs {folder} cannot be made: {error.strerror}; set log_dir to a folder that can be written") from None
    return folder


def spawn(job: Job) -> int:
    """Runs a job to its end. Returns the exit code for the whole program, after the first failure was printed to stderr."""
    os.environ.update(job.environment)
    os.environ[PARENT] = str(os.getpid())
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // job.processes)))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its remarks about sockets help nobody
    os.environ.setdefault("CUDA_DEVICE_ORDER", BUS)
    if job.processes == 1 and job.meeting is None:
        from launcher.alone import run_alone as run
    else:
        from launcher.agent import run_agent as run

    hear_ctrl_c()
    with kept_terminal():
        ends = run(job, sys.executable, [*SAFE_PATH, str(job.script), *job.words])
    if isinstance(ends, signal.Signals):
        if job.meeting is None:  # else whoever started all hosts says it
            _say(f"stopped by {ends.name}; logs: {job.logs}")
        return 128 + ends
    if not ends or set(ends.values()) == {INTERRUPTED}:
        return next(iter(ends.values()), 0)
    words, code = verdict(ends, job.logs)
    _say(words)
    return code


def hear_ctrl_c() -> None:
    """Makes Ctrl-C an exception where it ended this process at once: from here on there are others to end, and things to tidy up."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _say(words: str) -> None:
    start = "\n" if sys.stderr.isatty() else ""  # a progress bar may have been cut off in its line
    print(start + words, file=sys.stderr, flush=True)


@contextmanager
def kept_terminal() -> Iterator[None]:
    """Gives the terminal back as it was: a process killed while it reads a line leaves it without echo."""
    before = termios.tcgetattr(0) if os.isatty(0) else None
    try:
        yield
    finally:
        with suppress(OSError):  # which is the answer in another session
            if before and os.tcgetpgrp(0) == os.getpgrp():  # in the background it is somebody else's
                termios.tcsetattr(0, termios.TCSADRAIN, before)
