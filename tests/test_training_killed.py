"""Trainings that somebody kills, started as users start them."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_lite.checkpoint.find import find_checkpoint
from megatron_lite.training.manifest import check_content, check_sizes
from tests.training_runs import losses, write_training

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow


def start(config: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "deepy.py"), "train.py", str(config), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment, cwd=config.parent)


def alive(folder: Path) -> list[str]:
    """Processes that have the folder on their command line."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder).encode() in path.read_bytes():
                lines.append(path.parent.name)
        except OSError:  # it has just ended
            continue
    return lines


def started(folder: Path, process: subprocess.Popen[str]) -> list[int]:
    """The process ids of both ranks of a training, as soon as it has taken a step."""
    end = time.monotonic() + 300
    while not (folder / "out" / "metrics.jsonl").exists() or not losses(folder):
        assert process.poll() is None, "the training has ended already"
        assert time.monotonic() < end, "the training does not start"
        time.sleep(0.1)
    workers = {rank_of(pid): int(pid) for pid in alive(folder) if int(pid) != process.pid}
    assert sorted(workers) == [0, 1]
    return [workers[0], workers[1]]


def rank_of(pid: str) -> int:
    entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next(int(entry[5:]) for entry in entries if entry.startswith(b"RANK="))


def test_killed_at_ten_moments_it_always_goes_on_with_the_same_losses(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    settings = {"train_iters": 40, "checkpoint_factor": 1, "keep_last_n_checkpoints": 2, "eval_interval": 100}
    process = start(write_training(whole, **settings))
    assert process.wait(timeout=300) == 0
    config = write_training(killed, load=str(killed / "out"), **settings)
    moments = random.Random(0)
    for _ in range(10):
        process = start(config)
        known = len(losses(killed)) if (killed / "out" / "metrics.jsonl").exists() else 0
        end = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
            if (killed / "out" / "metrics.jsonl").exists() and len(losses(killed)) > known:
                break
        time.sleep(moments.random() * 0.4)
        process.kill()
        process.wait()
        checkpoint = find_checkpoint(killed / "out") if (killed / "out" / "latest").exists() else None
        if checkpoint is not None and checkpoint.folder.exists():
            entries = check_sizes(checkpoint.folder)
            for name in entries:
                check_content(checkpoint.folder / name, entries)
    process = start(config)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert losses(killed) == losses(whole)


@pytest.mark.parametrize(
    ("number", "to"), [(signal.SIGTERM, "the launcher"), (signal.SIGTERM, "a worker"), (signal.SIGUSR1, "the launcher")], ids=lambda value: str(value)
)
def test_a_signal_saves_and_leaves_nobody_behind(tmp_path: Path, number: signal.Signals, to: str) -> None:
    process = start(write_training(tmp_path, train_iters=100000, eval_interval=1000), "pipe-parallel-size=2")
    workers = started(tmp_path, process)
    os.kill(process.pid if to == "the launcher" else workers[1], number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 75, said
    assert "asked to stop; saved in" in said
    assert check_sizes(find_checkpoint(tmp_path / "out").folder)
    assert not alive(tmp_path)


def test_a_process_that_stands_still_ends_the_training_with_its_name(tmp_path: Path) -> None:
    process = start(write_training(tmp_path, train_iters=100000, eval_interval=1000), "pipe-parallel-size=2", "hang_timeout_minutes=0.1")
    workers = started(tmp_path, process)
    os.kill(workers[1], signal.SIGSTOP)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2, said
    assert f"rank 1 (process {workers[1]} on " in said.splitlines()[-1]
    assert "has not given a sign of life for 6 s" in said.splitlines()[-1]
    assert not alive(tmp_path)
