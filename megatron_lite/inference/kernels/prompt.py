"""Turns the queries and keys of whole prompts and keeps keys and values in their pages, in one launch."""

# pyright: reportMissingParameterType=false, reportCallIssue=false, reportReturnType=false, reportArgumentType=false, reportIndexIssue=false, reportGeneralTypeIssues=false
# kernels are Triton's language, which is only spelled like Python

import triton
import triton.language as tl
from torch import Tensor

from megatron_lite.inference.kernels.attention import Turn, turned
from megatron_lite.inference.kernels.kernel import Kernel

# s tokens, h heads on this rank, d head size, p tokens in a page

TOGETHER = 16
"""Heads that one program turns."""


def place_prompts(heads: Tensor, pages: tuple[Tensor, Tensor], where: tuple[Tensor, Tensor], positions: Tensor, turn: Turn | None) -> None:
    """Turns queries and keys of heads [s h 3 d] in place, by positions [s]. Keys and values go to pages [pages h p d]: token i to where[1][i] of page
    where[0][i]."""
    tokens, count, _, head_dim = heads.shape
    keys, values = pages
    _place[(tokens, triton.cdiv(count, TOGETHER))](
        heads, keys, values, *where, positions, turn.cos if turn else heads, turn.sin if turn else heads, heads.stride(0), heads.stride(1),
        HEADS=count, HEAD=head_dim, PAGE=keys.shape[2], TURNED=2 * turn.cos.shape[1] if turn else 0, INTERLEAVED=bool(turn and turn.interleaved),
        TOGETHER=TOGETHER, BLOCK=triton.next_power_of_2(head_dim), num_warps=4,
    )  # fmt: skip


@Kernel
@triton.jit
def _place(
    heads, keys, values, pages, places, positions, cos, sin, token_stride, head_stride,
    HEADS: tl.constexpr, HEAD: tl.constexpr, PAGE: tl.constexpr, TURNED: tl.constexpr, INTERLEAVED: tl.constexpr, TOGETHER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1) * TOGETHER + tl.arange(0, TOGETHER)
    place = tl.arange(0, BLOCK)[None, :]
    inside = (head < HEADS)[:, None] & (place < HEAD)
    position = tl.load(positions + token)
    query = heads + token * token_stride + head[:, None] * head_stride
    turns = inside & (place < TURNED)
    q = turned(query, place, turns, cos, sin, position, TURNED, INTERLEAVED).to(keys.dtype.element_ty)
    k = turned(query + HEAD, place, inside, cos, sin, position, TURNED, INTERLEAVED).to(keys.dtype.element_ty)
    v = tl.load(query + 2 * HEAD + place, inside, 0.0)
    target = ((tl.load(pages + token) * HEADS + head[:, None]) * PAGE + tl.load(places + token)) * HEAD + place
    tl.store(keys + target, k, inside)
    tl.store(values + target, v, inside)
    if TURNED:
        tl.debug_barrier()  # every number was read by all who turn with it
        tl.store(query + place, q, turns)
        tl.store(query + HEAD + place, k, turns)
