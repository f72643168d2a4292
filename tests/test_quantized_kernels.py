"""Triton's kernels read weights of 8 bits, tried in Triton's interpreter where there is no GPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_a_product_of_8_bit_weights_is_that_of_the_numbers_they_stand_for() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: the kernels for GPUs cannot be tried")
    words = [sys.executable, "-m", "tests.kernels_int8"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    answer = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert answer.stdout.split() == ["projections", "combinations", "large_sums", "stages", "blocks", "steps"], answer.stderr
