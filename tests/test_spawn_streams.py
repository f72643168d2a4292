"""Who speaks and listens where: rank 0 has the terminal, the others their logs; and what a process finds in its environment."""

import os
from pathlib import Path

import pytest

from tests.launching import Launch


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
    first, second = launch("print(os.environ['MASTER_PORT'])"), launch("print(os.environ['MASTER_PORT'])")
    assert (first.end(), second.end()) == (0, 0)
    assert len(set(first.output().split())) == 2
    assert len(list(first.folder.glob("logs/*"))) == 2
