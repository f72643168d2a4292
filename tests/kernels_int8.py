"""Run by tests/test_quantized_kernels.py in a process of its own: Triton's kernels with weights of 8 bits, in its interpreter, against plain arithmetic;
and the blocks that use them."""

import os

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lite.inference.block import FusedBlock
from megatron_lite.inference.captured import CapturedStepper
from megatron_lite.inference.kernels import attention, linear
from megatron_lite.inference.kernels.linear import Projection, Tiles, combine, fitting, project, tiles_for
from megatron_lite.inference.step import Stepper
from megatron_lite.models.neox import ParallelBlock
from megatron_lite.parallel.mesh import Axis
from megatron_lite.parallel.quantized import dequantized, quantize, rounded, row_scale
from tests.kernels import compare_steps, let_bounds_be_computed, stage_of
from tests.models import SMALL

TILES = Tiles(32, 64)
near = torch.testing.assert_close


def in_eight_bits(outputs: int, inputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """A random matrix: its whole numbers, its scales, and what they stand for."""
    matrix = torch.randn(outputs, inputs) * torch.logspace(-2, 1, outputs).unsqueeze(1)  # rows of very different sizes
    scale = row_scale(matrix, Axis("tp"))
    whole = rounded(matrix, scale)
    return whole, scale, dequantized(whole, scale, torch.float32)


def projections() -> None:
    """The scale comes before the bias, and before GELU. Tiles end where the matrices do, or beyond."""
    for rows, dtype, outputs in ((1, torch.float32, 128), (5, torch.float16, 128), (17, torch.float32, 120)):
        x, bias, other = (torch.randn(*shape).to(dtype) for shape in ((3, rows, 96), (outputs,), (160,)))
        (one, first, whole), (two, second, whole_two) = in_eight_bits(outputs, 96), in_eight_bits(160, 96)
        heads, inner = torch.empty(rows, outputs, dtype=dtype), torch.empty(rows, 160, dtype=dtype)
        tiles = replace(TILES, across=rows < 16)
        project(x, one, bias, heads, Projection(), scale=first, tiles=tiles)
        project(x, two, other, inner, Projection(first=2, activation="gelu_tanh"), scale=second, tiles=tiles)
        states, shift, shift_two = (each.float() for each in (x, bias, other))
        atol, rtol = (1e-3, 1e-5) if dtype == torch.float32 else (1e-2, 1e-3)
        near(heads.float(), F.linear(states[0], whole, shift), atol=atol, rtol=rtol)
        near(inner.float(), F.gelu(F.linear(states[2], whole_two, shift_two), approximate="tanh"), atol=atol, rtol=rtol)


def combinations() -> None:
    """Every term of the sum of two products has the scale of its matrix."""
    for dtype in (torch.float32, torch.float16):
        states = torch.randn(5, 96).to(dtype), torch.randn(5, 384).to(dtype)
        (one, first, whole), (two, second, whole_two) = in_eight_bits(72, 96), in_eight_bits(72, 384)
        for across in (False, True):
            terms = torch.full((5, 5, 72), torch.nan)
            combine(states, (one, two), terms, scales=(first, second), tiles=replace(TILES, across=across))
            near(terms.sum(0), states[0].float() @ whole.T + states[1].float() @ whole_two.T, atol=1e-3, rtol=1e-4)


def large_sums() -> None:
    """A product of whole numbers beyond the range of fp16 is scaled before it is stored."""
    x, weight, scale = torch.full((1, 1, 96), 60.0, dtype=torch.float16), torch.full((32, 96), 127, dtype=torch.int8), torch.full((32,), 1e-4)
    out = torch.empty(1, 32, dtype=torch.float16)
    project(x, weight, None, out, Projection(), scale=scale, tiles=TILES)
    near(out.float(), torch.full((1, 32), 60 * 127 * 96 * 1e-4), atol=0.1, rtol=0)


def stages() -> None:
    """Tiles on their way fit in the memory that the threads of a program share: of an H200, an A100, an RTX 3090 and a T4."""
    for size, dtype in ((2, torch.float16), (1, torch.int8)):
        weight, found = torch.empty(1, 1, dtype=dtype), []
        for kib, is_hopper in ((227, True), (163, False), (99, False), (64, False)):
            for rows in (16, 64):
                tiles = fitting(tiles_for(rows, weight), rows, weight, room=kib << 10, is_hopper=is_hopper)
                buffers = max(1, tiles.stages - (not is_hopper))
                assert buffers * tiles.inputs * (tiles.outputs * size + rows * 2) <= kib << 10
                found.append(tiles.stages)
        assert found == {2: [4, 4, 4, 4, 4, 3, 4, 2], 1: [2, 3, 2, 3, 2, 3, 2, 3]}[size]


def blocks() -> None:
    """A fused block holds the very numbers of the plain one, and its products by the library are the plain one's."""
    block = ParallelBlock(SMALL, Axis("tp")).requires_grad_(False)
    quantize(block, Axis("tp"))
    fused = FusedBlock.of(block)
    assert fused is not None
    assert fused.first_scales is not None
    assert fused.second_scales is not None
    assert fused.first[0].data_ptr() == block.attention.query_key_value.weight.data_ptr()
    assert {weight.dtype for weight in (*fused.first, *fused.second)} == {torch.int8}
    x, mixed = torch.randn(1, 9, SMALL.hidden), torch.randn(9, SMALL.hidden)
    normed = torch.cat([block.input_layernorm(x), block.post_attention_layernorm(x)])
    heads, inner = fused.heads(normed), fused.inner(normed)
    near(heads, block.attention.query_key_value(block.input_layernorm(x))[0])
    near(inner, F.gelu(block.mlp.dense_h_to_4h(block.post_attention_layernorm(x))[0], approximate="tanh"))
    near(fused.combined(mixed, inner, fused.small_bias), (block.attention.dense(mixed[None]) + block.mlp.dense_4h_to_h(inner[None]))[0])


def steps() -> None:
    """GPT-J, of whose projections one has no bias, and norms that differ between the saved ranks: a step by the kernels, and by the library for many rows."""
    linear.tiles_for = lambda rows, weight, outputs=0: Tiles(32, 32)
    attention.splits_for = lambda rows, groups: 2
    for kind in ("parallel", "gptj"):
        stage, spec = stage_of(kind)
        for layer in stage.layers.values():
            quantize(layer, stage.mesh.tp)
        fast, plain = CapturedStepper(stage, spec, words=512, pages=20), Stepper(stage, spec, words=512, pages=20)
        assert fast.stack is not None
        with torch.inference_mode():
            compare_steps(fast, plain, kind)


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    let_bounds_be_computed()
    for claim in (projections, combinations, large_sums, stages, blocks, steps):
        claim()
        print(claim.__name__)
