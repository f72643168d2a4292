"""Sums over the GPUs of a tensor-parallel group inside a kernel: every rank writes its share into the memory of the others, each number together with the
turn it belongs to, and adds what arrives. There is no barrier and no library call, and the norm that follows is part of the launch."""

# pyright: reportMissingParameterType=false, reportCallIssue=false, reportReturnType=false, reportArgumentType=false, reportIndexIssue=false, reportGeneralTypeIssues=false
# kernels are Triton's language, which is only spelled like Python

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_lite.inference.kernels.kernel import Kernel
from megatron_lite.log import logger
from megatron_lite.parallel.mesh import Axis
from megatron_lite.parallel.peers import Peers

# m rows, d hidden size, t terms, c copies of norms

OFFERED = 2
"""Numbers that a rank offers for each row: its best logit and the token it belongs to."""
PATIENCE = 1 << 18
"""Looks at what a peer should have sent, where it may be that nothing ever comes."""

LAST_TURN = tl.constexpr(0x7FFFFFFF)
"""Turns are counted from 0 again behind it: a packet holds them as they are."""


def packets(rows: int, width: int) -> int:
    """Room for a sum over rows, at worst a packet for every number, and for a gathering."""
    return rows * width + rows * OFFERED


def sum_and_norm(
    residual: Tensor, terms: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor, out: Tensor, peers: Peers, *, eps: float, patience: int = 0
) -> None:  # fmt: skip
    """residual [m d] (fp32) += the sum over all ranks of (the sum of terms [t m d] + bias [d]); out [c m d] = its LayerNorm with each of scale and shift
    [c d]. Ranks tell each other their shares in the precision of out, two numbers a packet if it has 16 bits, and add them in the same order. A rank that
    does not answer is waited for, or looked for `patience` times."""
    rows, width = residual.shape
    _sum_and_norm[(rows,)](
        residual, terms, residual if bias is None else bias, scale, shift, out, peers.boxes, peers.turns, rows,
        HALF=width // 2, TERMS=len(terms), COPIES=len(scale), BIASED=bias is not None, EPS=eps, PATIENCE=patience,
        SIZE=peers.size, RANK=peers.index, CAPACITY=peers.capacity, BLOCK=triton.next_power_of_2(width // 2),
        num_warps=16 if width > 2048 else 4,
    )  # fmt: skip


def gather_offers(offers: Tensor, peers: Peers) -> Tensor:
    """What every rank offers [ranks m 2], given this rank's offers [m 2] in fp32."""
    rows = len(offers)
    found = torch.empty(peers.size, *offers.shape, device=offers.device)
    first = peers.capacity - rows * OFFERED
    _gather[(1,)](
        offers, found, peers.boxes, peers.turns, len(peers.turns) - 1, first, rows * OFFERED,
        SIZE=peers.size, RANK=peers.index, CAPACITY=peers.capacity, BLOCK=triton.next_power_of_2(rows * OFFERED), num_warps=1,
    )  # fmt: skip
    return found


def proven(peers: Peers | None, axis: Axis, *, width: int, dtype: torch.dtype) -> Peers | None:
    """The peers, if sums over them are right: on some machines what one GPU writes to another arrives as zeros, or never. All ranks of the axis call this."""
    if peers is None:
        return None
    device = peers.turns.device
    pattern = torch.arange(3 * width, dtype=torch.float32, device=device).view(1, 3, width) % 61
    out = torch.empty(0, 3, width, dtype=dtype, device=device)
    right = torch.ones((), device=device)
    for turn in range(5):  # each half twice, behind a turn that does not count: one rank may still compile
        found, expected = torch.zeros(3, width, device=device), pattern[0] * turn * sum(range(1, axis.size + 1))
        sum_and_norm(found, pattern * turn * (axis.index + 1), None, out[:, 0], out[:, 0], out, peers, eps=0.0, patience=PATIENCE)
        right = right * torch.equal(found, expected) if turn else axis.maximum(right)
    if axis.minimum(right) == 1:
        return peers
    logger.debug("what GPUs write into each other's memory does not arrive as it was: sums go through the library")
    return None


@triton.jit
def _send(data, boxes, at, inside, turn, SIZE: tl.constexpr, RANK: tl.constexpr, CAPACITY: tl.constexpr):
    """Puts 32-bit data into this rank's part of all other ranks' boxes. The two halves take turns: a rank that has heard of everybody in one turn knows
    that everybody is done with the turn before, whose half comes next."""
    packet = (data.to(tl.int64) << 32) | turn
    for peer in tl.static_range(SIZE):
        if peer != RANK:
            box = tl.load(boxes + peer).to(tl.pointer_type(tl.int64)) + (turn % 2 * SIZE + RANK) * CAPACITY
            tl.store(box + at, packet, inside)


@triton.jit
def _receive(boxes, at, inside, turn, peer: tl.constexpr, SIZE: tl.constexpr, RANK: tl.constexpr, CAPACITY: tl.constexpr, PATIENCE: tl.constexpr):
    """The data of a peer, as soon as all of it has come."""
    box = tl.load(boxes + RANK).to(tl.pointer_type(tl.int64)) + (turn % 2 * SIZE + peer) * CAPACITY
    packet = tl.load(box + at, inside, 0, volatile=True)
    looked = 0
    while (tl.max(((packet.to(tl.int32) != turn) & inside).to(tl.int32), 0) != 0) & ((PATIENCE == 0) | (looked < PATIENCE)):
        packet = tl.load(box + at, inside, 0, volatile=True)
        looked += 1
    return (packet >> 32).to(tl.int32)


@triton.jit
def _pack(low, high, NARROW: tl.constexpr):
    """Two numbers of 16 bits as one of 32; of wider ones the first."""
    if NARROW:
        return (low.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) | (high.to(tl.int16, bitcast=True).to(tl.int32) << 16)
    else:
        return low.to(tl.int32, bitcast=True)


@Kernel
@triton.jit
def _sum_and_norm(
    residual, terms, bias, scale, shift, out, boxes, turns, rows,
    HALF: tl.constexpr, TERMS: tl.constexpr, COPIES: tl.constexpr, BIASED: tl.constexpr, EPS: tl.constexpr, PATIENCE: tl.constexpr,
    SIZE: tl.constexpr, RANK: tl.constexpr, CAPACITY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    inside = column < HALF
    width = 2 * HALF
    low_place, high_place = row * width + column, row * width + HALF + column  # columns of both halves travel together
    kind = out.dtype.element_ty
    NARROW: tl.constexpr = kind.primitive_bitwidth == 16
    low, high = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    if BIASED:
        low, high = tl.load(bias + column, inside, 0.0), tl.load(bias + HALF + column, inside, 0.0)
    for term in tl.static_range(TERMS):
        low += tl.load(terms + term * rows * width + low_place, inside, 0.0).to(tl.float32)
        high += tl.load(terms + term * rows * width + high_place, inside, 0.0).to(tl.float32)
    low_share, high_share = low.to(kind), high.to(kind)
    turn = (tl.load(turns + row) + 1) & LAST_TURN
    at = low_place  # a row has its place in the box whatever other rows there are: its turns are counted on their own
    _send(_pack(low_share, high_share, NARROW), boxes, at, inside, turn, SIZE, RANK, CAPACITY)
    if not NARROW:
        _send(_pack(high_share, high_share, NARROW), boxes, high_place, inside, turn, SIZE, RANK, CAPACITY)
    low, high = tl.load(residual + low_place, inside, 0.0), tl.load(residual + high_place, inside, 0.0)
    for peer in tl.static_range(SIZE):
        if peer == RANK:
            low += low_share.to(tl.float32)
            high += high_share.to(tl.float32)
        else:
            data = _receive(boxes, at, inside, turn, peer, SIZE, RANK, CAPACITY, PATIENCE)
            if NARROW:
                low += data.to(tl.int16).to(kind, bitcast=True).to(tl.float32)
                high += (data >> 16).to(tl.int16).to(kind, bitcast=True).to(tl.float32)
            else:
                low += data.to(tl.float32, bitcast=True)
                high += _receive(boxes, high_place, inside, turn, peer, SIZE, RANK, CAPACITY, PATIENCE).to(tl.float32, bitcast=True)
    tl.store(turns + row, turn)
    tl.store(residual + low_place, low, inside)
    tl.store(residual + high_place, high, inside)
    if COPIES:
        mean = (tl.sum(low, 0) + tl.sum(high, 0)) / width
        low, high = tl.where(inside, low - mean, 0.0), tl.where(inside, high - mean, 0.0)
        factor = tl.rsqrt((tl.sum(low * low, 0) + tl.sum(high * high, 0)) / width + EPS)
        for copy in tl.static_range(COPIES):
            _put(low * factor, scale, shift, out, copy * width + column, copy * rows * width + low_place, inside)
            _put(high * factor, scale, shift, out, copy * width + HALF + column, copy * rows * width + high_place, inside)


@triton.jit
def _put(normed, scale, shift, out, at, place, inside):
    y = normed * tl.load(scale + at, inside, 0.0).to(tl.float32) + tl.load(shift + at, inside, 0.0).to(tl.float32)
    tl.store(out + place, y, inside)


@Kernel
@triton.jit
def _gather(
    offers, found, boxes, turns, counter, first, count,
    SIZE: tl.constexpr, RANK: tl.constexpr, CAPACITY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.arange(0, BLOCK)
    inside = place < count
    mine = tl.load(offers + place, inside, 0.0)
    turn = (tl.load(turns + counter) + 1) & LAST_TURN
    _send(mine.to(tl.int32, bitcast=True), boxes, first + place, inside, turn, SIZE, RANK, CAPACITY)
    for peer in tl.static_range(SIZE):
        if peer == RANK:
            tl.store(found + peer * count + place, mine, inside)
        else:
            data = _receive(boxes, first + place, inside, turn, peer, SIZE, RANK, CAPACITY, 0)
            tl.store(found + peer * count + place, data.to(tl.float32, bitcast=True), inside)
    tl.store(turns + counter, turn)
