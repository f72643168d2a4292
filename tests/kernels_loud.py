"""Run by tests/test_kernels.py in a process of its own: Triton's kernels in fp16 with activations that peak at a thousand, in its interpreter."""

import os

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lite.inference import fused
from megatron_lite.inference.captured import CapturedStepper
from megatron_lite.inference.kernels import attention, linear
from megatron_lite.inference.kernels.attention import Scratch, attend_pages
from megatron_lite.inference.kernels.linear import Projection, Tiles, combine, project
from megatron_lite.inference.kernels.norm import add_and_norm
from megatron_lite.inference.sample import Rules
from megatron_lite.inference.step import Slots, Stepper
from megatron_lite.parallel.mesh import single_mesh
from tests.kernels import CPU, let_bounds_be_computed, near, stage_of
from tests.loud import PEAK, cut, largest, make_loud
from tests.runs import random_prompts

TILES = Tiles(32, 64)


def half(*shape: int, peak: float = PEAK) -> Tensor:
    """Numbers up to the peak, in fp16."""
    return (torch.rand(shape) * 2 - 1).mul(peak).half()


def products() -> None:
    """Sums that are far beyond fp16 on their way, and within it at their end; of the second product also in every term."""
    for rows in (1, 17):
        x, weight = torch.full((1, rows, 384), PEAK).half(), torch.ones(64, 384).half()
        weight[:, 1::2] = -1
        weight[:, :128], weight[:, 128:256], weight[:, 256] = 1, -1, 2  # 128 000 on the way, 3 000 at the end
        outs = torch.empty(rows, 64).half(), torch.empty(rows, 64).half()
        for out, activation in zip(outs, ("none", "gelu_tanh"), strict=True):
            project(x, weight, None, out, Projection(activation=activation), tiles=TILES)
        near(outs[0], torch.full((rows, 64), PEAK * weight[0].sum().item()).half())
        near(outs[1], outs[0])
        terms = torch.full((5, rows, 64), torch.nan)
        combine((x[0], x[0]), (weight, weight), terms, tiles=TILES)
        assert terms.abs().max() > 65504
        near(terms.sum(0), torch.full((rows, 64), 2 * PEAK * weight[0].sum().item()))


def activations() -> None:
    """GELU of a thousand is a thousand, and of minus a thousand nothing."""
    x = torch.tensor([[[PEAK, -PEAK, 30000, -30000] * 24]]).half()
    for kind in ("gelu", "gelu_tanh"):
        out = torch.empty(1, 96).half()
        project(x, torch.eye(96).half(), None, out, Projection(activation=kind), tiles=TILES)
        near(out, x[0].clamp(min=0))


def norms() -> None:
    """The stream may leave the range of fp16 altogether."""
    for peak, kind in ((PEAK, torch.float16), (60000.0, torch.float16), (1e6, torch.float32)):
        stream, terms, bias, out = half(5, 90).float() * 100, half(4, 5, 90, peak=1.0).to(kind) * peak, half(90), half(1, 5, 90)
        summed = stream + terms.float().sum(0) + bias
        add_and_norm(stream, terms, bias, torch.ones(1, 90).half(), torch.zeros(1, 90).half(), out, eps=1e-5)
        near(stream, summed, rtol=1e-5, atol=0.1)
        near(out[0].float(), F.layer_norm(summed, (90,)), atol=2e-3, rtol=0)


def attending() -> None:
    """Products of queries and keys are ten million: some keys take all, but every sum of weights is a number."""
    for splits in (1, 4):
        attention.splits_for = lambda rows, count, splits=splits: splits
        lengths, table = torch.tensor([0, 15, 40], dtype=torch.int32), torch.arange(1, 19, dtype=torch.int32).reshape(3, 6)
        pages = half(40, 4, 16, 24), half(40, 4, 16, 24)
        query, key, value, out = half(3, 4, 24), half(3, 4, 24), half(3, 4, 24), half(3, 4, 24)
        attend_pages((query, key, value), pages, table, lengths, out, Scratch.empty(3, 4, 4, 24, CPU))
        for row, length in enumerate(lengths.tolist()):
            keys, values = (torch.cat(list(part[table[row].long()]), 1)[:, : length + 1].double() for part in pages)
            near(out[row].double(), F.scaled_dot_product_attention(query[row][:, None].double(), keys, values)[:, 0], atol=1.0, rtol=0)


def steps() -> None:
    """Whole prompts and steps by fused blocks of both kinds are numbers; where rounding does not decide the attention, those of fp32."""
    linear.tiles_for = lambda rows, weight, outputs=0: TILES
    attention.splits_for = lambda rows, groups: 2
    prompts = random_prompts((3, 9, 1))
    for kind, is_tame in (("parallel", True), ("gptj", False)):
        whole, spec = stage_of(kind)
        make_loud(whole, prompts[1], head_dim=spec.head_dim if is_tame else None)
        assert min(largest(whole, prompts[1])) > PEAK * 0.99
        fast = CapturedStepper(cut(whole, spec, single_mesh(), torch.float16), spec, words=512, pages=8)
        fast.through_prompts = fast._read
        assert fast.stack is not None
        found = told(fast, prompts, lambda slots, fast=fast: fast._rows(slots, 4, slots.tokens))
        assert all(logits.isfinite().all() for logits in found)
        if is_tame:
            plain = Stepper(whole, spec, words=512, pages=8)
            expected = told(plain, prompts, lambda slots, plain=plain: plain.through_rows(slots, 4, slots.tokens))
            for logits, exact in zip(found, expected, strict=True):
                near(logits.float(), exact, atol=0.01 * PEAK, rtol=0)


@torch.inference_mode()
def told(stepper: Stepper, prompts: list[list[int]], step: Callable[[Slots], Tensor]) -> list[Tensor]:
    """The logits behind prompts, and behind the next token of each by both ways for few rows and for many."""
    stepper.pick = lambda logits, rules: logits
    pages = [[1], [2], [4]]
    found = [stepper.read(prompts, pages, Rules.of([], device=CPU)).tokens]
    slots = Slots.empty(4, longest=192, device=CPU)
    slots.fill(torch.tensor([7, 8, 9]), list(map(len, prompts)), pages)
    for most in (64, 2):
        fused.MOST_ROWS = most
        found.append(step(slots)[:3])
    return found


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    let_bounds_be_computed()
    for claim in (products, activations, norms, attending, steps):
        claim()
        print(claim.__name__)
