"""Attention over packed texts in one launch: every token sees its own text up to itself. A program takes consecutive tokens of the row, whichever texts they
are of, so that short ones share it."""

# pyright: reportMissingParameterType=false, reportCallIssue=false, reportReturnType=false, reportArgumentType=false, reportIndexIssue=false, reportGeneralTypeIssues=false
# kernels are Triton's language, which is only spelled like Python

from math import e, log2
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_lite.inference.kernels.attention import two_widths, within
from megatron_lite.inference.kernels.kernel import Kernel

# s tokens in the row, h query heads and g key/value heads on this rank, d head size

LONG = 1024
"""Tokens of a text from which on a program takes more of them at once."""
NOTHING = -1e30
"""The highest score of a token that has seen nothing yet: a number, so that keys which are not its own, whose score is -inf, weigh nothing and make no NaN."""


class Way(NamedTuple):
    """Tokens that a program takes, the keys that it looks at together, its warps and stages."""

    tokens: int
    keys: int
    warps: int
    stages: int


def way_for(head_dim: int, tokens: int, texts: int) -> Way:
    """What was fastest on an H200."""
    is_long = tokens >= LONG * texts
    if head_dim > 128:
        return Way(128, 64, 8, 2) if is_long else Way(64, 32, 4, 2)
    if head_dim > 96:
        return Way(64, 64, 4, 3)
    return Way(128, 64, 4, 3) if is_long else Way(64, 32, 4, 3)


def serves() -> bool:
    """Whether this GPU is of the kind that this was measured on."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


def attend_packed(heads: tuple[Tensor, Tensor, Tensor], positions: Tensor, texts: int) -> Tensor:
    """[s h d]: what the queries [s h d] see of keys and values [s g d], `heads`, in a row of so many texts; token i is the positions[i]th of its own."""
    query, key, value = heads
    tokens, queries, head_dim = query.shape
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    way = way_for(head_dim, tokens, texts)
    wide, rest = two_widths(head_dim)
    _attend[(triton.cdiv(tokens, way.tokens) * queries,)](
        query, key, value, positions, out, query.stride(0), query.stride(1), key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        tokens, head_dim**-0.5 * log2(e), HEADS=queries, GROUP=queries // key.shape[1], HEAD=head_dim, WIDE=wide, REST=rest,
        TOKENS=way.tokens, KEYS=way.keys, NOTHING=NOTHING, num_warps=way.warps, num_stages=way.stages,
    )  # fmt: skip
    return out


@Kernel
@triton.jit(do_not_specialize=["tokens"])
def _attend(
    query, key, value, positions, out, query_row, query_head, key_row, key_head, value_row, value_head, tokens, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr, TOKENS: tl.constexpr, KEYS: tl.constexpr,
    NOTHING: tl.constexpr,
):  # fmt: skip
    # the last tokens see most, and are begun first; a head is the WIDE numbers of "a" and, where REST is not 0, those of "b" behind them
    head, first = tl.program_id(0) % HEADS, (tl.num_programs(0) // HEADS - 1 - tl.program_id(0) // HEADS) * TOKENS
    end = tl.minimum(first + TOKENS, tokens)
    token = first + tl.arange(0, TOKENS)
    real = token < tokens
    begins = token - tl.load(positions + token, real, 0).to(tl.int32)
    key += head // GROUP * key_head
    value += head // GROUP * value_head

    lines, a = query + token.to(tl.int64) * query_row + head * query_head, tl.arange(0, WIDE)
    q_a, mix_a = _part(lines, a, real, WIDE, HEAD, False), tl.zeros([TOKENS, WIDE], tl.float32)
    q_b, mix_b = q_a, mix_a
    if REST > 0:
        b = WIDE + tl.arange(0, REST)
        q_b, mix_b = _part(lines, b, real, WIDE + REST, HEAD, False), tl.zeros([TOKENS, REST], tl.float32)
    best, total = tl.full([TOKENS], NOTHING, tl.float32), tl.zeros([TOKENS], tl.float32)

    begin = first - tl.load(positions + first).to(tl.int32)
    middle = begin
    if begin == end - 1 - tl.load(positions + end - 1).to(tl.int32):  # all are of one text, and see all of it that is before them
        middle = begin + (first - begin) // KEYS * KEYS
    for at in range(begin, middle, KEYS):
        mix_a, mix_b, best, total = _look(
            q_a, q_b, key, value, at, token, begins, tokens, mix_a, mix_b, best, total, key_row, value_row, scale, HEAD, WIDE, REST, KEYS, True
        )
    for at in range(middle, end, KEYS):
        mix_a, mix_b, best, total = _look(
            q_a, q_b, key, value, at, token, begins, tokens, mix_a, mix_b, best, total, key_row, value_row, scale, HEAD, WIDE, REST, KEYS, False
        )

    place = out + (token[:, None].to(tl.int64) * HEADS + head) * HEAD
    tl.store(place + a[None, :], mix_a / total[:, None], within(real, a, WIDE, HEAD))
    if REST > 0:
        tl.store(place + b[None, :], mix_b / total[:, None], within(real, b, WIDE + REST, HEAD))


@triton.jit
def _part(lines, place, real, END: tl.constexpr, HEAD: tl.constexpr, ALL: tl.constexpr):
    """These numbers of heads that lie on lines; ALL lines are there, or those that are real."""
    at = lines[:, None] + place[None, :]
    if ALL and END <= HEAD:
        found = tl.load(at)
    else:
        found = tl.load(at, within(real, place, END, HEAD), 0.0)
    return found


@triton.jit
def _look(
    q_a, q_b, key, value, at, token, begins, tokens, mix_a, mix_b, best, total, key_row, value_row, scale,
    HEAD: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr, KEYS: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """Adds what the tokens see of the keys from `at` on: of ALL of them, or of those of their own text up to themselves."""
    seen = at + tl.arange(0, KEYS)
    there = seen < tokens
    keys, values, a = key + seen.to(tl.int64) * key_row, value + seen.to(tl.int64) * value_row, tl.arange(0, WIDE)
    k_a, v_a = _part(keys, a, there, WIDE, HEAD, ALL), _part(values, a, there, WIDE, HEAD, ALL)
    scores = tl.dot(q_a, tl.trans(k_a), input_precision="ieee")
    if REST > 0:
        b = WIDE + tl.arange(0, REST)
        k_b, v_b = _part(keys, b, there, WIDE + REST, HEAD, ALL), _part(values, b, there, WIDE + REST, HEAD, ALL)
        scores = tl.dot(q_b, tl.trans(k_b), scores, input_precision="ieee")
    if not ALL:
        scores = tl.where((seen[None, :] >= begins[:, None]) & (seen[None, :] <= token[:, None]), scores, -float("inf"))
    highest = tl.maximum(best, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - highest[:, None])
    shrink = tl.exp2(best - highest)
    weighed = weights.to(v_a.dtype)
    mix_a = tl.dot(weighed, v_a, mix_a * shrink[:, None], input_precision="ieee")
    if REST > 0:
        mix_b = tl.dot(weighed, v_b, mix_b * shrink[:, None], input_precision="ieee")
    return mix_a, mix_b, highest, total * shrink + tl.sum(weights, 1)
