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
    tokens, warps, stages = ways(rows * groups, splits, head_dim, page)
    wide, rest = two_widths(head_dim)
    _attend[(rows * groups * splits,)](
        query, key, value, *pages, table, lengths, out, scratch.mixed, scratch.totals, scratch.done,
        turn.cos if turn else query, turn.sin if turn else query,
        query.stride(0), query.stride(1), key.stride(0), key.stride(1), value.stride(0), value.stride(1), table.stride(0), head_dim**-0.5,
        GROUPS=groups, GROUP=queries // groups, HEAD=head_dim, TURNED=2 * turn.cos.shape[1] if turn else 0,
        INTERLEAVED=bool(turn and turn.interleaved), PAGE=page, TOKENS=tokens, SPLITS=splits, WIDE=wide, REST=rest,
        BLOCK=triton.next_power_of_2(wide + rest), QUERIES=max(16, triton.next_power_of_2(queries // groups)), num_warps=warps, num_stages=stages,
    )  # fmt: skip


def ways(programs: int, splits: int, head_dim: int, page: int) -> tuple[int, int, int]:
    """Tokens that a program takes at once, its warps, and its stages: what was fastest on an H200. Where programs are many, each holds few bytes, so that
    those of many are on their way."""
    if head_dim > 128:
        return (min(page, 16), 1, 3) if programs >= 64 else (min(page, 32), 4, 2)
    if programs >= 1024:
        return min(page, 16 if programs >= 4096 else 32), 1, 2
    return page, 4, 3 if splits == 1 else 2


def two_widths(head_dim: int) -> tuple[int, int]:
    """Powers of 2 that together cover a head, the second one 0 where the first is enough: of 96 numbers none is left over, of 128 a quarter would be."""
    wide = max(16, 1 << (head_dim.bit_length() - 1))
    return wide, max(16, triton.next_power_of_2(head_dim - wide)) if wide < head_dim else 0


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


@triton.jit
def within(rows, place, WIDTH: tl.constexpr, HEAD: tl.constexpr):
    """[rows width]: these rows, and of their numbers those that belong to the head; `place` ends at WIDTH."""
    return rows[:, None] if WIDTH <= HEAD else rows[:, None] & (place < HEAD)[None, :]


@Kernel
@triton.jit
def _attend(
    query, key, value, keys, values, table, lengths, out, mixed, totals, done, cos, sin,
    query_row, query_head, key_row, key_head, value_row, value_head, table_row, scale,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, HEAD: tl.constexpr, TURNED: tl.constexpr, INTERLEAVED: tl.constexpr,
    PAGE: tl.constexpr, TOKENS: tl.constexpr, SPLITS: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr,
    BLOCK: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    # a head is the WIDE numbers of "a" and, where REST is not 0, those of "b" behind them
    split, group, row = tl.program_id(0) % SPLITS, tl.program_id(0) // SPLITS % GROUPS, tl.program_id(0) // SPLITS // GROUPS
    END: tl.constexpr = WIDE + REST
    member, token = tl.arange(0, QUERIES), tl.arange(0, TOKENS)
    real, heads = member < GROUP, group * GROUP + member
    length = tl.load(lengths + row)
    kind = keys.dtype.element_ty

    a = tl.arange(0, WIDE)
    lines = query + row * query_row + heads[:, None] * query_head
    q_a = turned(lines, a[None, :], within(real, a, WIDE, HEAD), cos, sin, length, TURNED, INTERLEAVED).to(kind)
    mix_a = tl.zeros([QUERIES, WIDE], tl.float32)
    if REST > 0:
        b = WIDE + tl.arange(0, REST)
        q_b = turned(lines, b[None, :], within(real, b, END, HEAD), cos, sin, length, TURNED if TURNED > WIDE else 0, INTERLEAVED).to(kind)
        mix_b = tl.zeros([QUERIES, REST], tl.float32)

    best, total = tl.full([QUERIES], -float("inf"), tl.float32), tl.zeros([QUERIES], tl.float32)
    count = tl.cdiv(length, TOKENS)
    share = tl.cdiv(count, SPLITS)
    first, stop = split * share, tl.minimum(split * share + share, count)
    for number in range(first, stop):
        at = number * TOKENS
        page = tl.load(table + row * table_row + at // PAGE).to(tl.int64)
        start = ((page * GROUPS + group) * PAGE + at % PAGE) * HEAD
        seen = at + token < length
        place, inside = start + token[:, None] * HEAD + a[None, :], within(seen, a, WIDE, HEAD)
        k_a, v_a = tl.load(keys + place, inside, 0.0), tl.load(values + place, inside, 0.0)
        scores = tl.dot(q_a, tl.trans(k_a), input_precision="ieee")
        if REST > 0:
            place, inside = start + token[:, None] * HEAD + b[None, :], within(seen, b, END, HEAD)
            k_b, v_b = tl.load(keys + place, inside, 0.0), tl.load(values + place, inside, 0.0)
            scores = tl.dot(q_b, tl.trans(k_b), scores, input_precision="ieee")
        scores = tl.where(seen[None, :], scores * scale, -float("inf"))
        highest = tl.maximum(best, tl.max(scores, 1))
        weights = tl.exp(scores - highest[:, None])
        shrink = tl.exp(best - highest)
        total = total * shrink + tl.sum(weights, 1)
        mix_a = tl.dot(weights.to(kind), v_a, mix_a * shrink[:, None], input_precision="ieee")
        if REST > 0:
            mix_b = tl.dot(weights.to(kind), v_b, mix_b * shrink[:, None], input_precision="ieee")
        best = highest

    if split == SPLITS - 1:
        page = tl.load(table + row * table_row + length // PAGE).to(tl.int64)
        start = ((page * GROUPS + group) * PAGE + length % PAGE) * HEAD
        key_line, value_line = key + row * key_row + group * key_head, value + row * value_row + group * value_head
        inside = a < HEAD
        k = turned(key_line, a, inside, cos, sin, length, TURNED, INTERLEAVED).to(kind)
        v_new = tl.load(value_line + a, inside, 0.0)
        tl.store(keys + start + a, k, inside)
        tl.store(values + start + a, v_new, inside)
        score = tl.sum(q_a.to(tl.float32) * k.to(tl.float32)[None, :], 1)
        if REST > 0:
            inside = b < HEAD
            k = turned(key_line, b, inside, cos, sin, length, TURNED if TURNED > WIDE else 0, INTERLEAVED).to(kind)
            v_rest = tl.load(value_line + b, inside, 0.0)
            tl.store(keys + start + b, k, inside)
            tl.store(values + start + b, v_rest, inside)
            score += tl.sum(q_b.to(tl.float32) * k.to(tl.float32)[None, :], 1)
        score = score * scale
        highest = tl.maximum(best, score)
        shrink, weight = tl.exp(best - highest), tl.exp(score - highest)
        total = total * shrink + weight
        mix_a = mix_a * shrink[:, None] + v_new.to(tl.float32)[None, :] * weight[:, None]
        if REST > 0:
            mix_b = mix_b * shrink[:, None] + v_rest.to(tl.float32)[None, :] * weight[:, None]
        best = highest

    line = row * GROUPS * GROUP + heads
    if SPLITS == 1:
        tl.store(out + line[:, None] * HEAD + a[None, :], mix_a / total[:, None], within(real, a, WIDE, HEAD))
        if REST > 0:
            tl.store(out + line[:, None] * HEAD + b[None, :], mix_b / total[:, None], within(real, b, END, HEAD))
    else:
        shares = mixed + (line * SPLITS + split)[:, None] * HEAD
        tl.store(shares + a[None, :], mix_a, within(real, a, WIDE, HEAD))
        if REST > 0:
            tl.store(shares + b[None, :], mix_b, within(real, b, END, HEAD))
        tl.store(totals + (line * SPLITS + split) * 2, best, real)
        tl.store(totals + (line * SPLITS + split) * 2 + 1, total, real)
        tl.debug_barrier()  # all threads have written before one of them says so
        if tl.atomic_add(done + row * GROUPS + group, 1, sem="acq_rel") == SPLITS - 1:
            tl.store(done + row * GROUPS + group, 0)
            _join(mixed, totals, out, line, real, HEAD, SPLITS, QUERIES, BLOCK)


@triton.jit
def _join(mixed, totals, out, line, real, HEAD: tl.constexpr, SPLITS: tl.constexpr, QUERIES: tl.constexpr, BLOCK: tl.constexpr):
    """Adds what all splits found, in their order."""
    place = tl.arange(0, BLOCK)
    both = real[:, None] & (place < HEAD)[None, :]
    best = tl.full([QUERIES], -float("inf"), tl.float32)
    for split in tl.static_range(SPLITS):
        best = tl.maximum(best, tl.load(totals + (line * SPLITS + split) * 2, real, 0.0, cache_modifier=".cg"))
    total, mix = tl.zeros([QUERIES], tl.float32), tl.zeros([QUERIES, BLOCK], tl.float32)
    for split in tl.static_range(SPLITS):
        weight = tl.exp(tl.load(totals + (line * SPLITS + split) * 2, real, 0.0, cache_modifier=".cg") - best)
        total += weight * tl.load(totals + (line * SPLITS + split) * 2 + 1, real, 0.0, cache_modifier=".cg")
        mix += weight[:, None] * tl.load(mixed + (line * SPLITS + split)[:, None] * HEAD + place[None, :], both, 0.0, cache_modifier=".cg")
    tl.store(out + line[:, None] * HEAD + place[None, :], mix / total[:, None], both)
