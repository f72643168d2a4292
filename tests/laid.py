"""Run by tests/test_kernels.py in an interpreter of Triton: two ranks, which are processes that share memory at the same addresses, lay their shares where
the other reads them. The first word is a format, the second how large the ranks' numbers are."""

import os

os.environ["TRITON_INTERPRET"] = "1"
import multiprocessing
import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lite.inference.kernels.shares import meet, sum_shares
from megatron_lite.parallel.peers import Shares

RANKS, ROWS, WIDTH, TURNS = 2, 3, 40, 7
LAST = 2**31 - 3
"""Turns that were counted before: the count begins anew meanwhile."""


def main(name: str, size: float) -> None:
    torch.set_num_threads(1)
    dtype = getattr(torch, name)
    halves = [torch.zeros(2, ROWS, WIDTH, dtype=dtype).share_memory_() for _ in range(RANKS)]
    flags = [torch.full((RANKS,), LAST, dtype=torch.int32).share_memory_() for _ in range(RANKS)]
    answers = torch.zeros(RANKS, TURNS, ROWS, WIDTH).share_memory_()
    read, told = (torch.tensor([each.data_ptr() for each in tensors]) for tensors in (halves, flags))
    everybody = [Shares(rank, RANKS, halves[rank], read, told, torch.full((1,), LAST, dtype=torch.int32)) for rank in range(RANKS)]
    processes = [multiprocessing.get_context("fork").Process(target=work, args=(shares, size, answers)) for shares in everybody]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    for turn in range(TURNS):
        expected = stream_of(turn) + sum(share(rank, turn, size, dtype).float() for rank in range(RANKS))
        torch.testing.assert_close(answers[0, turn], expected, atol=1e-5 * size, rtol=0)
        assert torch.equal(answers[0, turn], answers[1, turn]), "both ranks have the same sum to the bit"
    lonely = Shares(0, RANKS, halves[0], read, told, torch.tensor([5], dtype=torch.int32))
    meet(lonely, patience=3)  # nobody comes
    print("ok")


def share(rank: int, turn: int, size: float, dtype: torch.dtype) -> Tensor:
    return (torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(100 * turn + rank)) * size).to(dtype)


def stream_of(turn: int) -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(7000 + turn))


def work(shares: Shares, size: float, answers: Tensor) -> None:
    """The ranks take turns in being late."""
    dtype = shares.halves.dtype
    scale, shift = torch.randn(2, 1, WIDTH, generator=torch.Generator().manual_seed(1))
    for turn in range(TURNS):
        time.sleep(0.2 * (turn % RANKS == shares.index))
        shares.halves[turn % 2] = share(shares.index, turn, size, dtype)
        meet(shares)
        stream, out = stream_of(turn), torch.empty(1, ROWS, WIDTH, dtype=dtype)
        sum_shares(stream, shares, turn % 2, scale=scale, shift=shift, out=out, eps=1e-5)
        answers[shares.index, turn] = stream
        normed = F.layer_norm(stream, (WIDTH,), scale[0], shift[0])
        torch.testing.assert_close(out[0].float(), normed, atol={torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype], rtol=0)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
