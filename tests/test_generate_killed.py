"""A run that is killed while it writes leaves whole records, and a job that loses a process ends soon and says which."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.runs import records, write_run

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A run that takes minutes, a record every now and then."""
    return write_run(tmp_path, num_samples=3000, temperature=1.0, maximum_tokens=60, generation_batch_size=1, log_dir=str(tmp_path / "logs"))


def start(*words: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *map(str, words)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def wait_for_records(output: Path, count: int, program: subprocess.Popen[str]) -> None:
    for _ in range(1200):
        if output.exists() and output.read_bytes().count(b"\n") >= count:
            return
        assert program.poll() is None, program.communicate()[1]
        time.sleep(0.05)
    raise AssertionError(f"no {count} records within a minute")


def process_of(rank: int, launcher: int) -> int:
    """The process id of a rank that this launcher started."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            environment = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if f"RANK={rank}".encode() in environment and f"DEEPY_PARENT={launcher}".encode() in environment:
            return int(path.parent.name)
    raise AssertionError(f"rank {rank} is not running")


def test_a_run_that_is_killed_leaves_whole_records(config: Path) -> None:
    output = config.parent / "out.jsonl"
    program = start(ROOT / "generate.py", config)
    wait_for_records(output, 3, program)
    program.send_signal(signal.SIGKILL)
    program.communicate()
    assert output.read_bytes().endswith(b"\n")
    written = records(output)
    assert len(written) >= 3
    assert all(record["length"] == 60 or record["finished"] for record in written)


def test_a_job_that_loses_a_process_ends_within_ten_seconds_names_it_and_leaves_whole_records(config: Path) -> None:
    output = config.parent / "out.jsonl"
    launcher = start(ROOT / "deepy.py", "generate.py", config, "model-parallel-size=2")
    wait_for_records(output, 2, launcher)
    os.kill(process_of(1, launcher.pid), signal.SIGKILL)
    killed = time.monotonic()
    _, said = launcher.communicate(timeout=30)
    assert time.monotonic() - killed < 10
    assert launcher.returncode != 0
    assert "rank 1" in said.splitlines()[-1]
    assert "SIGKILL" in said
    assert len(records(output)) >= 2
