"""What an entry point such as generate.py runs in: its command line, its place among the processes, and how it ends."""

import contextlib
import ctypes
import faulthandler
import fcntl
import io
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from launcher.command import Command, parse_command
from launcher.failure import Failure, failure_of, record_failure
from launcher.place import fill_environment
from megatron_lite.errors import ConfigError, UserError

PARENT = "DEEPY_PARENT"  # process id of the launcher; tells a worker that deepy started it
LOG = "DEEPY_LOG"  # file for what this rank has to say
SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG in linux/prctl.h


def work(main: Callable[[Command], None], *, script: str) -> NoReturn:
    """Runs an entry point on the words of the command line and ends the process: code 0, 2 after a UserError, 1 after another exception."""
    code = 0
    try:
        die_with_launcher()
        take_streams()
        fill_environment()
        main(settled(parse_command(sys.argv[1:], script=script)))
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except Exception as error:
        tell(failure_of(error))
        code = 2 if isinstance(error, UserError) else 1
    if code:
        leave(code)
    sys.exit(0)


def die_with_launcher() -> None:
    """Asks the kernel to end this process when the launcher ends, however it ends. Does nothing in a process started by hand."""
    if PARENT not in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    expected = int(os.environ.get(PARENT, os.getppid()))
    ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != expected:  # it ended before we could ask
        os._exit(128 + signal.SIGKILL)


def take_streams() -> None:
    """Leaves the terminal's keyboard to rank 0, and makes what the others print arrive in their logs line by line."""
    faulthandler.enable()
    if os.environ.get("RANK", "0") == "0":
        return
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if PARENT in os.environ:
        for stream in (1, 2):  # the log was opened once for each: appending keeps one from overwriting the other
            fcntl.fcntl(stream, fcntl.F_SETFL, fcntl.fcntl(stream, fcntl.F_GETFL) | os.O_APPEND)
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(line_buffering=True)


def settled(command: Command) -> Command:
    """The command with a layout for as many processes as there are. deepy has settled that before it starts any; somebody else has not."""
    if PARENT in os.environ:
        return command
    if command.dry_run or command.hostfile:
        raise ConfigError(f"--dry-run and -H are for deepy: ./deepy.py {command.script}.py ...")
    from launcher.fit import fitted

    command, lines = fitted(command, int(os.environ.get("WORLD_SIZE", "1")))
    if os.environ.get("RANK", "0") == "0":
        for line in lines:
            print(line, file=sys.stderr)
    return command


def tell(failure: Failure) -> None:
    """Says what went wrong: to the launcher through a file if there is one, else to the user."""
    with contextlib.suppress(OSError):  # the disk may be full, which may be what went wrong
        if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
            record_failure(failure, Path(file))
        if log := os.environ.get(LOG):
            with Path(log).open("a", encoding="utf-8") as lines:
                print(failure.sentence or failure.trace, file=lines)
            return
    # Where all fail alike the first of them speaks for all: whoever started them ends the others meanwhile.
    if local := int(os.environ.get("LOCAL_RANK", "0")):
        time.sleep(1)
    with contextlib.suppress(OSError):
        print(f"rank {failure.rank}: " if local else "", failure.sentence or failure.trace, sep="", file=sys.stderr)


def give_up(error: UserError) -> NoReturn:
    """Says why and ends this process now, from any thread: the main one may be waiting for ever."""
    tell(failure_of(error))
    leave(2)


def leave(code: int) -> NoReturn:
    """Ends this process now; a communication library must not keep it waiting for neighbours that failed too."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)
