"""Attention of one new token a row over paged keys and values, in one launch: rotary positions, the write into the cache, and the mixing, split over the
text so that few rows fill a GPU. Lengths are read from the GPU, so that a captured launch serves any."""

# pyright: reportMissingParameterType=false, reportCallIssue=false, reportReturnType=false, reportArgumentType=false, reportIndexIssue=false, reportGeneralTypeIssues=false
# kernels are Triton's language, which is only spelled like Python

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_lite.inference.kernels.kernel import Kernel

# b rows, h query heads and g key/value heads on this rank, d head size, p tokens in a page


@dataclass(frozen=True)
class Turn:
    """Rotary angles: cos and sin [positions, dim / 2]; absent where queries and keys come turned."""

    cos: Tensor
    sin: Tensor
    interleaved: bool


@dataclass(frozen=True)
class Scratch:
    """What the programs of one row and group of heads hand to the last of them: mixed values, maxima and sums in fp32, and a count that is 0 between
    launches."""

    mixed: Tensor  # b h splits d
    totals: Tensor  # b h splits 2
    done: Tensor  # b g

    @classmethod
    def empty(cls, rows: int, heads: int, groups: int, head_dim: int, device: torch.device) -> "Scratch":
        splits = splits_for(rows, groups)
        return cls(
            torch.empty(rows, heads, splits, head_dim, device=device),
            torch.empty(rows, heads, splits, 2, device=device),
            torch.zeros(rows, groups, dtype=torch.int32, device=device),
        )


def splits_for(rows: int, groups: int) -> int:
    """Programs for each row and group of heads: a power of 2, so many that there are some for every multiprocessor."""
    return min(16, triton.next_power_of_2(triton.cdiv(512, rows * groups)))


def attend_pages(
    heads: tuple[Tensor, Tensor, Tensor], pages: tuple[Tensor, Tensor], table: Tensor, lengths: Tensor, out: Tensor, scratch: Scratch, turn: Turn | None = None
) -> None:  # fmt: skip
    """out [b h d] = what the queries [b h d] see of the keys and values in pages [pages g p d] (by table [b pages] and lengths [b]) and of their own token's
    [b g d], which are written to the cache at position lengths[b]. `heads` are queries, keys and values."""
    query, key, value = heads
    rows, queries, head_dim = query.shape
    groups, page = pages[0].shape[1:3]
    splits = scratch.mixed.shape[2]
    many = rows * groups >= 2048
    warps, stages = (1 if head_dim <= 128 else 2, 2) if many else (4, 3) if splits == 1 else (4, 2)  # what was fastest on an H200
    _attend[(rows * groups * splits,)](
        query, key, value, *pages, table, lengths, out, scratch.mixed, scratch.totals, scratch.done,
        turn.cos if turn else query, turn.sin if turn else query,
        query.stride(0), query.stride(1), key.stride(0), key.stride(1), value.stride(0), value.stride(1), table.stride(0), head_dim**-0.5,
        GROUPS=groups, GROUP=queries // groups, HEAD=head_dim, TURNED=2 * turn.cos.shape[1] if turn else 0,
        INTERLEAVED=bool(turn and turn.interleaved), PAGE=page, SPLITS=splits, BLOCK=max(16, triton.next_power_of_2(head_dim)),
        QUERIES=max(16, triton.next_power_of_2(queries // groups)), num_warps=warps, num_stages=stages,
    )  # fmt: skip


@triton.jit
def turned(x, place, inside, cos, sin, position, TURNED: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The vectors at x, turned by the angles of their position, in fp32."""
    found = tl.load(x + place, inside, 0.0).to(tl.float32)
    if TURNED:
        if INTERLEAVED:
            other, angle, ahead = place ^ 1, place // 2, place % 2 == 0
        else:
            ahead = place < TURNED // 2
            other, angle = tl.where(ahead, place + TURNED // 2, place - TURNED // 2), place % (TURNED // 2)
        turns = place < TURNED
        partner = tl.load(x + other, inside & turns, 0.0).to(tl.float32)
        at = position * (TURNED // 2) + angle
        c, s = tl.load(cos + at, turns, 1.0), tl.load(sin + at, turns, 0.0)
        found = tl.where(turns, found * c + tl.where(ahead, -partner, partner) * s, found)
    return found


@Kernel
@triton.jit
def _attend(
    query, key, value, keys, values, table, lengths, out, mixed, totals, done, cos, sin,
    query_row, query_head, key_row, key_head, value_row, value_head, table_row, scale,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, HEAD: tl.constexpr, TURNED: tl.constexpr, INTERLEAVED: tl.constexpr,
    PAGE: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    split, group, row = tl.program_id(0) % SPLITS, tl.program_id(0) // SPLITS % GROUPS, tl.program_id(0) // SPLITS // GROUPS
    member, place = tl.arange(0, QUERIES), tl.arange(0, BLOCK)
    inside = place < HEAD
    both = (member < GROUP)[:, None] & inside[None, :]
    length = tl.load(lengths + row)
    kind = keys.dtype.element_ty
    heads = group * GROUP + member
    q = turned(query + row * query_row + heads[:, None] * query_head, place[None, :], both, cos, sin, length, TURNED, INTERLEAVED).to(kind)

    best, total, mix = tl.full([QUERIES], -float("inf"), tl.float32), tl.zeros([QUERIES], tl.float32), tl.zeros([QUERIES, BLOCK], tl.float32)
    count = tl.cdiv(length, PAGE)
    share = tl.cdiv(count, SPLITS)
    first, stop = split * share, tl.minimum(split * share + share, count)
    in_page = tl.arange(0, PAGE)
    offset = in_page[:, None] * HEAD + place[None, :]
    for number in range(first, stop):
        page = tl.load(table + row * table_row + number).to(tl.int64)
        start = (page * GROUPS + group) * PAGE * HEAD
        seen = number * PAGE + in_page < length
        k = tl.load(keys + start + offset, seen[:, None] & inside[None, :], 0.0)
        v = tl.load(values + start + offset, seen[:, None] & inside[None, :], 0.0)
        scores = tl.where(seen[None, :], tl.dot(q, tl.trans(k), input_precision="ieee") * scale, -float("inf"))
        highest = tl.maximum(best, tl.max(scores, 1))
        weights = tl.exp(scores - highest[:, None])
        shrink = tl.exp(best - highest)
        total = total * shrink + tl.sum(weights, 1)
        mix = tl.dot(weights.to(kind), v, mix * shrink[:, None], input_precision="ieee")
        best = highest
    if split == SPLITS - 1:
        k = turned(key + row * key_row + group * key_head, place, inside, cos, sin, length, TURNED, INTERLEAVED).to(kind)
        v = tl.load(value + row * value_row + group * value_head + place, inside, 0.0)
        page = tl.load(table + row * table_row + length // PAGE).to(tl.int64)
        start = ((page * GROUPS + group) * PAGE + length % PAGE) * HEAD
        tl.store(keys + start + place, k, inside)
        tl.store(values + start + place, v, inside)
        score = tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], 1) * scale
        highest = tl.maximum(best, score)
        shrink, weight = tl.exp(best - highest), tl.exp(score - highest)
        total = total * shrink + weight
        mix = mix * shrink[:, None] + v.to(tl.float32)[None, :] * weight[:, None]
        best = highest
    target = out + (row * GROUPS * GROUP + heads[:, None]) * HEAD + place[None, :]
    if SPLITS == 1:
        tl.store(target, mix / total[:, None], both)
    else:
        line = row * GROUPS * GROUP + heads
        shares = mixed + (line * SPLITS + split)[:, None] * HEAD + place[None, :]
        tl.store(shares, mix, both)
        tl.store(totals + (line * SPLITS + split) * 2, best, member < GROUP)
        tl.store(totals + (line * SPLITS + split) * 2 + 1, total, member < GROUP)
        tl.debug_barrier()  # all threads have written before one of them says so
        if tl.atomic_add(done + row * GROUPS + group, 1, sem="acq_rel") == SPLITS - 1:
            tl.store(done + row * GROUPS + group, 0)
            _join(mixed, totals, target, line, member, place, both, GROUP, HEAD, SPLITS, QUERIES, BLOCK)


@triton.jit
def _join(
    mixed, totals, target, line, member, place, both, GROUP: tl.constexpr, HEAD: tl.constexpr, SPLITS: tl.constexpr, QUERIES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Adds what all splits found, in their order."""
    best = tl.full([QUERIES], -float("inf"), tl.float32)
    for split in tl.static_range(SPLITS):
        best = tl.maximum(best, tl.load(totals + (line * SPLITS + split) * 2, member < GROUP, 0.0, cache_modifier=".cg"))
    total, mix = tl.zeros([QUERIES], tl.float32), tl.zeros([QUERIES, BLOCK], tl.float32)
    for split in tl.static_range(SPLITS):
        weight = tl.exp(tl.load(totals + (line * SPLITS + split) * 2, member < GROUP, 0.0, cache_modifier=".cg") - best)
        total += weight * tl.load(totals + (line * SPLITS + split) * 2 + 1, member < GROUP, 0.0, cache_modifier=".cg")
        mix += weight[:, None] * tl.load(mixed + (line * SPLITS + split)[:, None] * HEAD + place[None, :], both, 0.0, cache_modifier=".cg")
    tl.store(target, mix / total[:, None], both)
