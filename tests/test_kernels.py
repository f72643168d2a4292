"""The GPU's kernels, number by number, in Triton's interpreter on this CPU; each claim in a process of its own, because triton must be told before it is
imported. On a GPU the same claims hold of the compiled kernels (tests/test_gpu_decoding.py)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed: kernels for GPUs are not interpreted here")
ROOT = Path(__file__).resolve().parents[1]


def ran(script: str, *words: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-W", "ignore", ROOT / "tests" / script, *words], env=environment, capture_output=True, text=True, timeout=300)
    return done.stdout.strip() if done.returncode == 0 else done.stderr


@pytest.mark.parametrize("claim", ["projections", "norms", "streams", "attention", "packed", "blocks"])
def test_a_kernel_computes_what_plain_arithmetic_does(claim: str) -> None:
    assert ran("kernels.py", claim) == "ok"


def test_activations_of_a_thousand_in_fp16_stay_numbers_in_every_kernel() -> None:
    assert ran("kernels_loud.py").split() == ["products", "activations", "norms", "attending", "steps"]


@pytest.mark.parametrize(("dtype", "size"), [("float32", 1), ("float16", 1), ("float16", 11000)])
def test_ranks_that_write_into_each_others_memory_have_the_same_sums_turn_after_turn(dtype: str, size: int) -> None:
    """The last sums are beyond fp16, in which ranks tell their shares of them."""
    assert ran("exchanges.py", dtype, str(size)) == "ok"


def test_two_ranks_that_read_each_others_shares_have_the_same_sums_turn_after_turn() -> None:
    """Some sums are beyond fp16, in which the shares lie."""
    assert ran("laid.py", "float16", "15000") == "ok"


def test_two_ranks_that_read_each_others_shares_read_prompts_as_the_plain_path_does() -> None:
    assert ran("laid.py", "prompts") == "ok"


def test_ranks_use_what_brings_each_others_numbers_and_nothing_else() -> None:
    assert ran("laid.py", "proofs") == "ok"
