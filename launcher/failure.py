"""How a process that failed tells the launcher why, so that it is told to the user once: elastic's error file, and the words made of it."""

import json
import os
import signal
import socket
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_lite.errors import UserError
from megatron_lite.whole import whole_file

TAIL = 12  # lines of a traceback or log that are worth a look before opening the file


@dataclass(frozen=True)
class Failure:
    """Why a process ended. `sentence` is there where a UserError was raised, `trace` where another exception was."""

    rank: int
    host: str
    time: float
    sentence: str | None
    trace: str | None


def failure_of(error: BaseException) -> Failure:
    known = isinstance(error, UserError)
    return Failure(
        rank=int(os.environ.get("RANK", "0")),
        host=socket.gethostname(),
        time=time.time(),
        sentence=str(error) if known else None,
        trace=None if known else "".join(traceback.format_exception(error)).rstrip("\n"),
    )


def record_failure(failure: Failure, path: Path) -> None:
    """Writes the file in the shape that elastic's agents (torchrun's too) read."""
    said = failure.sentence or _last_line(failure.trace or "")
    message = {"message": said, "extraInfo": {"py_callstack": failure.trace or said, "timestamp": str(int(failure.time))}}
    with whole_file(path) as file:  # an agent raises at half a file
        json.dump({"message": message, "deepy": asdict(failure)}, file)


def read_failure(path: Path) -> Failure | None:
    """What record_failure wrote, or None if the process left without a word."""
    if not path.is_file():
        return None
    return Failure(**json.loads(path.read_text(encoding="utf-8"))["deepy"])


def error_file(logs: Path, rank: int) -> Path:
    return logs / f"rank{rank}.error.json"


def log_file(logs: Path, rank: int) -> Path:
    return logs / f"rank{rank}.log"


def verdict(ends: Mapping[int, int], logs: Path) -> tuple[str, int]:
    """What to tell of the ranks that ended first, given their exit codes (negative: a signal), and the exit code for the whole job.

    When one process dies, its neighbours soon complain about a broken connection: so who left without a word is the cause, else who spoke first.
    """
    told = {rank: read_failure(error_file(logs, rank)) for rank in ends}
    rank = min(ends, key=lambda rank: failure.time if (failure := told[rank]) else 0.0)
    failure, code = told[rank], ends[rank]
    if failure is None:
        return _silent_end(rank, code, logs), 128 - code if code < 0 else code
    if failure.sentence is not None:
        return failure.sentence, 2
    trace = failure.trace or ""
    return f"{tail(trace)}\n\nrank {rank} on {failure.host} failed with {_last_line(trace)} (log: {log_file(logs, rank)})", 1


def _silent_end(rank: int, code: int, logs: Path) -> str:
    log = log_file(logs, rank)
    where = f"log: {log}" if log.is_file() else f"its output is above; logs of the others: {logs}"
    if code < 0:
        why = ", as the kernel does when memory runs out" if -code == signal.SIGKILL else ""
        return f"rank {rank} was killed by {signal.Signals(-code).name}{why} ({where})"
    last = tail(log.read_text(encoding="utf-8", errors="replace").rstrip("\n")) + "\n\n" if log.is_file() else ""
    return f"{last}rank {rank} ended with exit code {code} and left no error message ({where})"


def tail(text: str) -> str:
    """The last lines of a long text."""
    lines = text.split("\n")
    return "\n".join(lines if len(lines) <= TAIL else ["...", *lines[-TAIL:]])


def _last_line(trace: str) -> str:
    return trace.rpartition("\n")[2]
