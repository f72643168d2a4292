"""Launchers in processes of their own, for the tests of how jobs run and end: forked, so that each need not import torch again."""

import os
import pty
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import NoReturn, Protocol

from launcher.job import Job
from launcher.spawn import new_log_folder, spawn

import_module("launcher.agent")  # imports torch here, once, instead of in every launcher that is forked below

ROOT = Path(__file__).parents[1]

SCRIPT = """
import os, signal, sys, time
from pathlib import Path
sys.path.append({root!r})
from launcher.worker import work
from megatron_lite.errors import DataError

rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

def neighbours(wait=20.0):
    "Ends when every rank is here, as far as the file system shows."
    Path(f"here{{rank}}-{{os.getpid()}}").touch()
    until = time.monotonic() + wait
    while len(list(Path().glob("here*"))) < world and time.monotonic() < until:
        time.sleep(0.01)

{head}

def main(command):
    neighbours()
{body}

work(main, script="generate")
"""


@dataclass
class Launcher:
    """A launcher in a process of its own, its terminal or streams, and the folder it works in."""

    pid: int
    folder: Path
    terminal: int | None = None

    @property
    def workers(self) -> dict[int, int]:
        return {int(rank[4:]): int(pid) for rank, pid in (path.name.split("-") for path in self.folder.glob("here*"))}

    def until_started(self, processes: int) -> None:
        wait_until(lambda: len(self.workers) == processes)

    def end(self, seconds: float = 20) -> int:
        """The exit code as a shell would see it."""
        statuses: list[int] = []

        def ended() -> bool:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            statuses.append(status)
            return pid != 0

        wait_until(ended, seconds)
        code = os.waitstatus_to_exitcode(statuses[-1])
        return code if code >= 0 else 128 - code

    def output(self) -> str:
        return (self.folder / "out").read_bytes().decode()

    def errors(self) -> str:
        return (self.folder / "err").read_bytes().decode()

    def log(self, rank: int) -> str:
        return next(self.folder.glob(f"logs/*/rank{rank}.log")).read_text()

    def type(self, keys: bytes) -> None:
        assert self.terminal is not None
        os.write(self.terminal, keys)

    def read_terminal(self, until: str) -> str:
        assert self.terminal is not None
        text = ""
        while until not in text:
            text += os.read(self.terminal, 4096).decode()
        return text


def wait_until(true: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"did not happen within {seconds} s"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # gone before it was opened, or before it was read
        return False


class Launch(Protocol):
    def __call__(self, body: str, processes: int = 2, *words: str, head: str = "", terminal: bool = False, name: str = "generate") -> Launcher: ...


@contextmanager
def launchers(folder: Path) -> Iterator[Launch]:
    """Starts a launcher of a script with this body of main on so many processes; ends what is left of it afterwards."""
    started: list[Launcher] = []

    def start(body: str, processes: int = 2, *words: str, head: str = "", terminal: bool = False, name: str = "generate") -> Launcher:
        script = folder / "script.py"
        script.write_text(SCRIPT.format(root=str(ROOT), head=head, body="\n".join("    " + line for line in body.splitlines())))
        (folder / "c.yml").touch()
        pid, fd = pty.fork() if terminal else (os.fork(), None)
        if pid == 0:
            run(script, processes, words, folder, terminal, name)
        started.append(Launcher(pid, folder, fd))
        return started[-1]

    yield start
    for launcher in started:
        for pid in (launcher.pid, *launcher.workers.values()):
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
        if launcher.terminal is not None:
            os.close(launcher.terminal)


def run(script: Path, processes: int, words: tuple[str, ...], folder: Path, terminal: bool, name: str) -> NoReturn:
    """What a forked launcher does instead of going on as a copy of pytest."""
    code = 99
    try:
        os.chdir(folder)
        if not terminal:
            for stream, file in ((0, os.devnull), (1, "out"), (2, "err")):
                os.dup2(os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND), stream)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        code = spawn(Job(name, script, ("c.yml", *words), processes, new_log_folder(name, Path("logs"))))
    finally:
        os._exit(code)
