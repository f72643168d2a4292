"""The sum over two GPUs of what each computed for many tokens: each lays its share where the other reads it, and adds both while it norms them. That takes
the link once, where the library's sum and a norm behind it pass over the states three times more."""

# pyright: reportMissingParameterType=false, reportCallIssue=false, reportReturnType=false, reportArgumentType=false, reportIndexIssue=false, reportGeneralTypeIssues=false
# kernels are Triton's language, which is only spelled like Python

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_lite.inference.kernels.exchange import PATIENCE
from megatron_lite.inference.kernels.kernel import Kernel
from megatron_lite.inference.kernels.norm import put_normed
from megatron_lite.log import logger
from megatron_lite.parallel.mesh import Axis
from megatron_lite.parallel.peers import Shares

# m rows, d hidden size, c copies of norms

PROVEN = 3
"""Rows of which the sums are looked at before others are trusted."""


def meet(shares: Shares, *, patience: int = 0) -> None:
    """What the device is told from now on comes after all that the other ranks' devices were told before they met. A rank that does not come is waited for,
    or looked for `patience` times."""
    _meet[(1,)](shares.flags, shares.turn, SIZE=shares.size, RANK=shares.index, PATIENCE=patience, num_warps=1)


def sum_shares(residual: Tensor, shares: Shares, half: int, *, scale: Tensor, shift: Tensor, out: Tensor, eps: float) -> None:
    """residual [m d] (fp32) += the sum of what all ranks have laid in this half, in the order of the ranks; out [c m d] = its LayerNorm with each of scale and
    shift [c d]."""
    rows, width = residual.shape
    _sum[(rows,)](
        residual, shares.addresses, scale, shift, out, rows, half * shares.halves[0].numel(),
        WIDTH=width, COPIES=len(scale), EPS=eps, SIZE=shares.size, BLOCK=triton.next_power_of_2(width), num_warps=16 if width > 2048 else 4,
    )  # fmt: skip


def shares_proven(shares: Shares, axis: Axis) -> Shares | None:
    """The shares, if sums over them are right. All ranks of the axis call this."""
    width = shares.halves.shape[2]
    pattern = torch.arange(PROVEN * width, dtype=torch.float32, device=shares.halves.device).view(PROVEN, width) % 61
    right = torch.ones((), device=pattern.device)
    for turn in range(5):  # each half twice, behind a turn that does not count: one rank may still compile
        found, expected = torch.zeros_like(pattern), pattern * turn * sum(range(1, axis.size + 1))
        shares.halves[turn % 2, :PROVEN] = pattern * turn * (axis.index + 1)
        meet(shares, patience=PATIENCE)
        sum_without_norm(found, shares, turn % 2)
        right = right * torch.equal(found, expected) if turn else axis.maximum(right)
    if axis.minimum(right) == 1:
        return shares
    logger.debug("what the other GPU has laid is not read as it was: sums for prompts go through the library")
    return None


def sum_without_norm(residual: Tensor, shares: Shares, half: int) -> None:
    none = shares.halves[0, :0]
    sum_shares(residual, shares, half, scale=none, shift=none, out=shares.halves[:0, : len(residual)], eps=0.0)


@Kernel
@triton.jit
def _meet(flags, turn, SIZE: tl.constexpr, RANK: tl.constexpr, PATIENCE: tl.constexpr):
    now = tl.load(turn) + 1
    for peer in tl.static_range(SIZE):
        if peer != RANK:
            tl.atomic_xchg(tl.load(flags + peer).to(tl.pointer_type(tl.int32)) + RANK, now, sem="release", scope="sys")
    for peer in tl.static_range(SIZE):
        if peer != RANK:
            flag = tl.load(flags + RANK).to(tl.pointer_type(tl.int32)) + peer
            looked = 0
            while (tl.atomic_add(flag, 0, sem="acquire", scope="sys") - now < 0) & ((PATIENCE == 0) | (looked < PATIENCE)):  # also where turns begin anew
                looked += 1
    tl.store(turn, now)


@Kernel
@triton.jit
def _sum(
    residual, addresses, scale, shift, out, rows, first,
    WIDTH: tl.constexpr, COPIES: tl.constexpr, EPS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    inside = column < WIDTH
    place = row * WIDTH + column
    x = tl.load(residual + place, inside, 0.0)
    for rank in tl.static_range(SIZE):
        share = tl.multiple_of(tl.load(addresses + rank).to(tl.pointer_type(out.dtype.element_ty)), 16)
        x += tl.load(share + first + place, inside, 0.0).to(tl.float32)
    tl.store(residual + place, x, inside)
    if COPIES:
        put_normed(x, scale, shift, out, place, rows, column, inside, WIDTH, COPIES, EPS)
