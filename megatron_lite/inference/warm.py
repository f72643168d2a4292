"""Compiles the kernels of a run while its weights are read: steps and prompts are gone through on tensors that lie nowhere, and what they would launch is
compiled, in the order in which it will be needed."""

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_lite.inference.kernels.kernel import Launch
from megatron_lite.inference.likeness import launches, likeness
from megatron_lite.log import logger
from megatron_lite.run import Run

THREADS = 8
"""Compilers at once in a process, if there are cores enough: nearly all of their work is done outside of Python."""
TURN = 1e-4
"""Seconds that a thread keeps Python for itself while kernels are compiled. At the usual 5 ms those that read weights would mostly wait for it."""


@contextmanager
def _short_turns() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(TURN)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def warm_up(run: Run, *, rows: int, context: int) -> threading.Thread:
    """Begins to compile for steps that `rows` of up to `context` tokens share. It ends when all is done, or with the program."""
    if run.mesh.device.type == "cuda":
        threading.Thread(target=_load_products, args=(run.mesh.device, getattr(torch, run.spec.dtype))).start()
    thread = threading.Thread(target=_short_turns()(_warm_up), args=(run, rows, context))
    thread.start()
    return thread


@torch.inference_mode()
def _load_products(device: torch.device, dtype: torch.dtype) -> None:
    """The matrix library comes from the disk at the first product, which on a machine that has just begun takes seconds."""
    try:
        _enter(device)
        x = torch.ones(64, 64, dtype=dtype, device=device)
        torch.addmm(x[0], x, x)
    except Exception as error:  # the first product that is needed will say more
        logger.debug(f"the matrix library is not loaded ahead: {error!r}")


def _warm_up(run: Run, rows: int, context: int) -> None:
    device, started = run.mesh.device, time.monotonic()
    try:
        _enter(device)
        waiting = deque(launches(likeness(run), run.spec, words=run.tokenizer.vocab_size, rows=rows, context=context))
    except Exception as error:  # kernels are compiled where they are used, then
        logger.debug(f"kernels are not compiled ahead: {error!r}")
        return
    count, cores = len(waiting), (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    threads = [threading.Thread(target=_compile, args=(waiting, device)) for _ in range(max(1, min(THREADS, cores // 2)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    logger.debug(f"{count} kernels were compiled ahead in {time.monotonic() - started:.1f} s")


def _compile(waiting: deque[Launch], device: torch.device) -> None:
    _enter(device)
    while waiting and threading.main_thread().is_alive():
        try:
            waiting.popleft().compile()
        except Exception as error:
            logger.debug(f"a kernel is not compiled ahead: {error!r}")


def _enter(device: torch.device) -> None:
    """Every thread has a GPU of its own in mind."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
