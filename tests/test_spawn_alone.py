"""How a job of one process ends, which is watched without torch's agent: as jobs of several do."""

import os
import signal
import subprocess
import sys

import pytest

from tests.launching import ROOT, Launch, alive, wait_until


def test_it_knows_its_place_and_has_the_terminal(launch: Launch) -> None:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "CUDA_DEVICE_ORDER")
    launcher = launch(f"print(*(os.environ[name] for name in {names}), sys.stdin.readline(), sys.argv[1:])", 1, "top_k=3", terminal=True)
    launcher.until_started(1)
    launcher.type(b"Once upon a time\n")
    assert "0 1 0 1 PCI_BUS_ID Once upon a time\r\n ['c.yml', 'top_k=3']" in launcher.read_terminal("top_k=3']")
    assert launcher.end() == 0


def test_a_user_error_is_one_sentence_and_exit_code_2(launch: Launch) -> None:
    launcher = launch("raise DataError('prompts.txt is empty; write a prompt')", 1)
    assert launcher.end() == 2
    assert launcher.errors() == "prompts.txt is empty; write a prompt\n"


def test_an_exception_is_told_once_with_rank_host_and_log(launch: Launch) -> None:
    launcher = launch("raise ValueError('shapes differ')", 1)
    assert launcher.end() == 1
    log = next(launcher.folder.glob("logs/*/rank0.log")).relative_to(launcher.folder)
    assert launcher.errors().count("Traceback") == 1
    assert launcher.errors().endswith(f"\nrank 0 on {os.uname().nodename} failed with ValueError: shapes differ (log: {log})\n")


@pytest.mark.parametrize(
    ("end", "code", "says"), [("os._exit(7)", 7, "ended with exit code 7"), ("os.kill(os.getpid(), 9)", 137, "was killed by SIGKILL, as the kernel")]
)
def test_who_leaves_without_a_word_is_named(launch: Launch, end: str, code: int, says: str) -> None:
    launcher = launch(end, 1)
    assert launcher.end() == code
    assert says in launcher.errors().splitlines()[-1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("is_deaf", [False, True], ids=["listens", "deaf"])
def test_a_signal_ends_it_and_what_it_has_started(launch: Launch, number: signal.Signals, is_deaf: bool) -> None:
    deaf = "for each in (1, 2, 15): signal.signal(each, signal.SIG_IGN)\n" if is_deaf else ""
    launcher = launch(deaf + 'Path(f\'here1-{os.posix_spawn("/bin/sleep", ["sleep", "60"], os.environ)}\').touch()\ntime.sleep(60)', 1)
    launcher.until_started(2)
    os.kill(launcher.pid, number)
    assert launcher.end(10) == 128 + number
    assert launcher.errors().startswith(f"stopped by {number.name}; logs: logs/generate-")
    assert not any(alive(pid) for pid in launcher.workers.values())


@pytest.mark.parametrize("processes", [1, 2])
def test_under_nohup_it_outlives_its_terminal(launch: Launch, processes: int) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup starts what it starts
    try:
        launcher = launch("Path(f'ready{rank}').touch()\nwhile not Path('go').exists(): time.sleep(0.01)", processes)
    finally:
        signal.signal(signal.SIGHUP, before)
    wait_until(lambda: len(list(launcher.folder.glob("ready*"))) == processes)
    for pid in (launcher.pid, *launcher.workers.values()):
        os.kill(pid, signal.SIGHUP)
    (launcher.folder / "go").touch()
    assert launcher.end() == 0


def test_it_does_not_outlive_a_launcher_killed_with_sigkill(launch: Launch) -> None:
    launcher = launch("time.sleep(60)", 1)
    launcher.until_started(1)
    os.kill(launcher.pid, signal.SIGKILL)
    assert launcher.end() == 137
    wait_until(lambda: not any(alive(pid) for pid in launcher.workers.values()), seconds=5)


@pytest.mark.parametrize("processes", [1, 2], ids=["alone", "with torch's agent"])
def test_who_asks_three_times_need_not_wait_for_a_training_that_does_not_end(launch: Launch, processes: int) -> None:
    note = "lambda number, _: Path(f'heard{rank}-{number}').touch()"
    launcher = launch(
        f"for each in (2, 15): signal.signal(each, {note})\nPath(f'ready{{rank}}').touch()\nwhile True: time.sleep(0.01)", processes, name="train"
    )
    for awaited in ("ready", "heard*-2", "heard*-15"):
        wait_until(lambda awaited=awaited: len(list(launcher.folder.glob(f"{awaited}*"))) == processes)
        os.kill(launcher.pid, signal.SIGINT)
    assert launcher.end(10) == 130
    assert launcher.errors().startswith("stopped by SIGINT; logs: logs/train-")
    wait_until(lambda: not any(alive(pid) for pid in launcher.workers.values()), seconds=5)


@pytest.mark.parametrize(
    ("end", "code", "says"),
    [
        ("time.sleep(6); os._exit(75)", 75, ""),
        ("os._exit(0)", 0, ""),
        ("raise DataError('out/: No space left on device')", 2, "out/: No space left on device\n"),
    ],
    ids=["saves", "was done", "cannot save"],
)
def test_a_training_that_was_asked_to_stop_says_what_became_of_it(launch: Launch, end: str, code: int, says: str) -> None:
    body = f"asked = []\nsignal.signal(signal.SIGUSR1, lambda *_: asked.append(1))\nPath('ready').touch()\nwhile not asked: time.sleep(0.01)\n{end}"
    launcher = launch(body, 1, name="train")
    wait_until(lambda: (launcher.folder / "ready").exists())
    os.kill(launcher.pid, signal.SIGUSR1)
    assert launcher.end() == code
    assert launcher.errors() == says


def test_the_launcher_does_not_import_torch_for_it() -> None:
    code = "import sys\nfrom launcher import cli, run, spawn, alone\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
