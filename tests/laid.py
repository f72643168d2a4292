"""Run by tests/test_kernels.py in an interpreter of Triton: two ranks, which are processes that share memory at the same addresses, lay their shares where
the other reads them. The first word is a format and the second how large the ranks' numbers are; or it is "prompts", which a model reads so, or
"proofs", by which ranks find out whether this works."""

import os

os.environ["TRITON_INTERPRET"] = "1"
import multiprocessing
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lite.inference.block import FusedBlock
from megatron_lite.inference.captured import CapturedStepper
from megatron_lite.inference.kernels.exchange import packets, proven
from megatron_lite.inference.kernels.shares import PROVEN, meet, shares_proven, sum_shares
from megatron_lite.inference.request import Request, Sampling
from megatron_lite.inference.sample import Rules
from megatron_lite.inference.step import Stepper
from megatron_lite.parallel.layout import Layout
from megatron_lite.parallel.mesh import Mesh
from megatron_lite.parallel.peers import Peers, Shares
from tests.kernels import SPEC, let_bounds_be_computed
from tests.models import load, write_random
from tests.worlds import in_world

RANKS, ROWS, WIDTH, TURNS = 2, 3, 40, 7
LAST = 2**31 - 3
"""Turns that were counted before: the count begins anew meanwhile."""


def everybody(rows: int, width: int, dtype: torch.dtype) -> list[Shares]:
    """Both ranks' shares, with the flags behind them in the same memory."""
    size = 2 * rows * width * dtype.itemsize // 8
    memories = [torch.zeros(size + RANKS, dtype=torch.int64).share_memory_() for _ in range(RANKS)]
    for memory in memories:
        memory[size:].view(torch.int32).fill_(LAST)
    read = torch.tensor([memory.data_ptr() for memory in memories])
    return [
        Shares(rank, RANKS, memory[:size].view(dtype).view(2, rows, width), read, read + 8 * size, torch.full((1,), LAST, dtype=torch.int32))
        for rank, memory in enumerate(memories)
    ]


def sums(name: str, size: float) -> None:
    dtype = getattr(torch, name)
    ranks = everybody(ROWS, WIDTH, dtype)
    answers = torch.zeros(RANKS, TURNS, ROWS, WIDTH).share_memory_()
    processes = [multiprocessing.get_context("fork").Process(target=work, args=(shares, size, answers)) for shares in ranks]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    for turn in range(TURNS):
        expected = stream_of(turn) + sum(share(rank, turn, size, dtype).float() for rank in range(RANKS))
        torch.testing.assert_close(answers[0, turn], expected, atol=1e-5 * size, rtol=0)
        assert torch.equal(answers[0, turn], answers[1, turn]), "both ranks have the same sum to the bit"
    assert answers.abs().max() > torch.finfo(torch.float16).max
    meet(replace(ranks[0], turn=torch.tensor([5], dtype=torch.int32)), patience=3)  # nobody comes


def prompts() -> None:
    """A stage of two ranks reads twice, and the ranks take turns in being late."""
    spec = replace(SPEC, layers=4)
    saved, ranks = write_random(Path(tempfile.mkdtemp()), spec, tp=2), everybody(16, spec.hidden, torch.float32)

    def read(mesh: Mesh) -> list[Tensor]:
        stage, found = load(saved, spec, mesh), []
        plain, fast = Stepper(stage, spec, words=512, pages=9), CapturedStepper(stage, spec, words=512, pages=9)
        assert fast.stack is not None
        fast.stack, fast.through_prompts = replace(fast.stack, shares=ranks[mesh.tp.index]), fast._read
        plainly = FusedBlock.inner
        rules = Rules.of([Request(0, "", (1,), Sampling())], device=mesh.device)
        with torch.inference_mode():
            for turn, texts in enumerate(([[1, 2, 3], [4] * 5, [7]], [[9] * 6, [8]])):

                def inner(self: FusedBlock, normed: Tensor, turn: int = turn) -> Tensor:
                    time.sleep(0.3 * (turn == mesh.tp.index))
                    return plainly(self, normed)

                FusedBlock.inner = inner
                pages = [[number + 1] for number in range(len(texts))]
                for stepper in (plain, fast):
                    stepper.pick = lambda logits, rules: logits
                    found.append(stepper.read(texts, pages, rules).tokens.clone())
        return found

    for one, two, three, four in in_world(Layout(tp=2), read):
        torch.testing.assert_close((two, four), (one, three), atol=1e-5, rtol=0)


def proofs() -> None:
    """What works is found to work, by packets and by shares; what brings other numbers is not used."""
    capacity = packets(PROVEN, WIDTH)
    boxes = [torch.zeros(2 * RANKS * capacity, dtype=torch.int64).share_memory_() for _ in range(RANKS)]
    addresses = torch.tensor([box.data_ptr() for box in boxes])
    right, wrong = everybody(4, WIDTH, torch.float16), everybody(4, WIDTH, torch.float16)

    def prove(mesh: Mesh) -> list[bool]:
        tp, rank = mesh.tp, mesh.tp.index
        peers = Peers(rank, RANKS, capacity, addresses, torch.zeros(PROVEN + 1, dtype=torch.int32), boxes[rank])
        time.sleep(0.5 * rank)
        own = replace(wrong[rank], addresses=wrong[rank].addresses[rank].repeat(RANKS))  # as if the link brought the reader's numbers back
        told = proven(peers, tp, width=WIDTH, dtype=torch.float16), shares_proven(right[rank], tp), shares_proven(own, tp)
        return [each is not None for each in told]

    assert in_world(Layout(tp=2), prove) == [[True, True, False]] * RANKS


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
    torch.set_num_threads(1)
    let_bounds_be_computed()
    if len(sys.argv) == 2:
        {"prompts": prompts, "proofs": proofs}[sys.argv[1]]()
    else:
        sums(sys.argv[1], float(sys.argv[2]))
    print("ok")
