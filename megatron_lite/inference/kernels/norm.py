"""Adds what a layer computed to the residual stream and norms it for the next layer, in one launch."""

# pyright: reportMissingParameterType=false, reportCallIssue=false, reportReturnType=false, reportArgumentType=false, reportIndexIssue=false, reportGeneralTypeIssues=false
# kernels are Triton's language, which is only spelled like Python

import triton
import triton.language as tl
from torch import Tensor

from megatron_lite.inference.kernels.kernel import Kernel

# m rows, d hidden size, c copies of norms, t terms


def add_and_norm(residual: Tensor, terms: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor, out: Tensor, *, eps: float) -> None:
    """residual [m d] (fp32) += the sum of terms [t m d] + bias [d]; out [c m d] = its LayerNorm with each of scale and shift [c d]."""
    rows, width = residual.shape
    _add_and_norm[(rows,)](
        residual, terms, scale if bias is None else bias, scale, shift, out, rows,
        WIDTH=width, TERMS=len(terms), COPIES=len(scale), BIASED=bias is not None, EPS=eps,
        BLOCK=triton.next_power_of_2(width), num_warps=16 if width > 2048 else 4,
    )  # fmt: skip


@Kernel
@triton.jit
def _add_and_norm(
    residual, terms, bias, scale, shift, out, rows,
    WIDTH: tl.constexpr, TERMS: tl.constexpr, COPIES: tl.constexpr, BIASED: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    inside = column < WIDTH
    place = row * WIDTH + column
    added = tl.load(bias + column, inside, 0.0).to(tl.float32) if BIASED else tl.zeros([BLOCK], tl.float32)
    x = tl.load(residual + place, inside, 0.0) + added
    for term in tl.static_range(TERMS):
        x += tl.load(terms + term * rows * WIDTH + place, inside, 0.0).to(tl.float32)
    tl.store(residual + place, x, inside)
    put_normed(x, scale, shift, out, place, rows, column, inside, WIDTH, COPIES, EPS)


@triton.jit
def put_normed(x, scale, shift, out, place, rows, column, inside, WIDTH: tl.constexpr, COPIES: tl.constexpr, EPS: tl.constexpr):
    """The LayerNorm of a row, which lies at `place` of each copy."""
    centred = tl.where(inside, x - tl.sum(x, 0) / WIDTH, 0.0)
    normed = centred * tl.rsqrt(tl.sum(centred * centred, 0) / WIDTH + EPS)
    for copy in tl.static_range(COPIES):
        y = normed * tl.load(scale + copy * WIDTH + column, inside, 0.0).to(tl.float32)
        y += tl.load(shift + copy * WIDTH + column, inside, 0.0).to(tl.float32)
        tl.store(out + copy * rows * WIDTH + place, y, inside)
