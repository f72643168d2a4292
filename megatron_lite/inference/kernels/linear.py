"""Matrix products of few rows in Triton: each weight is read once, at the speed of memory, and what surrounds the product costs no launch of its own.

Weights of 8 bits are turned into the states' format as they arrive; the scales of their rows are multiplied in behind the product. With few rows it is this
turning, not memory, that a product waits for, so the states are on its left and fp16 numbers are put together from bits.
"""

# pyright: reportMissingParameterType=false, reportCallIssue=false, reportReturnType=false, reportArgumentType=false, reportIndexIssue=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# kernels are Triton's language, which is only spelled like Python

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_lite.inference.kernels.kernel import Kernel
from megatron_lite.inference.kernels.launch import is_compiled, is_hopper, multiprocessors, shared_memory

# m rows, k inputs, n outputs on this rank, c copies of norms

Pair = tuple[Tensor, Tensor]

MOST_ROWS = 64
"""More rows are faster with the library's products."""

HALVES = tl.constexpr(
    """{
    .reg .b32 bytes, shift;
    xor.b32 bytes, $2, 0x80808080;
    mov.b32 shift, 0x64806480;
    prmt.b32 $0, bytes, 0x64646464, 0x4140;
    prmt.b32 $1, bytes, 0x64646464, 0x4342;
    sub.f16x2 $0, $0, shift;
    sub.f16x2 $1, $1, shift;
    }"""
)
"""Four whole numbers of 8 bits as fp16: 0x6400 | u is 1024 + u, of which 1152 = 1024 + 128 is taken (Kim et al. 2022, https://arxiv.org/abs/2211.10017)."""


@dataclass(frozen=True)
class Tiles:
    """How a product is cut into programs: rows of the weight and inputs at a time, warps of a program and tiles that are on their way at once.
    `across`: states @ weight.T instead of weight @ states.T."""

    outputs: int
    inputs: int
    warps: int = 4
    stages: int = 4
    across: bool = False


def tiles_for(rows: int, weight: Tensor, *, outputs: int = 0) -> Tiles:
    """What was fastest on an H200 for matrices of 20B, whole and cut in two and four. `outputs` where they alone are spread over the programs, with those of
    another product at the same time."""
    if weight.dtype == torch.int8:
        return Tiles(64, 256, stages=2, across=True) if rows <= 16 else Tiles(128, 128, warps=8, stages=3)
    if weight.dtype == torch.float32:
        return Tiles(32, 32, stages=2)
    if rows <= 16:
        return Tiles(64, 128)
    return Tiles(64, 128, stages=5) if 0 < outputs <= 2 * 128 * multiprocessors() else Tiles(128, 128)


def fitting(tiles: Tiles, rows: int, weight: Tensor, *, room: int, is_hopper: bool) -> Tiles:
    """With no more tiles on their way than a program's shared memory has room for: consumers' cards have 99 KiB. Before Hopper one of them is in registers."""
    size = weight.element_size()
    each = tiles.inputs * (tiles.outputs * size + _padded(rows) * max(2, size))
    return replace(tiles, stages=max(1, min(tiles.stages, room // each + (not is_hopper))))


def _tiles(rows: int, weight: Tensor, *, outputs: int = 0) -> Tiles:
    return fitting(tiles_for(rows, weight, outputs=outputs), rows, weight, room=shared_memory(), is_hopper=is_hopper())


def within(tiles: Tiles, count: int) -> Tiles:
    """Tiles that end where this number of outputs ends: one reads the states of one norm copy only."""
    outputs = tiles.outputs
    while outputs > 16 and count % outputs:
        outputs //= 2
    return replace(tiles, outputs=outputs)


@dataclass(frozen=True)
class Projection:
    """What belongs to a product of normed states: how many copies of the norm it reads, the first of them, and the activation behind it."""

    copies: int = 1
    first: int = 0
    activation: str = "none"


def project(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    plan: Projection,
    *,
    scale: Tensor | None = None,
    beside: int = 0,
    tiles: Tiles | None = None,
) -> None:
    """out [m n] = the activation of a product of normed states x [c m k] with weight [n k]. `scale` [n] belongs to a weight in int8; `beside` are outputs that
    the GPU works on at the same time."""
    rows, width = x.shape[1:]
    outputs = len(weight)
    tiles = tiles or _tiles(rows, weight, outputs=outputs + beside)
    if plan.copies > 1:
        tiles = within(tiles, outputs // plan.copies)
    _project[(triton.cdiv(outputs, tiles.outputs),)](
        x, weight, x if bias is None else bias, weight if scale is None else scale, out, rows, outputs, outputs // plan.copies, plan.first,
        WIDTH=width, BIASED=bias is not None, SCALED=scale is not None, ACTIVATION=plan.activation,
        EVEN=not (width % tiles.inputs or outputs % tiles.outputs),
        ROWS=_padded(rows), OUTPUTS=tiles.outputs, INPUTS=tiles.inputs, ACROSS=tiles.across, COMPILED=is_compiled(),
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip


def combine(inputs: Pair, weights: Pair, out: Tensor, *, scales: Pair | None = None, tiles: Tiles | None = None) -> None:
    """Terms [splits m n] in fp32 whose sum is inputs[0] @ weights[0].T + inputs[1] @ weights[1].T. `scales` belong to the rows of weights in int8."""
    rows, (outputs, _) = len(inputs[0]), weights[0].shape
    tiles = tiles or _tiles(rows, weights[0])
    widths = weights[0].shape[1], weights[1].shape[1]
    first = max(1, round(len(out) * widths[0] / sum(widths)))
    _combine[(triton.cdiv(outputs, tiles.outputs), len(out))](
        inputs[0], weights[0], inputs[1], weights[1], *(scales or weights), out, rows, outputs, first, len(out) - first,
        SCALED=scales is not None, FIRST_WIDTH=widths[0], SECOND_WIDTH=widths[1],
        EVEN=not (widths[0] % tiles.inputs or widths[1] % tiles.inputs or outputs % tiles.outputs),
        ROWS=_padded(rows), OUTPUTS=tiles.outputs, INPUTS=tiles.inputs, ACROSS=tiles.across, COMPILED=is_compiled(),
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip


def _padded(rows: int) -> int:
    return max(16, triton.next_power_of_2(rows))


@triton.jit
def _product(
    x, weight, rows, outputs, at, start, stop, stride, EVEN: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
    ACROSS: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    """[OUTPUTS ROWS] of weight @ x.T over the inputs from start to stop. EVEN where tiles end where the matrix does."""
    row, output = tl.arange(0, ROWS), at + tl.arange(0, OUTPUTS)
    inputs = tl.arange(0, INPUTS)
    SHORT: tl.constexpr = 0 if ACROSS else 1  # the dim that outputs lack in a tile of weights, and inputs in one of states; the other way round it is LONG
    LONG: tl.constexpr = 1 - SHORT
    is_row, is_output = tl.expand_dims(row < rows, LONG), tl.expand_dims(output < outputs, SHORT)
    weights = weight + tl.expand_dims(output.to(tl.int64), SHORT) * stride + tl.expand_dims(inputs, LONG)
    states = x + tl.expand_dims(row, LONG) * stride + tl.expand_dims(inputs, SHORT)
    total = tl.zeros([ROWS, OUTPUTS] if ACROSS else [OUTPUTS, ROWS], tl.float32)
    for at_input in range(start, stop, INPUTS):
        if EVEN:
            w = tl.load(weights + at_input, eviction_policy="evict_first")
            s = tl.load(states + at_input, is_row, 0.0)
        else:
            inside = at_input + inputs < stop
            w = tl.load(weights + at_input, is_output & tl.expand_dims(inside, LONG), 0.0, eviction_policy="evict_first")
            s = tl.load(states + at_input, is_row & tl.expand_dims(inside, SHORT), 0.0)
        if ACROSS:
            total = tl.dot(s, _widened(w, s.dtype, COMPILED), total, input_precision="ieee")
        else:
            total = tl.dot(_widened(w, s.dtype, COMPILED), s, total, input_precision="ieee")
    return tl.trans(total) if ACROSS else total


@triton.jit
def _widened(w, kind: tl.constexpr, COMPILED: tl.constexpr):
    """Weights in the format of the states."""
    if w.dtype == tl.int8 and kind == tl.float16 and COMPILED:
        return tl.inline_asm_elementwise(HALVES, "=&r,=&r,r", [w], dtype=tl.float16, is_pure=True, pack=4)
    else:
        return w.to(kind)


@Kernel
@triton.jit
def _project(
    x, weight, bias, scale, out, rows, outputs, per_copy, first_copy,
    WIDTH: tl.constexpr, BIASED: tl.constexpr, SCALED: tl.constexpr, ACTIVATION: tl.constexpr,
    EVEN: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, ACROSS: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * OUTPUTS
    states = x + (first_copy + at // per_copy) * rows * WIDTH
    total = _product(states, weight, rows, outputs, at, 0, WIDTH, WIDTH, EVEN, ROWS, OUTPUTS, INPUTS, ACROSS, COMPILED)
    row, output = tl.arange(0, ROWS), at + tl.arange(0, OUTPUTS)
    if SCALED:
        total *= tl.load(scale + output, output < outputs, 0.0)[:, None]
    if BIASED:
        total += tl.load(bias + output, output < outputs, 0.0).to(tl.float32)[:, None]
    total = _activated(total, ACTIVATION)
    tl.store(out + row[None, :] * outputs + output[:, None], total, (output < outputs)[:, None] & (row < rows)[None, :])


@triton.jit
def _activated(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu_tanh":
        return x / (1 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))  # (1 + tanh(y)) / 2 is the logistic function of 2 y
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    else:
        return x


@Kernel
@triton.jit
def _combine(
    one, first, other, second, first_scale, second_scale, out, rows, outputs, first_splits, second_splits,
    SCALED: tl.constexpr, FIRST_WIDTH: tl.constexpr, SECOND_WIDTH: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr, ACROSS: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    at, split = tl.program_id(0) * OUTPUTS, tl.program_id(1)
    if split < first_splits:
        x, weight, scale, width, splits, part = one, first, first_scale, FIRST_WIDTH, first_splits, split
    else:
        x, weight, scale, width, splits, part = other, second, second_scale, SECOND_WIDTH, second_splits, split - first_splits
    length = tl.cdiv(tl.cdiv(width, splits), INPUTS) * INPUTS
    start = part * length
    stride = tl.multiple_of(width, 16) if FIRST_WIDTH % 16 == 0 and SECOND_WIDTH % 16 == 0 else width
    stop = tl.minimum(start + length, width)
    total = _product(x, weight, rows, outputs, at, start, stop, stride, EVEN, ROWS, OUTPUTS, INPUTS, ACROSS, COMPILED)
    row, output = tl.arange(0, ROWS), at + tl.arange(0, OUTPUTS)
    if SCALED:
        total *= tl.load(scale + output, output < outputs, 0.0)[:, None]
    places = out + (split * rows + row[None, :]) * outputs + output[:, None]
    tl.store(places, total, (output < outputs)[:, None] & (row < rows)[None, :])
