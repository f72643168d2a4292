"""Sums terms over the GPUs of a tensor-parallel group in one launch: every rank writes its share where the others can read it, tells them, and reads theirs."""

import triton
import triton.language as tl
from torch import Tensor

from megatron_lite.inference.kernels.launch import begin, options, wait
from megatron_lite.parallel.peers import Peers

# m rows, d hidden size, t terms

PIECE = 1024
"""Columns of a row that one program exchanges."""


def exchange(residual: Tensor, terms: Tensor, bias: Tensor | None, peers: Peers) -> None:
    """residual [m d] (fp32) += the sum over all ranks of (the sum of terms [t m d] + bias [d]), added in the same order everywhere."""
    rows, width = residual.shape
    pieces = triton.cdiv(width, PIECE)
    _exchange[(rows * pieces,)](
        residual, terms, terms if bias is None else bias, peers.buffers, peers.signals, peers.rounds, rows,
        WIDTH=width, TERMS=len(terms), BIASED=bias is not None, SIZE=peers.size, RANK=peers.index, CAPACITY=peers.capacity,
        PIECES=pieces, PIECE=PIECE, num_warps=4, **options(),
    )  # fmt: skip


@triton.jit
def _exchange(
    residual, terms, bias, buffers, signals, rounds, rows, WIDTH: tl.constexpr, TERMS: tl.constexpr, BIASED: tl.constexpr,
    SIZE: tl.constexpr, RANK: tl.constexpr, CAPACITY: tl.constexpr, PIECES: tl.constexpr, PIECE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    begin(OVERLAP)
    program = tl.program_id(0)
    column = program % PIECES * PIECE + tl.arange(0, PIECE)
    inside = column < WIDTH
    place = program // PIECES * WIDTH + column
    share = tl.load(bias + column, inside, 0.0).to(tl.float32) if BIASED else tl.zeros([PIECE], tl.float32)
    wait(OVERLAP)
    for term in tl.static_range(TERMS):
        share += tl.load(terms + term * rows * WIDTH + place, inside, 0.0).to(tl.float32)
    # Two halves take turns: a rank that writes one has been told that the others are done with the other, and so with what this one held before.
    turn = tl.load(rounds + program) + 1
    half = turn % 2 * CAPACITY
    tl.store(tl.load(buffers + RANK).to(tl.pointer_type(tl.float32)) + half + place, share, inside)
    tl.debug_barrier()  # all threads have written before one of them says so
    for peer in tl.static_range(SIZE):
        if peer != RANK:
            told = tl.load(signals + peer).to(tl.pointer_type(tl.int32)) + program * SIZE + RANK
            tl.atomic_xchg(told, turn, sem="release", scope="sys")
    for peer in tl.static_range(SIZE):
        if peer != RANK:
            heard = tl.load(signals + RANK).to(tl.pointer_type(tl.int32)) + program * SIZE + peer
            seen = tl.atomic_add(heard, 0, sem="acquire", scope="sys")
            while seen < turn:
                seen = tl.atomic_add(heard, 0, sem="acquire", scope="sys")
    tl.debug_barrier()
    total = tl.load(residual + place, inside, 0.0)
    for peer in tl.static_range(SIZE):
        if peer == RANK:
            total += share
        else:
            total += tl.load(tl.load(buffers + peer).to(tl.pointer_type(tl.float32)) + half + place, inside, 0.0, volatile=True)
    tl.store(residual + place, total, inside)
    tl.store(rounds + program, turn)
