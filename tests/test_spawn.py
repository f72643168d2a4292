"""How a job of several processes ends: which failure is told, that signals reach everybody, and that nobody stays behind."""

import os
import signal
import sys
from pathlib import Path

import pytest

from launcher import agent
from tests.launching import ROOT, Launch, alive, wait_until


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


def test_a_failure_that_elastic_sees_before_we_do_is_one_all_the_same(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process may end between our look and elastic's: here our looks see nothing, in the launcher that is forked from this process."""
    monkeypatch.setattr(agent, "_exit_code", lambda pid: 0)
    launcher = launch("if rank == 1: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)")
    assert launcher.end(10) == 137
    assert "rank 1 was killed by SIGKILL" in launcher.errors().splitlines()[-1]


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


@pytest.mark.parametrize(("set_by_user", "seen"), [(None, "PCI_BUS_ID"), ("FASTEST_FIRST", "FASTEST_FIRST")])
def test_every_process_counts_gpus_as_nvidia_smi_does(launch: Launch, monkeypatch: pytest.MonkeyPatch, set_by_user: str | None, seen: str) -> None:
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    if set_by_user:
        monkeypatch.setenv("CUDA_DEVICE_ORDER", set_by_user)
    launcher = launch("print(os.environ['CUDA_DEVICE_ORDER'])")
    assert launcher.end() == 0
    assert (launcher.output(), launcher.log(1)) == (f"{seen}\n", f"{seen}\n")


SAVER = """asked = []
for number in (signal.SIGTERM, signal.SIGUSR1): signal.signal(number, lambda *_: asked.append(rank))
Path(f'ready{rank}').touch()
while not asked and not list(Path().glob('asked*')): time.sleep(0.01)
Path('asked').touch()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_training_that_was_asked_to_stop_has_time_to_save_and_ends_with_75(launch: Launch, number: signal.Signals) -> None:
    launcher = launch(SAVER + "time.sleep(6 * rank)\nPath(f'saved{rank}').touch()\nos._exit(75)", name="train")
    wait_until(lambda: len(list(launcher.folder.glob("ready*"))) == 2)
    os.kill(launcher.pid, number)
    assert launcher.end() == 75
    assert (launcher.folder / "saved1").exists()
    assert launcher.errors() == ""


def test_a_rank_that_stopped_in_order_leaves_its_neighbour_the_time_to_hand_in_metrics(launch: Launch) -> None:
    launcher = launch(SAVER + "if rank == 0: time.sleep(6); Path('handed-in').touch()\nos._exit(75)", name="train")
    wait_until(lambda: len(list(launcher.folder.glob("ready*"))) == 2)
    os.kill(launcher.workers[1], signal.SIGTERM)
    assert launcher.end() == 75
    assert (launcher.folder / "handed-in").exists()


def test_a_rank_that_cannot_save_is_told_at_once_although_its_neighbours_wait_for_it(launch: Launch) -> None:
    launcher = launch(SAVER + "if rank == 1: raise DataError('out/: No space left on device')\ntime.sleep(60)", name="train")
    wait_until(lambda: len(list(launcher.folder.glob("ready*"))) == 2)
    os.kill(launcher.pid, signal.SIGTERM)
    assert launcher.end(10) == 2
    assert launcher.errors() == "out/: No space left on device\n"
    assert not any(alive(pid) for pid in launcher.workers.values())


def test_a_training_that_cannot_save_yet_is_stopped_at_once(launch: Launch) -> None:
    """One rank does not listen yet; the other does, and would wait for it."""
    launcher = launch("if rank == 0: signal.signal(signal.SIGUSR1, lambda *_: None)\nPath(f'ready{rank}').touch()\nwhile True: time.sleep(60)", name="train")
    wait_until(lambda: len(list(launcher.folder.glob("ready*"))) == 2)
    os.kill(launcher.pid, signal.SIGUSR1)
    assert launcher.end(10) == 128 + signal.SIGUSR1
    assert launcher.errors().startswith("stopped by SIGUSR1; logs: ")
