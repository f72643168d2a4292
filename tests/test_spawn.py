"""One process per device through elastic's agent: what reaches the terminal, how a job ends, and that nothing of it stays behind."""

import os
import pty
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import NoReturn, Protocol

import pytest

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
    except FileNotFoundError:
        return False


class Launch(Protocol):
    def __call__(self, body: str, processes: int = 2, *words: str, head: str = "", terminal: bool = False) -> Launcher: ...


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """Starts a launcher of a script with this body of main on so many processes; ends what is left of it afterwards."""
    started: list[Launcher] = []

    def start(body: str, processes: int = 2, *words: str, head: str = "", terminal: bool = False) -> Launcher:
        script = tmp_path / "script.py"
        script.write_text(SCRIPT.format(root=str(ROOT), head=head, body="\n".join("    " + line for line in body.splitlines())))
        (tmp_path / "c.yml").touch()
        pid, fd = pty.fork() if terminal else (os.fork(), None)
        if pid == 0:
            run(script, processes, words, tmp_path, terminal)
        started.append(Launcher(pid, tmp_path, fd))
        return started[-1]

    yield start
    for launcher in started:
        for pid in (launcher.pid, *launcher.workers.values()):
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
        if launcher.terminal is not None:
            os.close(launcher.terminal)


def run(script: Path, processes: int, words: tuple[str, ...], folder: Path, terminal: bool) -> NoReturn:
    """What a forked launcher does instead of going on as a copy of pytest."""
    code = 99
    try:
        os.chdir(folder)
        if not terminal:
            for stream, name in ((0, os.devnull), (1, "out"), (2, "err")):
                os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND), stream)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        code = spawn(Job("generate", script, ("c.yml", *words), processes, new_log_folder("generate", Path("logs"))))
    finally:
        os._exit(code)


def test_rank_0_speaks_on_the_terminal_and_the_others_into_their_logs(launch: Launch) -> None:
    launcher = launch("print('out', rank)\nprint('err', rank, file=sys.stderr)\nprint('more', rank)", 2)
    assert launcher.end() == 0
    assert launcher.output() == "out 0\nmore 0\n"
    assert launcher.errors() == "err 0\n"
    assert launcher.log(1) == "out 1\nerr 1\nmore 1\n"


def test_every_worker_knows_its_place_and_shares_the_cores(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    launcher = launch("print(*(os.environ[k] for k in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'OMP_NUM_THREADS')), sys.argv[1:])", 2, "top_k=3")
    assert launcher.end() == 0
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert launcher.output() == f"0 2 0 {threads} ['c.yml', 'top_k=3']\n"
    assert launcher.log(1) == f"1 2 1 {threads} ['c.yml', 'top_k=3']\n"


def test_a_user_error_in_every_worker_is_one_sentence_and_exit_code_2(launch: Launch) -> None:
    launcher = launch("raise DataError('prompts.txt is empty; write a prompt')", 3)
    assert launcher.end() == 2
    assert launcher.errors() == "prompts.txt is empty; write a prompt\n"


def test_a_user_error_in_one_worker_ends_the_others(launch: Launch) -> None:
    launcher = launch("if rank == 1: raise DataError('prompts.txt is empty; write a prompt')\ntime.sleep(60)", 3)
    assert launcher.end(10) == 2
    assert launcher.errors() == "prompts.txt is empty; write a prompt\n"


def test_an_exception_is_told_once_with_rank_host_and_log(launch: Launch) -> None:
    launcher = launch("if rank == 1: raise ValueError('shapes differ')\ntime.sleep(60)")
    assert launcher.end(10) == 1
    log = next(launcher.folder.glob("logs/*/rank1.log")).relative_to(launcher.folder)
    assert launcher.errors().count("Traceback") == 1
    assert launcher.errors().endswith(f"\nrank 1 on {os.uname().nodename} failed with ValueError: shapes differ (log: {log})\n")
    assert "shapes differ" in launcher.log(1)


def test_the_first_exception_is_told_and_not_those_that_follow_from_it(launch: Launch) -> None:
    body = """while rank != 2 and not list(Path().glob('logs/*/rank2.error.json')): pass
what = ['follows', 'follows', 'cause'][rank]
raise ValueError(what)"""
    launcher = launch(body, 3)
    assert launcher.end(10) == 1
    assert launcher.errors().splitlines()[-1].startswith("rank 2 on ")
    assert "follows" not in launcher.errors()


def test_a_long_traceback_is_cut_on_the_terminal_and_whole_in_the_log(launch: Launch) -> None:
    launcher = launch("def deeper(n):\n    if n: deeper(n - 1) or None\n    else: raise ValueError('deep')\ndeeper(3) if rank == 0 else time.sleep(60)")
    assert launcher.end(10) == 1
    assert launcher.errors().startswith("...\n")
    assert len(launcher.errors().splitlines()) < 20
    assert launcher.log(0).startswith("Traceback (most recent call last):")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_killed_with_sigkill_ends_the_job_and_is_named(launch: Launch, rank: int) -> None:
    launcher = launch("while os.getppid(): time.sleep(0.01)", 3)
    launcher.until_started(3)
    os.kill(launcher.workers[rank], signal.SIGKILL)
    assert launcher.end(10) == 137
    assert f"rank {rank} was killed by SIGKILL" in launcher.errors().splitlines()[-1]
    assert not any(alive(pid) for pid in launcher.workers.values())


def test_a_killed_rank_is_named_although_its_neighbours_complain_first(launch: Launch) -> None:
    body = """if rank == 1: os.kill(os.getpid(), signal.SIGKILL)
pid = next(Path().glob('here1-*')).name.partition('-')[2]
while ') Z' not in Path(f'/proc/{pid}/stat').read_text(): pass
raise ConnectionError('Connection closed by peer')"""
    launcher = launch(body, 3)
    assert launcher.end(10) == 137
    assert "rank 1 was killed by SIGKILL" in launcher.errors()
    assert "Connection closed" not in launcher.errors()


def test_a_worker_deaf_to_sigterm_does_not_hold_up_the_end(launch: Launch) -> None:
    launcher = launch("signal.signal(signal.SIGTERM, signal.SIG_IGN)\nif rank == 1: time.sleep(0.3); os._exit(7)\ntime.sleep(60)")
    assert launcher.end(10) == 7
    assert "rank 1 ended with exit code 7 and left no error message" in launcher.errors()


def test_where_the_disk_is_full_the_reason_is_told_on_the_terminal(launch: Launch) -> None:
    head = "os.environ['TORCHELASTIC_ERROR_FILE'] = '/proc/no/error.json'"  # stands for a disk that takes no file
    launcher = launch("if rank == 0: raise DataError('out.txt: No space left on device')\ntime.sleep(60)", head=head)
    assert launcher.end(10) == 2
    assert launcher.errors().startswith("out.txt: No space left on device\nrank 0 ended with exit code 2")


def test_a_script_that_does_not_even_start_shows_its_log(launch: Launch) -> None:
    launcher = launch("time.sleep(60)", head="if rank == 1: import no_such_thing")
    assert launcher.end(10) == 1
    assert "No module named 'no_such_thing'\n\nrank 1 ended with exit code 1" in launcher.errors()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_reaches_every_process_and_ends_the_job(launch: Launch, number: signal.Signals) -> None:
    launcher = launch("time.sleep(60)", 3)
    launcher.until_started(3)
    os.kill(launcher.pid, number)
    assert launcher.end(10) == 128 + number
    assert launcher.errors().startswith(f"stopped by {number.name}; logs: logs/generate-")
    assert "Traceback" not in launcher.errors()
    assert not any(alive(pid) for pid in launcher.workers.values())


def test_no_process_outlives_a_launcher_killed_with_sigkill(launch: Launch) -> None:
    launcher = launch("time.sleep(60)", 3)
    launcher.until_started(3)
    os.kill(launcher.pid, signal.SIGKILL)
    assert launcher.end() == 137
    wait_until(lambda: not any(alive(pid) for pid in launcher.workers.values()), seconds=5)


def test_a_worker_that_starts_after_its_launcher_ended_ends_too(launch: Launch, tmp_path: Path) -> None:
    script = tmp_path / "late.py"
    script.write_text(f"import sys\nsys.path.append({str(ROOT)!r})\nfrom launcher.worker import die_with_launcher\ndie_with_launcher()\nprint('still here')")
    pid = os.fork()
    if pid == 0:
        os.environ["DEEPY_PARENT"] = "1"  # not the process that starts it
        os.execv(sys.executable, [sys.executable, str(script)])
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 137


def test_rank_0_alone_reads_the_terminal(launch: Launch) -> None:
    launcher = launch("said = sys.stdin.readline()\nprint('rank', rank, 'heard', repr(said), sys.stdin.isatty())\nsys.stdin.read()", 2, terminal=True)
    launcher.until_started(2)
    launcher.type(b"Once upon a time\n")
    assert "rank 0 heard 'Once upon a time\\n' True" in launcher.read_terminal("True")
    launcher.type(b"\x04")  # Ctrl-D
    assert launcher.end(10) == 0
    assert launcher.log(1) == "rank 1 heard '' False\n"


def test_ctrl_c_on_the_terminal_ends_the_job(launch: Launch) -> None:
    launcher = launch("print('ready') or time.sleep(60)", 2, terminal=True)
    launcher.read_terminal("ready")
    launcher.type(b"\x03")
    launcher.read_terminal("stopped by SIGINT")
    assert launcher.end(10) == 130


def test_a_progress_bar_keeps_its_carriage_returns(launch: Launch) -> None:
    launcher = launch("print(f'\\r10%\\r20%', end='', flush=True)", 2)
    assert launcher.end() == 0
    assert launcher.output() == "\r10%\r20%"


def test_a_library_named_like_a_script_is_not_shadowed_by_it(launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "site" / "evaluate").mkdir(parents=True)
    (tmp_path / "site" / "evaluate" / "__init__.py").write_text("name = 'the library'")
    (tmp_path / "evaluate.py").write_text("name = 'the script'")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    launcher = launch("import evaluate\nprint(evaluate.name)", 2)
    assert launcher.end() == 0
    assert launcher.output() == "the library\n"


def test_two_jobs_at_once_on_one_machine_do_not_meet(launch: Launch) -> None:
    first, second = launch("print(os.environ['MASTER_PORT'])", 1), launch("print(os.environ['MASTER_PORT'])", 1)
    assert (first.end(), second.end()) == (0, 0)
    assert len(set(first.output().split())) == 2
    assert len(list(first.folder.glob("logs/*"))) == 2
