"""Linear layers whose weights are held as 8-bit integers: symmetric, with one scale for every output row, whose largest number becomes 127.

A second implementation of the linear layers in layers.py, put in their place when a layer has been filled. The weights themselves do not train, but
gradients pass through them, so that adapters beside them can.
"""

from collections.abc import Iterable
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn

from megatron_lite.parallel.layers import (
    ColumnLinear,
    GroupedQueryLinear,
    PartialColumnLinear,
    PartialRowLinear,
    RowLinear,
    StackedColumnLinear,
    columns,
)
from megatron_lite.parallel.mesh import Axis
from megatron_lite.parallel.shards import Replicate, Rule, Split

# b batch, s tokens in this call, d input size, n outputs on this rank

BITS = "scale_bits"
LARGEST = 127
AT_ONCE = 1 << 21
"""Numbers that are rounded at once, in fp32."""


class _Product(torch.autograd.Function):
    """W x, which keeps the 8-bit numbers for the backward pass and makes the matrix of them a second time there: none is alive in between."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, place: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.copies, ctx.place = len(x) if x.dim() == 4 else None, place
        return columns(x, dequantized(weight, scale, x.dtype, place), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,), (weight, scale) = gradients, ctx.saved_tensors
        whole = dequantized(weight, scale, gradient.dtype, ctx.place)
        if ctx.copies is None:
            return gradient @ whole, None, None, None, None
        parts = zip(gradient.chunk(ctx.copies, -1), whole.chunk(ctx.copies), strict=True)
        return torch.stack([part @ rows for part, rows in parts]), None, None, None, None


def product(x: Tensor, weight: Tensor, bits: Tensor | None, bias: Tensor | None, place: Tensor | None = None) -> Tensor:
    """[b s d] -> [b s n], as `columns` does it, of a frozen weight in 8 bits, or of one that is whole (no `bits` of scales)."""
    return columns(x, weight, bias) if bits is None else _Product.apply(x, weight, bits.view(torch.float32), bias, place)


class Quantized(nn.Module):
    """weight [n d] in int8 and scale [n] in fp32, whose product is the weight of the layer that this one replaces. [b s d] -> [b s n].

    `kind` and `dtype` are the class of that layer and the format of its weight, `scratch` is as `rounded` wants it; `place` as `share_place` gives it.
    """

    place: Tensor | None = None

    def __init__(self, base: nn.Linear, *, tp: Axis, scratch: Tensor) -> None:
        super().__init__()
        stated = cast(dict[str, Rule], base.rules)
        by_inputs = stated["weight"] == Split(1)
        scale = row_scale(base.weight, tp if by_inputs else Axis(tp.name))
        self.kind, self.dtype = type(base), base.weight.dtype
        self.rules: dict[str, Rule] = {**stated, BITS: Replicate() if by_inputs else stated["weight"]}
        self.weight = nn.Parameter(rounded(base.weight, scale, scratch), requires_grad=False)
        # held as integers: what casts a model to half precision, as DeepSpeed does, would round the scales too
        self.scale_bits = nn.Parameter(scale.view(torch.int32), requires_grad=False)
        self.bias, self.tp = base.bias, tp

    @property
    def scale(self) -> Tensor:
        return self.scale_bits.view(torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight, self.scale_bits, self.bias, self.place)


class QuantizedColumns(Quantized):
    """Of layers that take the whole input by themselves."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.tp.copy(x))


class QuantizedRows(Quantized):
    """Of RowLinear: outputs are summed, then the bias is added."""

    def forward(self, x: Tensor) -> Tensor:
        summed = self.tp.sum(product(x, self.weight, self.scale_bits, None, self.place))
        return summed if self.bias is None else summed + self.bias


QUANTIZED: dict[type[nn.Module], type[Quantized]] = {
    ColumnLinear: QuantizedColumns,
    PartialColumnLinear: Quantized,
    StackedColumnLinear: QuantizedColumns,
    GroupedQueryLinear: QuantizedColumns,
    PartialRowLinear: Quantized,
    RowLinear: QuantizedRows,
}


@torch.no_grad()
def quantize(layer: nn.Module, tp: Axis) -> None:
    """Rounds the matrices of a filled layer; every rank of the cut must call it for the same layer. Embedding, norms and head stay as they are."""
    found = {path: cast(nn.Linear, module) for path, module in layer.named_modules() if type(module) in QUANTIZED}
    if not found:
        return
    # a GPU's allocator would put what stays into the place of numbers that were only on their way, and lose the rest of it: they share one place, taken
    # first; and no matrix is let go before all are rounded: the next layer then takes the place of this one, whole
    weights = [module.weight for module in found.values()]
    scratch = torch.empty(min(AT_ONCE, max(map(torch.numel, weights))), device=weights[0].device)
    made = {path: QUANTIZED[type(module)](module, tp=tp, scratch=scratch) for path, module in found.items()}
    for path, module in made.items():
        parent, _, name = path.rpartition(".")
        setattr(layer.get_submodule(parent), name, module)


def share_place(layers: Iterable[nn.Module]) -> None:
    """Gives all matrices of 8 bits, whose layers run one after the other, one place to be widened in. Taken once, it is counted before a cache is made as
    large as memory allows, and captured work and other work do not each keep one of their own."""
    found = [module for module in chain.from_iterable(layer.modules() for layer in layers) if isinstance(module, Quantized)]
    if found:
        place = torch.empty(max(module.weight.numel() for module in found), dtype=found[0].dtype, device=found[0].weight.device)
        for module in found:
            module.place = place


def row_scale(weight: Tensor, tp: Axis) -> Tensor:
    """The scales [n] of whole rows, of which each rank of `tp` holds some columns: so the numbers do not depend on the cut."""
    low, high = weight.aminmax(dim=1)
    return tp.maximum(torch.maximum(-low, high).float()) / LARGEST


def rounded(weight: Tensor, scale: Tensor, scratch: Tensor | None = None) -> Tensor:
    """int8 [n d] to the nearest number; a row of zeros has scale 0. `scratch` has room for at least a row in fp32."""
    scratch = torch.empty(AT_ONCE, device=weight.device) if scratch is None else scratch
    found = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    step = scale.where(scale > 0, 1.0).unsqueeze(1)
    count = len(scratch) // weight.shape[1]
    for target, rows, steps in zip(found.split(count), weight.split(count), step.split(count), strict=True):
        whole = scratch[: rows.numel()].view(rows.shape)
        target.copy_(torch.div(rows, steps, out=whole).round_())
    return found


def dequantized(weight: Tensor, scale: Tensor, dtype: torch.dtype, place: Tensor | None = None) -> Tensor:
    """The matrix in this number format, in `place` where one of this format is given. Products are taken in fp32 and rounded once."""
    if place is None or place.dtype != dtype:
        place = torch.empty(weight.numel(), dtype=dtype, device=weight.device)
    return torch.mul(weight, scale.unsqueeze(1), out=place[: weight.numel()].view(weight.shape))


def scales_of(one: nn.Module, other: nn.Module) -> tuple[Tensor, Tensor] | None:
    """The scales of two linear layers, if they are quantized."""
    return (one.scale, other.scale) if isinstance(one, Quantized) and isinstance(other, Quantized) else None


def place_of(layer: nn.Module) -> Tensor | None:
    """Where the matrix of a linear layer is widened, if it is quantized and has such a place."""
    return layer.place if isinstance(layer, Quantized) else None
