"""Progress is a bar on a terminal, and lines now and then in a log; printing never ends a run."""

import io
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_lite import progress as module
from megatron_lite.progress import progress
from tests.runs import Lines, records, write_run

ROOT = Path(__file__).resolve().parents[1]
WORK = """
import time
from megatron_lite.progress import progress
with progress("loading", 2 * 10**9) as advance:
    for _ in range(4):
        time.sleep(0.25)
        advance(5 * 10**8)
"""


def test_a_terminal_shows_gigabytes_their_speed_and_the_time_left() -> None:
    screen, terminal = pty.openpty()
    with subprocess.Popen([sys.executable, "-c", WORK], cwd=ROOT, stderr=terminal) as program:
        os.close(terminal)
        shown = b""
        while True:
            try:
                shown += os.read(screen, 4096)
            except OSError:
                break
    assert program.returncode == 0
    states = shown.decode().split("\r")
    half = next(state for state in states if " 50%" in state)
    assert "1.00G/2.00G" in half
    assert "GB/s" in half
    assert "<00:00" in half or "<00:01" in half


def test_a_log_gets_a_line_every_ten_seconds_and_none_for_what_is_quicker(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 5.0, 10.0, 12.0, 20.0, 21.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with Lines() as said, progress("loading", 8 * 10**9) as advance:
        for _ in range(6):
            advance(10**9)
    assert said == ["loading: 3.00 of 8.00 GB, 0.30 GB/s, 17 s left", "loading: 5.00 of 8.00 GB, 0.25 GB/s, 12 s left"]


def test_what_is_counted_in_pieces_is_told_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 20.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with Lines() as said, progress("generating", 100, unit="prompts") as advance:
        advance(5)
    assert said == ["generating: 5 of 100 prompts, 0.25 prompts/s, 380 s left"]


def test_a_log_of_generate_holds_no_carriage_return_and_a_reader_that_leaves_does_not_end_the_run(tmp_path: Path) -> None:
    """As in `generate.py ... 2>log | head -1`."""
    config = write_run(tmp_path, num_samples=30, maximum_tokens=3, temperature=1.0)
    reader, writer = os.pipe()
    os.close(reader)
    words = [sys.executable, str(ROOT / "generate.py"), str(config)]
    ended = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    os.close(writer)
    assert ended.returncode == 0
    assert len(records(tmp_path / "out.jsonl")) == 30
    lines = ended.stderr.splitlines()
    assert "\r" not in ended.stderr
    assert lines[0].startswith(f"loaded {tmp_path / 'checkpoint'} global_step10 (neox, model-parallel-size 2): 0.00 GB a process in ")
    assert lines[1].startswith("30 prompts, ")
    assert len(lines) == 2
