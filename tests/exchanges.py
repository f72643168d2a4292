"""Run by tests/test_kernels.py in an interpreter of Triton: ranks of a group are processes that share memory at the same addresses. The first word is a
format, the second how large the ranks' numbers are."""

import os

os.environ["TRITON_INTERPRET"] = "1"
import multiprocessing
import sys

import torch
from torch import Tensor

from megatron_lite.inference.kernels.exchange import gather_offers, packets, sum_and_norm
from megatron_lite.parallel.peers import Peers

RANKS, ROWS, WIDTH = 3, 4, 40


def main(name: str, size: float) -> None:
    torch.set_num_threads(1)
    dtype = getattr(torch, name)
    capacity = packets(ROWS, WIDTH)
    boxes = [torch.zeros(2 * RANKS * capacity, dtype=torch.int64).share_memory_() for _ in range(RANKS)]
    addresses = torch.tensor([box.data_ptr() for box in boxes])
    answers = torch.zeros(RANKS, 6, ROWS, WIDTH).share_memory_()
    offered = torch.zeros(RANKS, 6, RANKS, ROWS, 2).share_memory_()
    fork = multiprocessing.get_context("fork").Process
    processes = [fork(target=rank, args=(index, boxes[index], addresses, capacity, dtype, size, answers, offered)) for index in range(RANKS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    for turn in range(6):
        rows = 1 + turn % ROWS
        share = [shares(index, turn, rows, size) for index in range(RANKS)]
        # added as the kernel does, or rounding would differ
        expected = torch.stack([(bias + terms[0] + terms[1]).to(dtype).float() for terms, bias in share]).sum(0)
        for index in range(RANKS):
            assert torch.equal(answers[index, turn, :rows], answers[0, turn, :rows]), "every rank has the same sum to the bit"
            torch.testing.assert_close(answers[index, turn, :rows], expected, atol=1e-5 * size, rtol=0)
            assert torch.equal(offered[index, turn, :, :rows], torch.stack([offers(each, turn, rows) for each in range(RANKS)]))
    assert answers.abs().max() > 7 * size  # while the largest share of a rank is 5.8
    print("ok")


def shares(index: int, turn: int, rows: int, size: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * turn + index)
    return torch.randn(2, rows, WIDTH, generator=generator) * size, torch.randn(WIDTH, generator=generator) * size


def offers(index: int, turn: int, rows: int) -> Tensor:
    return torch.randn(rows, 2, generator=torch.Generator().manual_seed(7000 + 100 * turn + index)) * 50000


def rank(index: int, box: Tensor, addresses: Tensor, capacity: int, dtype: torch.dtype, size: float, answers: Tensor, offered: Tensor) -> None:
    turns = torch.full((ROWS + 1,), 0 if size < 100 else 2**31 - 4, dtype=torch.int32)  # before the count begins anew
    peers = Peers(index, RANKS, capacity, addresses, turns, box)
    for turn in range(6):
        rows = 1 + turn % ROWS
        terms, bias = shares(index, turn, rows, size)
        stream, out = torch.zeros(rows, WIDTH), torch.empty(1, rows, WIDTH, dtype=dtype)
        ones = torch.ones(1, WIDTH)
        sum_and_norm(stream, terms, bias, ones, ones * 0, out, peers, eps=1e-5)
        answers[index, turn, :rows] = stream
        normed = torch.nn.functional.layer_norm(stream, (WIDTH,))
        torch.testing.assert_close(out[0].float(), normed, atol={torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype], rtol=0)
        offered[index, turn, :, :rows] = gather_offers(offers(index, turn, rows), peers)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
