"""Run by tests/test_kernels.py in a process of its own: Triton's kernels in its interpreter, against plain arithmetic. The first word says which."""

import os

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from triton.runtime import interpreter

from megatron_lite.benchmark import stream
from megatron_lite.inference import fused
from megatron_lite.inference.captured import CapturedStepper
from megatron_lite.inference.kernels import attention, linear, packed
from megatron_lite.inference.kernels.attention import Scratch, Turn, attend_pages
from megatron_lite.inference.kernels.linear import Projection, Tiles, combine, project
from megatron_lite.inference.kernels.norm import add_and_norm
from megatron_lite.inference.request import Request, Sampling
from megatron_lite.inference.sample import Rules
from megatron_lite.inference.step import Slots, Stepper
from megatron_lite.models.architecture import architecture_named
from megatron_lite.models.attention import Rotary, angles
from megatron_lite.models.spec import ModelSpec
from megatron_lite.parallel.mesh import Axis, single_mesh
from megatron_lite.parallel.stage import Stage
from tests.models import load, write_random
from tests.runs import BYTES

CPU = torch.device("cpu")
SPEC = replace(BYTES, max_positions=192, layers=2)
near = torch.testing.assert_close


def let_bounds_be_computed() -> None:
    """The interpreter of some versions cannot loop to a bound that a kernel computed: numpy no longer takes an array of one number for a number."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patched


def projections() -> None:
    """Products, each of its own copies of the norms, the second with GELU; and the sum of two products in terms."""
    for rows in (1, 5, 17):
        x, (one, two), (bias, other) = torch.randn(3, rows, 96), (torch.randn(128, 96), torch.randn(160, 96)), (torch.randn(128), torch.randn(160))
        heads, inner = torch.empty(rows, 128), torch.empty(rows, 160)
        # of the second tiles one would read the states of both copies
        for tiles in (Tiles(32, 64), Tiles(128, 64)):
            heads.fill_(torch.nan)
            project(x, one, bias, heads, Projection(2), tiles=tiles)
            project(x, two, other, inner, Projection(first=2, activation="gelu_tanh"), tiles=tiles)
            near(heads[:, 64:], F.linear(x[1], one[64:], bias[64:]), atol=1e-4, rtol=0)
        near(heads, torch.cat([F.linear(x[0], one[:64], bias[:64]), F.linear(x[1], one[64:], bias[64:])], -1), atol=1e-4, rtol=0)
        near(inner, F.gelu(F.linear(x[2], two, other), approximate="tanh"), atol=1e-4, rtol=0)
        project(x[2:], one, None, heads, Projection(), tiles=Tiles(32, 64))
        project(x[2:], two, None, inner, Projection(activation="gelu"), tiles=Tiles(32, 64))
        near((heads, inner), (F.linear(x[2], one), F.gelu(F.linear(x[2], two))), atol=1e-4, rtol=0)
        states, weights, terms = (
            (torch.randn(rows, 96), torch.randn(rows, 384)),
            (torch.randn(72, 96), torch.randn(72, 384)),
            torch.full((5, rows, 72), torch.nan),
        )
        combine(states, weights, terms, tiles=Tiles(32, 64))
        near(terms.sum(0), states[0] @ weights[0].T + states[1] @ weights[1].T, atol=1e-4, rtol=0)


def streams() -> None:
    """What only reads memory reads all of it."""
    source = torch.randint(-(2**31), 2**31, (4 * 3 * stream.BLOCK,), dtype=torch.int32)
    expected = [int(np.bitwise_xor.reduce(part.numpy())) for part in source.chunk(4)]
    assert stream.fold(source).tolist() == expected


def norms() -> None:
    stream, terms, bias, scale, shift, out = (
        torch.randn(5, 90),
        torch.randn(4, 5, 90),
        torch.randn(90),
        torch.randn(3, 90),
        torch.randn(3, 90),
        torch.empty(3, 5, 90),
    )
    summed = stream + terms.sum(0) + bias
    add_and_norm(stream, terms, bias, scale, shift, out, eps=1e-5)
    near(stream, summed, atol=1e-5, rtol=0)
    near(out, torch.stack([F.layer_norm(summed, (90,), *each, 1e-5) for each in zip(scale, shift, strict=True)]), atol=1e-5, rtol=0)


def attending() -> None:
    """Rows of any length, split over programs or not, with grouped heads and both kinds of rotary pairs; heads of one width, of two, of two and a bit."""
    cases: list[tuple[int, Literal["half", "interleaved"], int, int, int, int]] = [
        (4, "half", 1, 24, 8, 16),
        (4, "interleaved", 4, 24, 8, 16),
        (2, "half", 2, 24, 24, 16),
        (4, "half", 1, 48, 40, 8),
        (4, "interleaved", 2, 48, 16, 16),
        (1, "half", 4, 64, 64, 8),
    ]
    for groups, pairing, splits, size, turns, tokens in cases:
        attention.splits_for = lambda rows, count, splits=splits: splits
        attention.ways = lambda programs, count, head_dim, page, tokens=tokens: (tokens, 1, 2)
        lengths, rotary = torch.tensor([0, 7, 15, 16, 40], dtype=torch.int32), Rotary(turns, 10000.0, 64, pairing)
        pages = (torch.randn(40, groups, 16, size), torch.randn(40, groups, 16, size))
        table = torch.randperm(39)[:30].reshape(5, 6).to(torch.int32) + 1
        query, key, value, out = torch.randn(5, 4, size), torch.randn(5, groups, size), torch.randn(5, groups, size), torch.empty(5, 4, size)
        scratch = Scratch.empty(5, 4, groups, size, CPU)
        attend_pages((query, key, value), pages, table, lengths, out, scratch, Turn(*angles(turns, 10000.0, 64, CPU), pairing == "interleaved"))
        for row, length in enumerate(lengths.tolist()):
            turned, mine = (rotary(each[row][None, :, None], torch.tensor([length]))[0] for each in (query, key))
            keys, values = (torch.cat(list(part[table[row].long()]), 1) for part in pages)
            near(keys[:, length], mine[:, 0], atol=1e-6, rtol=0)
            keys, values = (part[:, : length + 1].repeat_interleave(4 // groups, 0) for part in (keys, values))
            near(out[row], F.scaled_dot_product_attention(turned, keys, values)[:, 0], atol=1e-5, rtol=0)
            assert torch.equal(values[:, -1], value[row].repeat_interleave(4 // groups, 0))
        assert not scratch.done.any()


def packed_texts() -> None:
    """Texts of any length in one row, whose programs take tokens of one of them or of several; grouped heads, of one width, of two, of two and a bit."""
    for groups, size, way in ((4, 24, packed.Way(32, 16, 4, 2)), (2, 48, packed.Way(16, 32, 4, 2)), (1, 64, packed.Way(32, 32, 4, 2))):
        packed.way_for = lambda head_dim, tokens, texts, way=way: way
        for lengths in ([1], [50], [33, 3, 40, 1, 18]):
            query, key, value = (torch.randn(sum(lengths), count, size) for count in (4, groups, groups))
            positions = torch.cat([torch.arange(length) for length in lengths])
            found = packed.attend_packed((query, key, value), positions, len(lengths))
            parts = zip(*(each.transpose(0, 1).split(lengths, 1) for each in (query, key, value)), strict=True)
            expected = [F.scaled_dot_product_attention(*each, is_causal=True, enable_gqa=True) for each in parts]
            near(found, torch.cat(expected, 1).transpose(0, 1), atol=1e-5, rtol=0)


def stage_of(kind: str) -> tuple[Stage, ModelSpec]:
    """A small model whose norms differ between the ranks that saved it, where its kind has more than one copy."""
    if kind != "gptj":
        spec = replace(SPEC, parallel_residual=kind == "parallel")
        return load(write_random(Path(tempfile.mkdtemp()), spec, tp=2), spec, single_mesh()), spec
    spec, layers = replace(SPEC, family="gptj", rotary_dim=8), {}
    for number, make in architecture_named("gptj").plan(spec, Axis("tp")).items():
        layers[number] = make().requires_grad_(False)
        for parameter in layers[number].parameters():
            parameter.normal_(std=0.1) if parameter.dim() > 1 else parameter.add_(torch.randn_like(parameter) * 0.1)
    return Stage(layers, single_mesh(), spec.hidden, torch.float32), spec


def blocks() -> None:
    """Fused blocks compute what the plain ones do, leave the same in the cache, and read prompts to the same end."""
    linear.tiles_for = lambda rows, weight, outputs=0: Tiles(32, 32)
    attention.splits_for = lambda rows, groups: 2
    for kind in ("parallel", "gptj", "sequential"):
        stage, spec = stage_of(kind)
        fast, plain = CapturedStepper(stage, spec, words=512, pages=20), Stepper(stage, spec, words=512, pages=20)
        assert (fast.stack is None) == (kind == "sequential")
        for stepper in (fast, plain):
            stepper.pick = lambda logits, rules: logits
        fast.through_prompts = fast._read
        rules = Rules.of([Request(0, "", (1,), Sampling())], device=CPU)
        with torch.inference_mode():
            told = [stepper.read([[1, 2, 3], [5] * 4, [7]], [[1], [2], [4]], rules).tokens for stepper in (fast, plain)]
            near(told[0], told[1], atol=1e-5, rtol=0)
            compare_steps(fast, plain, kind)


def compare_steps(fast: CapturedStepper, plain: Stepper, kind: str) -> None:
    slots = Slots.empty(4, longest=192, device=CPU)
    slots.fill(torch.tensor([7, 8, 9]), [3, 4, 1], [[1], [2], [4]])
    expected = plain.through_rows(slots, 4, slots.tokens)[:3]
    for most in (64, 2):  # the second time by the way for many rows
        fused.MOST_ROWS = most
        near(fast._rows(slots, 4, slots.tokens)[:3], expected, atol=1e-5, rtol=0)
    for number, keys in fast.cache.keys.items():
        for row, (page, place) in enumerate(((1, 3), (2, 4), (4, 1))):
            near(keys[page, :, : place + 1], plain.cache.keys[number][page, :, : place + 1], atol=1e-5, rtol=0, msg=f"{kind}, block {number}, row {row}")
            near(fast.cache.values[number][page, :, place], plain.cache.values[number][page, :, place], atol=1e-5, rtol=0)


CLAIMS: dict[str, Callable[[], None]] = {
    "projections": projections,
    "norms": norms,
    "streams": streams,
    "attention": attending,
    "packed": packed_texts,
    "blocks": blocks,
}

if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    let_bounds_be_computed()
    CLAIMS[sys.argv[1]]()
    print("ok")
