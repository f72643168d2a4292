"""Runs tests/warmed.py in a process of its own: it asks Triton itself, which another test may have imported as an interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed: there are no kernels to compile")
ROOT = Path(__file__).resolve().parents[1]


def pass_all(choice: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", choice, "tests/warmed.py"]
    ended = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert ended.returncode == 0, ended.stdout  # which it is not either where no test is found


def test_what_is_compiled_ahead_is_what_prompts_and_steps_launch() -> None:
    pass_all("not slow")


@pytest.mark.slow
def test_behind_the_warm_up_nothing_is_left_to_compile() -> None:
    pass_all("slow")
